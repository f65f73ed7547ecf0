"""Softmax attention over a sequence that is sharded over devices, where the heads are fewer than the devices.

Keys and values travel around the ring of devices (`ring_read.py`). All-gathering them instead would move as much, but
each device would hold the keys and values of the whole sequence, and could not compute while they arrive.
"""

from __future__ import annotations

import functools

import jax

from deltaformer_jax.ops.common import heads as H
from deltaformer_jax.ops.common import tiles
from deltaformer_jax.ops.common.hand_written import hand_written, made
from deltaformer_jax.ops.common.padding import zero_gradient_at_padding
from deltaformer_jax.ops.common.similarity import SelfAdjust, Softmax, as_similarity
from deltaformer_jax.ops.softmax.api import checked, without_padding
from deltaformer_jax.ops.softmax.chunked import with_sinks
from deltaformer_jax.sharding.context.axis import narrow_ids, whole_rows
from deltaformer_jax.sharding.context.blocks import blocks_of
from deltaformer_jax.sharding.context.ring_read import Ring, ring_read_backward, ring_read_forward


def causal_attention_ring(
    axis_name: str,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    similarity: str | SelfAdjust = "softmax",
    scale: float | None = None,
    window: int | None = None,
    keep: jax.Array | None = None,
    initial: int = 0,
    log_decay: jax.Array | None = None,
    sinks: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    padding_is_zero: bool = False,
    implementation: str | None = None,
) -> jax.Array:
    """`causal_attention` of a sequence that is sharded over the mesh axis `axis_name`, inside shard_map.

    Arguments are the op's, with T/P contiguous tokens on each of the P devices; `sinks` are the same on all of them.
    Documents may cross devices. `implementation` may be None or "chunked": there is one form, on every platform.

    Returns o [B, T/P, H, V] in value's dtype.

    Raises:
      ValueError, TypeError: as the op; also an odd number of tokens on a device.
      NotImplementedError: another implementation or similarity, keep, initial, or a second derivative.

    Cost: the op's, divided by P. Without a window, rows are spread in zig-zag order first, so that all devices have
      equal work at each step; a device sends its queries, keys, values and outputs once for that, and P − 1 times
      2 G K T/P numbers of keys and values around the ring (with gradients, in the backward pass, twice as many). A
      window over at most P − 2 earlier devices leaves the tokens where they are, and the keys travel only that far.
    """
    if implementation not in (None, "chunked"):
        raise NotImplementedError(
            f"implementation={implementation!r}: attention over a ring has one form; leave model.implementation out, "
            "or give a mesh.context that divides the number of heads of every array"
        )
    if keep is not None or initial:
        raise NotImplementedError(
            "keep and initial: attention over a ring sees no token behind its window; give a mesh.context that divides "
            "the number of heads of every array"
        )
    if as_similarity(similarity, "similarity") != Softmax():
        raise NotImplementedError(
            f"similarity={similarity!r}: attention over a ring has softmax alone; give a mesh.context that divides the "
            "number of heads of every array"
        )
    segment_ids = narrow_ids(segment_ids, axis_name)
    plan, inputs = checked(query, key, value, scale, window, log_decay, sinks, segment_ids, implementation)
    real, (query, key, value, log_decay, sinks, segment_ids) = without_padding(inputs, padding_is_zero)
    tokens, devices = key.shape[1], jax.lax.axis_size(axis_name)
    steps = devices if window is None else min(devices, 1 + -(-(window - 1) // tokens))
    blocks = blocks_of("zigzag" if steps == devices > 1 else "contiguous", tokens, axis_name, plan.chunk)
    every = whole_rows(segment_ids, axis_name)
    first = tiles.first_chunks(every, window, tokens * devices, blocks.rows)
    ring = Ring(Softmax(), plan.scale, window, blocks, steps)
    arrays = [blocks.spread(x) for x in (query, key, value, log_decay, segment_ids)]
    out, lse = (blocks.unspread(x) for x in _attend(ring, *arrays, first))
    out = with_sinks(out, lse, sinks)
    return out if segment_ids is None else zero_gradient_at_padding(out, real)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(ring, query, key, value, log_decay, segment_ids, first):
    """(output [B, t, H, V] in value's dtype, log-sum-exps [B, t, H]) of a device's blocks."""
    return _forward(ring, query, key, value, log_decay, segment_ids, first)[0]


def _layout(query, key, value, log_decay, segment_ids):
    """The arguments of `ring_read_forward`, heads first."""
    heads = key.shape[2]
    k, v = H.heads_first(key), H.heads_first(value)
    if log_decay is not None:
        log_decay = H.fold_queries(log_decay, heads).reshape(*k.shape[:3], -1)
    segments = None if segment_ids is None else segment_ids[:, None]
    return H.fold_queries(query, heads), k, v, segments, log_decay


@functools.partial(jax.jit, static_argnums=0)
def _forward(ring, query, key, value, log_decay, segment_ids, first):
    out, lse = ring_read_forward(ring, *_layout(query, key, value, log_decay, segment_ids), first)
    back = lambda x: H.unfold_queries(x, query.shape[2] // key.shape[2])
    out, lse = made((back(out).astype(value.dtype), back(lse)))
    return (out, lse), (query, key, value, log_decay, segment_ids, first, out, lse)


@hand_written("chunked", "one device and implementation='parallel' or 'recurrent'")
@functools.partial(jax.jit, static_argnums=0)
def _backward(ring, residuals, cotangents):
    query, key, value, log_decay, segment_ids, first, out, lse = residuals
    arrays = _layout(query, key, value, log_decay, segment_ids)
    heads, group = key.shape[2], query.shape[2] // key.shape[2]
    folded = (H.fold_queries(x, heads) for x in (out, lse, *cotangents))
    dq, dk, dv, dg = ring_read_backward(ring, *arrays, first, *folded)
    rows = lambda x: H.unfold_queries(x, group)
    if dg is not None:
        dg = rows(dg.reshape(*dg.shape[:2], -1)).astype(log_decay.dtype)
    dk, dv = H.heads_last(dk).astype(key.dtype), H.heads_last(dv).astype(value.dtype)
    return rows(dq).astype(query.dtype), dk, dv, dg, None, None


_attend.defvjp(_forward, _backward)
