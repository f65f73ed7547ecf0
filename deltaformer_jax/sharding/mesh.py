"""The mesh of devices, and the table that maps parameters' axis names to mesh axes."""

import functools
import math
from collections.abc import Callable

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from deltaformer_jax.config import MeshConfig
from deltaformer_jax.sharding import CONTEXT_AXIS, ROW_AXES

MESH_AXES = ("data", "fsdp", "tensor", "context")

# Axis name of a parameter -> mesh axis. A dimension with any other name is not sharded.
RULES = {
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "embed": "fsdp",
}

# Sharding of a batch [B, T]: its rows are split over the mesh axes "data" and "fsdp", its tokens over "context".
BATCH = PartitionSpec(ROW_AXES, CONTEXT_AXIS)


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh with axes (data, fsdp, tensor, context) over `devices`, by default all devices of the run.

    `data = -1` takes the number of devices divided by the sizes of the other axes. Axes are of type Auto: the compiler
    chooses shardings that are not given. Raises ValueError if the product of the sizes is not the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {name: getattr(config, name) for name in MESH_AXES}
    for name, size in sizes.items():
        if size < 1 and not (name == "data" and size == -1):
            raise ValueError(f"mesh.{name} = {size}: give a number of devices, 1 or more")
    others = math.prod(sizes[name] for name in MESH_AXES[1:])
    if sizes["data"] == -1:
        sizes["data"] = max(1, len(devices) // others)
    wanted = sizes["data"] * others
    if wanted != len(devices):
        asked = " * ".join(f"{name} {sizes[name]}" for name in MESH_AXES)
        raise ValueError(
            f"mesh: {asked} = {wanted} devices, but there are {len(devices)} ({devices[0].platform}); set "
            "mesh.data, mesh.fsdp, mesh.tensor and mesh.context so that their product is that number "
            "(on a CPU, JAX_NUM_CPU_DEVICES=8 simulates 8 devices)"
        )
    return jax.make_mesh(
        tuple(sizes.values()), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES), devices=devices
    )


def memory_limit(mesh: Mesh) -> int | None:
    """The bytes that JAX may use on the smallest of the mesh's devices that this process sees.

    None if they do not say: CPUs, and devices that are only compiled for.
    """
    try:
        limits = [(device.memory_stats() or {}).get("bytes_limit") for device in mesh.local_devices]
    except jax.errors.JaxRuntimeError:
        return None
    return min(limits) if limits and all(limits) else None


def rows(mesh: Mesh) -> int:
    """The number of parts that the rows of a batch are split into."""
    return math.prod(mesh.shape[axis] for axis in ROW_AXES)


def on_mesh(mesh: Mesh, function: Callable) -> Callable:
    """`function`, traced with `mesh` as the abstract mesh. `over_devices`, which the mixers call, reads that mesh."""

    @functools.wraps(function)
    def traced(*arguments):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
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


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, BATCH)
