"""How activations are split over a mesh: one table of names, read from top to bottom, and products that follow it."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
from jax import lax
from jax.sharding import AxisType, PartitionSpec

# Name of a dimension -> the mesh axes that split it.
ACTIVATIONS = {
    "batch": ("data", "fsdp", "expert"),
    "tokens": (),
    "stream": ("tensor",),  # a row's tokens in the residual stream, with mesh.sequence_parallel; without it, "tokens"
    "embed": (),
    "heads": ("tensor",),
    "mlp": ("tensor",),
    "gates": (),  # one number a head: their products are so small that every device computes all
}

# Whether devices along "tensor" split the tokens of the residual stream. Set while a step is traced (`mesh.on_mesh`);
# what jit keeps is kept for each value apart.
sequence_parallel = jax.make_user_context(False)


def constrain(x: jax.Array, *names: str) -> jax.Array:
    """x, told to the compiler to be split as ACTIVATIONS says for the names of its dimensions. So is its gradient.

    Of the table's axes only those count that are left to the compiler: none inside a `shard_map` over them, and none
    without a mesh, where this is x. A dimension that its axes do not divide is whole.
    """
    sizes = left_to_the_compiler()
    if not sizes:
        return x
    spec = PartitionSpec(*(_axes(name, size, sizes) for name, size in zip(names, x.shape, strict=True)))
    return lax.with_sharding_constraint(x, spec)


def on_columns(products: Callable, x: jax.Array, kernels: list[jax.Array], columns: list[int]) -> list[jax.Array]:
    """products(x, kernels), a list of x's products with each, on kernels that "tensor" cuts along dimension `columns`.

    A device computes its columns of each product. The gradients of x through all of them are added up on the device and
    summed over devices once; the compiler would sum each. A kernel whose columns the axis does not divide is whole.
    Of x in a split residual stream [B, T, in], the tokens are gathered, and the sums of its gradient scattered.
    """
    devices = left_to_the_compiler().get("tensor", 1)
    if devices == 1:
        return products(x, kernels)
    is_split = _splits_stream(x)
    cut = [kernel.shape[column] % devices == 0 for kernel, column in zip(kernels, columns, strict=True)]
    into = [
        PartitionSpec(*[None] * column, "tensor") if split else PartitionSpec() for column, split in zip(columns, cut)
    ]
    # Of a product [..., *out] the first dimension of *out is the kernel's first column.
    out = [PartitionSpec(*[None] * (x.ndim - 1), "tensor") if split else PartitionSpec() for split in cut]

    def of_all_tokens(x, kernels):
        return products(lax.all_gather(x, "tensor", axis=1, tiled=True) if is_split else x, kernels)

    of_x = PartitionSpec(None, "tensor") if is_split else PartitionSpec()
    mapped = jax.shard_map(of_all_tokens, in_specs=(of_x, into), out_specs=out, axis_names={"tensor"}, check_vma=False)
    return mapped(x, kernels)


def on_own_tokens(product: Callable, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """product(x, kernel) [B, T, out] of x [B, T, in] and a kernel that is whole on every device of "tensor".

    In a split residual stream a device computes it for its own tokens.
    """
    if not _splits_stream(x):
        return product(x, kernel)
    own = PartitionSpec(None, "tensor")
    return jax.shard_map(
        product, in_specs=(own, PartitionSpec()), out_specs=own, axis_names={"tensor"}, check_vma=False
    )(x, kernel)


def into_stream(product: Callable, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """product(x, kernel) [B, T, out] of x [B, T, *in] and a kernel [*in, out] that "tensor" cuts along its first axis.

    A device has a part of the sum that each number is. Without a split residual stream the compiler sums whole arrays
    over devices; with one, the sums are scattered: a device gets those of its tokens.
    """
    if not _splits_stream(x):
        return product(x, kernel)
    if kernel.shape[0] % left_to_the_compiler()["tensor"]:
        return constrain(product(x, kernel), "batch", "stream", "embed")

    def of_own_tokens(x, kernel):
        return lax.psum_scatter(product(x, kernel), "tensor", scatter_dimension=1, tiled=True)

    into = PartitionSpec(None, None, "tensor"), PartitionSpec("tensor")
    out = PartitionSpec(None, "tensor")
    return jax.shard_map(of_own_tokens, in_specs=into, out_specs=out, axis_names={"tensor"}, check_vma=False)(x, kernel)


def summed_over_tokens(x: jax.Array) -> jax.Array:
    """x summed over the devices that have parts of a batch, in a `shard_map` over the axes that split it; else x.

    For what a device needs to know of the whole batch. Its gradient is that of a device's own part.
    """
    mesh = jax.sharding.get_abstract_mesh()
    kinds = dict(zip(mesh.axis_names, mesh.axis_types))
    split = [axis for axis in (*ACTIVATIONS["batch"], "context") if kinds.get(axis) == AxisType.Manual]
    return lax.psum(x, split) if split else x


def _splits_stream(x: jax.Array) -> bool:
    """Whether the residual stream of x's tokens [B, T, ...] is split."""
    return _axes("stream", x.shape[1], left_to_the_compiler()) is not None


def left_to_the_compiler() -> dict[str, int]:
    """Axis of the current mesh -> its size, of those with several devices that no `shard_map` is over."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types)
    return {name: mesh.shape[name] for name, kind in kinds if kind == AxisType.Auto and mesh.shape[name] > 1}


def _axes(name: str, size: int, sizes: dict[str, int]) -> tuple[str, ...] | None:
    if name == "stream" and not sequence_parallel.value:
        name = "tokens"
    axes = tuple(axis for axis in ACTIVATIONS[name] if axis in sizes)
    return axes if axes and size % math.prod(sizes[axis] for axis in axes) == 0 else None
