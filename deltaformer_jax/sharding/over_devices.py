"""Run an op on a mesh, each device on its own rows, heads and tokens. Rows and heads are independent: no communication.
Tokens are not: `context/over_context.py` has the form of each op for sequences that are sharded over devices.

The compiler partitions XLA operations by itself. It cannot partition a hand-written kernel; shard_map does that.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
from jax.sharding import PartitionSpec

from deltaformer_jax.sharding.context.axis import CONTEXT_AXIS, sequence_is_sharded
from deltaformer_jax.sharding.context.over_context import over_context

# Mesh axes over which the rows of a batch are sharded, and those over which heads are.
ROW_AXES = ("data", "fsdp")
HEAD_AXES = ("tensor",)


def over_devices(op: Callable, arrays: dict[str, jax.Array | None]) -> jax.Array:
    """op(**arrays) [B, T, H, V], computed on the current mesh (`jax.set_mesh`), each device for its rows and heads.

    Args:
      op: takes the arrays by name; its other arguments are already bound. If it returns a pair (output, state), as the
        gated ops do, the output is taken.
      arrays: [B, T, h, …], where each array may have its own number of heads h, except "segment_ids" [B, T] and "sinks"
        [h]. An array may be None.

    The rows are split over the mesh axes of ROW_AXES that the mesh has, if the product of their sizes divides the
    number of rows; the heads over those of HEAD_AXES, if it divides every array's number of heads. Otherwise every
    device along these axes computes the same. Without a mesh, or with one device, this is op(**arrays).

    Inside a shard_map over CONTEXT_AXIS, arrays hold a device's own tokens, and the op takes the form that
    `over_context` chooses. A mesh that has this axis outside of one splits no sequence here.
    """
    sharded = sequence_is_sharded()

    def of_part(**arrays):
        result = over_context(op, arrays, CONTEXT_AXIS) if sharded else op(**arrays)
        return result[0] if isinstance(result, tuple) else result

    mesh = jax.sharding.get_abstract_mesh()
    # Inside a shard_map over some axes, arrays are already a device's own along these.
    axes = {name: mesh.shape[name] for name in set(mesh.axis_names) - set(mesh.manual_axes)}
    if math.prod(axes.values()) == 1:
        return of_part(**arrays)
    given = {name: x for name, x in arrays.items() if x is not None}
    none = {name: None for name, x in arrays.items() if x is None}
    heads = [x.shape[0] if name == "sinks" else x.shape[2] for name, x in given.items() if name != "segment_ids"]
    rows = [x.shape[0] for name, x in given.items() if name != "sinks"]
    row_axes, head_axes = _used(axes, ROW_AXES, rows), _used(axes, HEAD_AXES, heads)

    def spec(name):
        if name == "sinks":
            return PartitionSpec(head_axes)
        return PartitionSpec(row_axes) if name == "segment_ids" else PartitionSpec(row_axes, None, head_axes)

    mapped = jax.shard_map(
        lambda given: of_part(**given, **none),
        in_specs=({name: spec(name) for name in given},),
        out_specs=PartitionSpec(row_axes, None, head_axes),
        axis_names=set(axes),
        # shard_map cannot tell over which mesh axes a kernel's output varies, so its check is switched off.
        check_vma=False,
    )
    return mapped(given)


def _used(axes, names, sizes):
    """Those of the mesh's `axes` among `names` that have several devices; None if there are none, or if the product of
    their sizes does not divide every one of `sizes`."""
    present = tuple(name for name in names if axes.get(name, 1) > 1)
    devices = math.prod(axes[name] for name in present)
    return present if present and all(size % devices == 0 for size in sizes) else None
