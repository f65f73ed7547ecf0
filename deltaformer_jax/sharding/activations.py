"""How activations are split over a mesh: one table of names, read from top to bottom, and products that follow it."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
from jax import lax
from jax.sharding import AxisType, PartitionSpec

# Name of a dimension -> the mesh axes that split it.
ACTIVATIONS = {
    "batch": ("data", "fsdp"),
    "tokens": (),
    "embed": (),  # the residual stream is whole on every device of "tensor"
    "heads": ("tensor",),
    "mlp": ("tensor",),
    "gates": (),  # one number a head: their products are so small that every device computes all
}


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
    """
    devices = left_to_the_compiler().get("tensor", 1)
    if devices == 1:
        return products(x, kernels)
    cut = [kernel.shape[column] % devices == 0 for kernel, column in zip(kernels, columns, strict=True)]
    into = [
        PartitionSpec(*[None] * column, "tensor") if split else PartitionSpec() for column, split in zip(columns, cut)
    ]
    # Of a product [..., *out] the first dimension of *out is the kernel's first column.
    out = [PartitionSpec(*[None] * (x.ndim - 1), "tensor") if split else PartitionSpec() for split in cut]
    mapped = jax.shard_map(
        products, in_specs=(PartitionSpec(), into), out_specs=out, axis_names={"tensor"}, check_vma=False
    )
    return mapped(x, kernels)


def left_to_the_compiler() -> dict[str, int]:
    """Axis of the current mesh -> its size, of those with several devices that no `shard_map` is over."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types)
    return {name: mesh.shape[name] for name, kind in kinds if kind == AxisType.Auto and mesh.shape[name] > 1}


def _axes(name: str, size: int, sizes: dict[str, int]) -> tuple[str, ...] | None:
    axes = tuple(axis for axis in ACTIVATIONS[name] if axis in sizes)
    return axes if axes and size % math.prod(sizes[axis] for axis in axes) == 0 else None
