"""Run an op on a mesh, each device on its own rows, heads and tokens. Rows and heads are independent: no communication.
Tokens are not: `context/over_context.py` has the form of each op for sequences that are sharded over devices.

The compiler partitions XLA operations by itself. It cannot partition a hand-written kernel; shard_map does that.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from deltaformer_jax.ops.common.rematerialisation import kept
from deltaformer_jax.ops.position_bias import BIASES, mixes_heads
from deltaformer_jax.sharding.context.axis import CONTEXT_AXIS, sequence_is_sharded
from deltaformer_jax.sharding.context.over_context import over_context

# Mesh axes over which the rows of a batch are sharded, and those over which heads are.
ROW_AXES = ("data", "fsdp", "expert")
HEAD_AXES = ("tensor",)


def over_devices(op: Callable, arrays: dict[str, jax.Array | None]) -> jax.Array:
    """op(**arrays) [B, T, H, V], computed on the current mesh (`jax.set_mesh`), each device for its rows and heads.

    Args:
      op: takes the arrays by name; its other arguments are already bound. If it returns a pair (output, state), as the
        gated ops do, the output is taken.
      arrays: [B, T, h, …], where each array may have its own number of heads h, except "segment_ids" and "keep" [B, T],
        "sinks" [h], and those of BIASES, trees of arrays [h, …] and [1, …]. An array may be None.

    The rows are split over the mesh axes of ROW_AXES that the mesh has, if the product of their sizes divides the
    number of rows; the heads over those of HEAD_AXES, if it divides the largest number of heads. Of an array with fewer
    heads, whose number it does not divide, a device takes the heads that its own largest ones belong to: with 8 query
    heads and 2 key heads on 4 devices, 2 query heads and the one key head of their group. Otherwise every device along
    these axes computes the same. So it does with a position bias that mixes heads (DAPE). Without a mesh, or with one
    device, this is op(**arrays). Inside a `shard_map`, arrays are a device's own along its axes already, and only the
    other axes count.

    Inside a `shard_map` over CONTEXT_AXIS, arrays hold a device's own tokens, and the op takes the form that
    `over_context` chooses. A mesh that has this axis outside of one splits no sequence here.
    """
    sharded = sequence_is_sharded()
    mixed = any(mixes_heads(arrays.get(name)) for name in BIASES)
    arrays = {name: None if x is None else jax.tree.map(kept, x) for name, x in arrays.items()}

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
    without_heads = ("segment_ids", "keep", *BIASES)
    heads = {name: x.shape[_heads_axis(name)] for name, x in given.items() if name not in without_heads}
    rows = [x.shape[0] for name, x in given.items() if name not in ("sinks", *BIASES)]
    most = max(heads.values())
    row_axes = _used(axes, ROW_AXES, rows)
    cut = all(most % number == 0 for number in heads.values()) and not mixed
    head_axes = _used(axes, HEAD_AXES, [most]) if cut else None
    devices = math.prod(axes[name] for name in head_axes or ())
    shared = {name for name, number in heads.items() if number % devices}

    def spec(name):
        own = None if name in shared else head_axes
        if name == "sinks":
            return PartitionSpec(own)
        if name in BIASES:
            return jax.tree.map(lambda x: PartitionSpec(None if x.shape[0] % devices else own), given[name])
        return PartitionSpec(row_axes) if name in ("segment_ids", "keep") else PartitionSpec(row_axes, None, own)

    def own_numbers(x):
        """Of an array [h, …] of a bias, those of this device's heads, unless it has them already or all share it."""
        return x if x.shape[0] == 1 or x.shape[0] % devices == 0 else _own_heads(x, 0, head_axes, devices)

    def on_device(given):
        mine = {
            name: _own_heads(x, _heads_axis(name), head_axes, devices) for name, x in given.items() if name in shared
        }
        for name in BIASES:
            if name in given:
                mine[name] = jax.tree.map(own_numbers, given[name])
        return of_part(**given | mine, **none)

    mapped = jax.shard_map(
        on_device,
        in_specs=({name: spec(name) for name in given},),
        out_specs=PartitionSpec(row_axes, None, head_axes),
        axis_names=set(axes),
        # shard_map cannot tell over which mesh axes a kernel's output varies, so its check is switched off.
        check_vma=False,
    )
    return mapped(given)


def _heads_axis(name: str) -> int:
    return 0 if name == "sinks" else 2


def _own_heads(x, axis: int, head_axes: tuple[str, ...], devices: int):
    """Those of x's G heads that this device's largest heads belong to.

    As if each head were repeated until there are lcm(G, devices) of them, and these were split evenly.
    """
    heads = x.shape[axis]
    all_heads = math.lcm(heads, devices)
    first = lax.axis_index(head_axes) * (all_heads // devices)
    return jnp.take(x, (first + jnp.arange(all_heads // devices)) // (all_heads // heads), axis=axis)


def _used(axes, names, sizes):
    """Those of the mesh's `axes` among `names` that have several devices; None if there are none, or if the product of
    their sizes does not divide every one of `sizes`."""
    present = tuple(name for name in names if axes.get(name, 1) > 1)
    devices = math.prod(axes[name] for name in present)
    return present if present and all(size % devices == 0 for size in sizes) else None
