"""Run an op on a mesh, each device on its own rows, heads and tokens. Rows and heads are independent: no communication.
Tokens are not: `context/over_context.py` has the form of each op for sequences that are sharded over devices.

The compiler partitions XLA operations by itself. It cannot partition a hand-written kernel; shard_map does that.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
from jax.sharding import PartitionSpec

from deltaformer_jax.sharding.context.halo import over_halo
from deltaformer_jax.sharding.context.over_context import over_context

# Mesh axes over which the rows of a batch are sharded, those over which heads are, and that over which sequences are.
ROW_AXES = ("data", "fsdp")
HEAD_AXES = ("tensor",)
CONTEXT_AXIS = "context"


def over_devices(op: Callable, arrays: dict[str, jax.Array | None]) -> jax.Array:
    """op(**arrays) [B, T, H, V], computed on the current mesh (`jax.set_mesh`), each device for its part of the arrays.

    Args:
      op: takes the arrays by name; its other arguments are already bound. If it returns a pair (output, state), as the
        gated ops do, the output is taken.
      arrays: [B, T, h, …], where each array may have its own number of heads h, except "segment_ids" [B, T] and "sinks"
        [h]. An array may be None.

    The rows are split over the mesh axes of ROW_AXES that the mesh has, if the product of their sizes divides the
    number of rows; the heads over those of HEAD_AXES, if it divides every array's number of heads. Otherwise every
    device along these axes computes the same. The tokens are split over CONTEXT_AXIS, and the op takes the form that
    `over_context` chooses. Without a mesh, or with one device, this is op(**arrays).

    Raises ValueError if CONTEXT_AXIS has several devices that do not divide the number of tokens.
    """
    output = lambda result: result[0] if isinstance(result, tuple) else result
    mesh = jax.sharding.get_abstract_mesh()
    # Inside a shard_map over some axes, arrays are already a device's own along these.
    axes = {name: mesh.shape[name] for name in set(mesh.axis_names) - set(mesh.manual_axes)}
    if math.prod(axes.values()) == 1:
        return output(op(**arrays))
    given = {name: x for name, x in arrays.items() if x is not None}
    none = {name: None for name, x in arrays.items() if x is None}
    heads = [x.shape[0] if name == "sinks" else x.shape[2] for name, x in given.items() if name != "segment_ids"]
    rows = [x.shape[0] for name, x in given.items() if name != "sinks"]
    row_axes, head_axes = _used(axes, ROW_AXES, rows), _used(axes, HEAD_AXES, heads)
    context = CONTEXT_AXIS if axes.get(CONTEXT_AXIS, 1) > 1 else None
    if context is not None:
        check_tokens(given["query"].shape[1], axes[context])
        of_part = lambda given: output(over_context(op, {**given, **none}, context))
    else:
        of_part = lambda given: output(op(**given, **none))

    def spec(name):
        if name == "sinks":
            return PartitionSpec(head_axes)
        return (
            PartitionSpec(row_axes, context) if name == "segment_ids" else PartitionSpec(row_axes, context, head_axes)
        )

    mapped = jax.shard_map(
        of_part,
        in_specs=({name: spec(name) for name in given},),
        out_specs=PartitionSpec(row_axes, context, head_axes),
        axis_names=set(axes),
        # shard_map cannot tell over which mesh axes a kernel's output varies, so its check is switched off.
        check_vma=False,
    )
    return mapped(given)


def check_tokens(tokens: int, devices: int) -> None:
    """Raise ValueError if the devices of CONTEXT_AXIS do not divide a sequence's tokens."""
    if tokens % devices:
        raise ValueError(
            f"a sequence of {tokens} tokens on a mesh with {devices} devices along {CONTEXT_AXIS!r}: make its length a "
            f"multiple of {devices}"
        )


def context_devices() -> int:
    """How many devices split a sequence on the current mesh, as far as the compiler does it; 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty or CONTEXT_AXIS in mesh.manual_axes else mesh.shape.get(CONTEXT_AXIS, 1)


def over_previous_tokens(function: Callable, tokens: int, x, segment_ids: jax.Array | None, *parameters):
    """function(x, segment_ids, *parameters) [B, T, ...], in which a token depends on at most `tokens` tokens before it.

    On a mesh that splits sequences over CONTEXT_AXIS, each device gets these tokens of the device before
    (`context/halo.py`). x: an array [B, T, ...], or a tree of them. parameters: trees of arrays without a time axis.
    """
    devices = context_devices()
    if devices == 1:
        return function(x, segment_ids, *parameters)
    check_tokens(jax.tree.leaves(x)[0].shape[1], devices)

    def of_part(x, segment_ids, parameters):
        return over_halo(lambda x, ids: function(x, ids, *parameters), x, segment_ids, tokens, CONTEXT_AXIS)

    part = PartitionSpec(None, CONTEXT_AXIS)
    mapped = jax.shard_map(
        of_part,
        in_specs=(part, part, PartitionSpec()),
        out_specs=part,
        axis_names={CONTEXT_AXIS},
        check_vma=False,
    )
    return mapped(x, segment_ids, parameters)


def _used(axes, names, sizes):
    """Those of the mesh's `axes` among `names` that have several devices; None if there are none, or if the product of
    their sizes does not divide every one of `sizes`."""
    present = tuple(name for name in names if axes.get(name, 1) > 1)
    devices = math.prod(axes[name] for name in present)
    return present if present and all(size % devices == 0 for size in sizes) else None
