"""DeltaFormer over a sequence that is sharded over more devices than it has KV heads: the chain of the write.

The write is a chain over the row's blocks, and a pipeline over groups of heads hides its latency: while one device
solves a block of one group, others solve earlier blocks of other groups, and all of them take solved blocks into the
sums of their later rows (`schedule.py`, `chain_forward.py`, `chain_backward.py`). The blocks are dealt to the devices
one by one. With two blocks a device in zig-zag order, which balances as well, the pipeline would need twice as many
groups of heads as devices to be full; with many blocks a device it is full with few heads, or with one.
"""

from __future__ import annotations

import functools

import jax

from deltaformer_jax.ops.common import heads as H
from deltaformer_jax.ops.common import tiles
from deltaformer_jax.ops.common.hand_written import hand_written, made
from deltaformer_jax.ops.common.padding import zero_gradient_at_padding
from deltaformer_jax.ops.common.similarity import SelfAdjust, Similarity, as_similarity
from deltaformer_jax.ops.deltaformer.api import checked, without_padding
from deltaformer_jax.sharding.context.axis import narrow_ids, whole_rows
from deltaformer_jax.sharding.context.blocks import blocks_of
from deltaformer_jax.sharding.context.chain_backward import chain_backward
from deltaformer_jax.sharding.context.chain_forward import Chain, Streams, chain_forward
from deltaformer_jax.sharding.context.ring_read import Ring, ring_read_backward
from deltaformer_jax.sharding.context.schedule import choose_groups


def delta_attention_pipeline(
    axis_name: str,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    write_query: str | jax.Array = "key",
    alpha: jax.Array | None = None,
    beta: jax.Array | None = None,
    write_similarity: str | Similarity = "softmax",
    read_similarity: str | Similarity = "softmax",
    write_scale: float | None = None,
    read_scale: float | None = None,
    window: int | None = None,
    keep: jax.Array | None = None,
    initial: int = 0,
    segment_ids: jax.Array | None = None,
    padding_is_zero: bool = False,
    chunk_size: int | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """`delta_attention` of a sequence that is sharded over the mesh axis `axis_name`, inside shard_map, for any heads.

    Arguments are the op's, with T/P contiguous tokens on each of the P devices. Documents may cross devices.
    `chunk_size`: the most rows of a block; None: 512. `implementation` may be None or "chunked": there is one form, on
    every platform.

    Returns o [B, T/P, H, V] in value's dtype.

    Raises:
      ValueError, TypeError: as the op; also a number of tokens on a device that P does not divide.
      NotImplementedError: another implementation, window, keep, initial, a similarity that holds arrays, a
        self-adjusted one, or a second derivative.

    Cost: the op's, divided by P, and the time that `schedule.idle_share` gives; w = q takes two passes. Of the numbers
      of its T/P tokens, a device sends (P − 1)/P once to spread them over the devices and back. Around the chain it
      sends (K + V) Hu T (P − 1)/P numbers, and up to twice as many if there are g < P groups of heads (`exchange.py`).
      In the backward pass it sends twice as many for the read's columns and their gradients, and as many for the
      chain's rows, besides the sums of dW that go back. Memory: O(T/P (K + V)) a head, besides the segment ids of the
      whole row.
    """
    if implementation not in (None, "chunked"):
        raise NotImplementedError(
            f"implementation={implementation!r}: the chain over devices has one form; leave model.implementation out, "
            "or give a mesh.context that divides the number of heads of every array"
        )
    if window is not None or keep is not None or initial:
        raise NotImplementedError(
            "window, keep and initial: the chain over devices has none; give a mesh.context that divides the number of "
            "heads of every array"
        )
    if isinstance(as_similarity(read_similarity, "read_similarity"), SelfAdjust):
        raise NotImplementedError(
            f"read_similarity={read_similarity!r}: the chain over devices has no self-adjusted softmax; give a "
            "mesh.context that divides the number of heads of every array"
        )
    segment_ids = narrow_ids(segment_ids, axis_name)
    gates, similarities = (alpha, beta, segment_ids), (write_similarity, read_similarity, write_scale, read_scale)
    plan, own_query, held, inputs = checked(
        query, key, value, write_query, *gates, *similarities, chunk_size, implementation
    )
    if any(held):
        raise NotImplementedError("a similarity that holds arrays cannot be used over devices: put numbers in it")
    real, inputs = without_padding(inputs, padding_is_zero)
    tokens, devices = key.shape[1], jax.lax.axis_size(axis_name)
    blocks = blocks_of("dealt", tokens, axis_name, chunk_size or 512)
    first = tiles.first_chunks(whole_rows(segment_ids, axis_name), None, tokens * devices, blocks.rows)
    query, write_query, key, value, alpha, beta, segment_ids = map(blocks.spread, inputs)
    if write_query is None:
        write_query = query if own_query else key
    heads = write_query.shape[2]
    streams = key.shape[0] * heads
    groups = choose_groups(streams, devices * blocks.number, devices, query.shape[2] / heads)
    similarities = plan.write_similarity, plan.write_scale, plan.read_similarity, plan.read_scale
    arrays = Streams(query, write_query, *(H.repeat_heads(x, heads) for x in (key, value)), alpha, beta, segment_ids)
    out = blocks.unspread(_attend(Chain(*similarities, blocks, groups), arrays, first))
    return out if segment_ids is None else zero_gradient_at_padding(out, real)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(chain, arrays, first):
    """The output [B, t, H, V] of a device's blocks; `arrays` are `Streams` as [B, t, heads, ...], segments [B, t]."""
    return _forward(chain, arrays, first)[0]


def _as_streams(chain, arrays: Streams) -> Streams:
    """[B, t, heads, ...] -> [g, n, t, ...]."""
    q, *others, segments = arrays
    heads = arrays.w.shape[2]
    grouped = lambda x: None if x is None else x.reshape(chain.groups, -1, *x.shape[2:])
    if segments is not None:
        segments = grouped(H.heads_first(jax.numpy.repeat(segments[:, :, None], heads, axis=2)))
    return Streams(grouped(H.fold_queries(q, heads)), *(grouped(H.heads_first(x)) for x in others), segments)


@functools.partial(jax.jit, static_argnums=0)
def _forward(chain, arrays, first):
    out, u, *lses = chain_forward(chain, _as_streams(chain, arrays), tiles.last_chunks(first))
    # Only the backward pass of softmax needs the output.
    kept = out.astype(arrays.v.dtype) if chain.read_similarity.normalised else None
    out = _rows(arrays, out).astype(arrays.v.dtype)
    out, u, kept, lses = made((out, u, kept, lses))
    return out, (arrays, first, u, kept, lses)


def _rows(arrays, x):
    """[g, n, t·r, ...] -> [B, t, H, ...]: the inverse of the folded queries' layout."""
    batch, _, heads, _ = arrays.w.shape
    return H.unfold_queries(x.reshape(batch, heads, *x.shape[2:]), arrays.q.shape[2] // heads)


@hand_written("chunked", "one device and implementation='parallel' or 'recurrent'")
@functools.partial(jax.jit, static_argnums=0)
def _backward(chain, residuals, dout):
    arrays, first, u, kept, (lse_write, lse_read) = residuals
    streams = _as_streams(chain, arrays)
    batch, _, heads, _ = arrays.w.shape
    dout = H.fold_queries(dout, heads).reshape(*streams.q.shape[:3], -1)
    ring = Ring(chain.read_similarity, chain.read_scale, None, chain.blocks, chain.blocks.devices)
    read = ring_read_backward(ring, streams.q, streams.k, u, streams.segments, None, first, kept, lse_read, dout)
    dq, dk_read, du, _ = read
    dw, dk, dv, dalpha, dbeta = chain_backward(chain, streams, first, u, lse_write, du)
    back = lambda x: H.heads_last(x.reshape(batch, heads, *x.shape[2:]))
    gradients = Streams(_rows(arrays, dq), *map(back, (dw, dk + dk_read, dv, dalpha, dbeta)), None)
    cast = lambda gradient, x: None if x is None else gradient.astype(x.dtype)
    return Streams(*map(cast, gradients[:-1], arrays[:-1]), None), None


_attend.defvjp(_forward, _backward)
