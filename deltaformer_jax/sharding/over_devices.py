"""An op on every device's own rows and heads, which need nothing of each other's: no communication.

The compiler cuts XLA's own operations over a mesh by itself; a kernel it cannot see into has to be told, by shard_map.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
from jax.sharding import PartitionSpec

# Mesh axes that rows of the batch lie on, and those that heads lie on.
ROW_AXES = ("data", "fsdp")
HEAD_AXES = ("tensor",)


def over_devices(op: Callable[..., jax.Array], arrays: dict[str, jax.Array | None]) -> jax.Array:
    """op(**arrays) [B, T, H, V], on the mesh in force (`jax.set_mesh`), each device computing its rows and its heads.

    Args:
      op: takes the arrays by name; whatever else it needs is bound already.
      arrays: [B, T, h, …] each with its own number of heads h, but "segment_ids" [B, T] and "sinks" [h]; None allowed.

    A mesh axis of ROW_AXES or HEAD_AXES is used if the mesh has it and its size divides the rows, or every number of
    heads; otherwise all its devices compute the same. Without a mesh, or with one device, this is op(**arrays).
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return op(**arrays)
    given = {name: x for name, x in arrays.items() if x is not None}
    none = {name: None for name, x in arrays.items() if x is None}
    heads = [x.shape[0] if name == "sinks" else x.shape[2] for name, x in given.items() if name != "segment_ids"]
    rows = [x.shape[0] for name, x in given.items() if name != "sinks"]
    row_axes, head_axes = _used(mesh, ROW_AXES, rows), _used(mesh, HEAD_AXES, heads)

    def spec(name):
        if name == "sinks":
            return PartitionSpec(head_axes)
        return PartitionSpec(row_axes) if name == "segment_ids" else PartitionSpec(row_axes, None, head_axes)

    mapped = jax.shard_map(
        lambda given: op(**given, **none),
        in_specs=({name: spec(name) for name in given},),
        out_specs=PartitionSpec(row_axes, None, head_axes),
        # A kernel says nothing about which axes its output varies over.
        check_vma=False,
    )
    return mapped(given)


def _used(mesh, names, sizes):
    """The mesh axes among `names` whose devices together divide all `sizes`; None if there are none or they don't."""
    present = tuple(name for name in names if mesh.shape.get(name, 1) > 1)
    devices = math.prod(mesh.shape[name] for name in present)
    return present if present and all(size % devices == 0 for size in sizes) else None
