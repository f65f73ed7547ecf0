"""The mesh of devices, and the table that maps parameters' axis names to mesh axes."""

import functools
import math
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from deltaformer_jax.config import MeshConfig
from deltaformer_jax.config.sections.mesh import RECIPES, REST, SLICES
from deltaformer_jax.sharding import CONTEXT_AXIS, ROW_AXES, activations

MESH_AXES = ("data", "fsdp", "expert", "tensor", "context")

# The axes that may go over the hosts of GPUs, the first one first.
GPU_HOSTS = ("data", "fsdp", "expert", "context", "tensor")

# Axis name of a parameter -> mesh axis. A dimension with any other name is not sharded.
RULES = {
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "embed": "fsdp",
    "expert": "expert",
}

# Sharding of a batch [B, T]: its rows are split over the mesh axes "data", "fsdp" and "expert", its tokens over
# "context".
BATCH = PartitionSpec(ROW_AXES, CONTEXT_AXIS)


def make_mesh(
    config: MeshConfig, devices: list[jax.Device] | None = None, *, slice_attribute: str = "slice_index"
) -> Mesh:
    """A mesh with axes (data, fsdp, expert, tensor, context) over `devices`, by default all devices of the run.

    `data = -1` takes the number of devices divided by the sizes of the other axes; `recipe` gives sizes by name. Axes
    are of type Auto: the compiler chooses shardings that are not given. Raises ValueError if the product of the sizes
    is not the number of devices, or if slices cannot be split over data and fsdp.

    slice_attribute: what tells a device's slice. Of GPUs every host is a slice to JAX, but where they are only compiled
    for: there it is "process_index".
    """
    devices = jax.devices() if devices is None else devices
    slices = len({getattr(device, slice_attribute, 0) for device in devices})
    simulated = " (on a CPU, JAX_NUM_CPU_DEVICES=8 simulates 8 devices)" if devices[0].platform == "cpu" else ""
    sizes = _sizes(config, len(devices), slices, simulated)
    laid_out = _laid_out(sizes, devices, slices, by_process=slice_attribute == "process_index")
    return Mesh(laid_out, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def _sizes(config: MeshConfig, devices: int, slices: int, more: str) -> dict[str, int]:
    """Axis -> its number of devices. more: where more devices can come from, for the error of too few."""
    given = {name: getattr(config, name) for name in MESH_AXES}
    for name, size in given.items():
        if size < 1 and not (name == "data" and size == -1):
            raise ValueError(f"mesh.{name} = {size}: give a number of devices, 1 or more")
    default = {name: getattr(MeshConfig(), name) for name in MESH_AXES}
    recipe = RECIPES[config.recipe] if config.recipe else {}
    sizes = {name: recipe.get(name, size) if size == default[name] else size for name, size in given.items()}
    sizes = {name: slices if size == SLICES else size for name, size in sizes.items()}
    others = math.prod(size for size in sizes.values() if size != REST)
    sizes = {name: max(1, devices // others) if size == REST else size for name, size in sizes.items()}
    wanted = math.prod(sizes.values())
    if wanted != devices:
        asked = " * ".join(f"{name} {sizes[name]}" for name in MESH_AXES)
        by = f" (by mesh.recipe = {config.recipe!r})" if config.recipe else ""
        raise ValueError(
            f"mesh: {asked} = {wanted} devices{by}, but there are {devices}; set "
            f"{', '.join(f'mesh.{name}' for name in MESH_AXES[:-1])} and mesh.{MESH_AXES[-1]} so that their product is "
            f"that number{more}"
        )
    return sizes


def _laid_out(sizes: dict[str, int], devices: list[jax.Device], slices: int, *, by_process: bool) -> np.ndarray:
    """The devices as an array of these sizes: neighbours along an axis are neighbours in the network where it can be.

    Only the axes of rows go over several slices, data before fsdp: what they send is sent once a layer or once a step.
    Of GPUs, where each host is a slice, the other axes go over them too, after these, context before tensor.
    """
    shape = tuple(sizes.values())
    if slices == 1:
        try:
            return mesh_utils.create_device_mesh(shape, devices)
        except NotImplementedError:  # no axis of the mesh is a product of whole axes of the network
            return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    over, left = {}, slices
    for name in ("data", "fsdp") if devices[0].platform == "tpu" else GPU_HOSTS:
        over[name] = math.gcd(sizes[name], left)
        left //= over[name]
    if left > 1:
        raise ValueError(
            f"mesh.data * mesh.fsdp = {sizes['data']} * {sizes['fsdp']}: the {slices} slices of the devices cannot be "
            "split over them; give one of them a multiple of the number of slices"
        )
    between = tuple(over.get(name, 1) for name in sizes)
    inside = tuple(size // factor for size, factor in zip(shape, between))
    return mesh_utils.create_hybrid_device_mesh(
        inside, between, devices, allow_split_physical_axes=True, process_is_granule=by_process
    )


def rows(mesh: Mesh) -> int:
    """The number of parts that the rows of a batch are split into."""
    return math.prod(mesh.shape[axis] for axis in ROW_AXES)


def on_mesh(mesh: Mesh, function: Callable, *, sequence_parallel: bool = False) -> Callable:
    """`function`, traced with `mesh` as the abstract mesh. `over_devices`, which the mixers call, reads that mesh.

    sequence_parallel: whether devices along "tensor" split the tokens of the residual stream (`activations.py`).
    """

    @functools.wraps(function)
    def traced(*arguments):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), activations.sequence_parallel(sequence_parallel):
            return function(*arguments)

    return traced


def partition(axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """The PartitionSpec of one parameter of shape `shape`, from the names of its last len(axes) dimensions.

    Leading dimensions without a name (stacked layers) are not sharded. A named dimension is not sharded if the size of
    its mesh axis doesn't divide it, or if a dimension to its left already uses that mesh axis.
    """
    if len(axes) > len(shape):
        raise ValueError(f"a parameter of shape {shape} names {len(axes)} axes: {axes}")
    spec: list[str | None] = [None] * len(shape)
    for i, (name, size) in enumerate(zip(axes, shape[len(shape) - len(axes) :]), len(shape) - len(axes)):
        axis = RULES.get(name)
        if axis is not None and axis not in spec and size % mesh.shape[axis] == 0:
            spec[i] = axis
    return PartitionSpec(*spec)


def kept_whole(axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh) -> list[tuple[str, int, str]]:
    """(name, size, mesh axis) of the dimensions that RULES would cut, and the mesh axis does not divide."""
    named = zip(axes, shape[len(shape) - len(axes) :])
    asked = [(name, size, RULES[name]) for name, size in named if name in RULES]
    return [(name, size, axis) for name, size, axis in asked if size % mesh.shape[axis]]


def also_over_data(sharding: NamedSharding, shape: tuple[int, ...]) -> NamedSharding:
    """The sharding of an array of this shape, cut over the mesh axis "data" too.

    Along the first dimension that is whole and that data divides, else along one cut over fsdp; where there is none, as
    it was.
    """
    mesh, spec = sharding.mesh, [*sharding.spec, *[None] * (len(shape) - len(sharding.spec))]
    for held in (None, "fsdp"):
        parts = mesh.shape["data"] * (mesh.shape[held] if held else 1)
        for i, size in enumerate(shape):
            if spec[i] == held and size % parts == 0:
                spec[i] = (held, "data") if held else "data"
                return NamedSharding(mesh, PartitionSpec(*spec))
    return sharding


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, BATCH)
