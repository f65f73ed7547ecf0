"""The chunked form of softmax attention, with a hand-written backward pass: DeltaFormer's read (`chunked_read`) with a
window, decays, position bias and sinks.

The residuals are the arguments, the output and one log-sum-exp per row; none has T×T numbers.
Source: see `causal_attention`.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax

from deltaformer_jax.ops.cache.caches import token_positions
from deltaformer_jax.ops.common import heads as H
from deltaformer_jax.ops.common import tiles
from deltaformer_jax.ops.common.chunked_read import read_backward, read_forward
from deltaformer_jax.ops.common.hand_written import hand_written, made
from deltaformer_jax.ops.common.reads.behind_window import seen_columns
from deltaformer_jax.ops.common.similarity import SelfAdjust, Softmax
from deltaformer_jax.ops.position_bias import PositionBias

_SOFTMAX = Softmax()


@dataclasses.dataclass(frozen=True)
class Plan:
    """The static arguments: scale of the scores, window, rows of a chunk, of each segment how many tokens stay visible
    behind the window, and the similarity."""

    scale: float
    window: int | None
    chunk: int
    initial: int = 0
    similarity: Softmax | SelfAdjust = _SOFTMAX


def layout(plan, query, key, value, log_decay, segment_ids, lasting, bias=None):
    """(arguments of `read_forward`, its `first`, its settings): heads first, padded to whole chunks."""
    heads, length = key.shape[2], -(-key.shape[1] // plan.chunk) * plan.chunk
    group = query.shape[2] // heads
    q = H.fold_queries(H.pad_time(query, length), heads)
    k, v = (H.heads_first(H.pad_time(x, length)) for x in (key, value))
    if log_decay is not None:
        log_decay = H.fold_queries(H.pad_time(log_decay, length), heads).reshape(*k.shape[:3], group)
    skips = plan.similarity == _SOFTMAX and log_decay is None and bias is None
    bounds, segments, seen = seen_columns(segment_ids, lasting, plan.window, length, plan.chunk, skips=skips)
    settings = dict(similarity=plan.similarity, scale=plan.scale, chunk=plan.chunk, window=plan.window, **seen)
    if bias is not None:
        rows = 1 if segment_ids is None else segment_ids.shape[0]
        positions = H.pad_time(token_positions(segment_ids, rows, key.shape[1]), length)[:, None]
        settings |= dict(bias=bias, positions=positions)
    return (q, k, v, segments, log_decay), bounds, settings


class Inputs(NamedTuple):
    """The arrays of a call, 0 at padding: query [B,T,H,K], key [B,T,G,K], value [B,T,G,V], log_decay [B,T,H] or None,
    sinks [H] or None, segment_ids [B,T] or None."""

    query: jax.Array
    key: jax.Array
    value: jax.Array
    log_decay: jax.Array | None
    sinks: jax.Array | None
    segment_ids: jax.Array | None


def attention_chunked(plan: Plan, lasting: jax.Array | None, bias: PositionBias | None, inputs: Inputs):
    """The output [B,T,H,V] in value's dtype. `lasting` bool [B,T]: the tokens that stay visible behind the window.
    `bias`: of the scores by position."""
    query, key, value, log_decay, sinks, segment_ids = inputs
    return with_sinks(*_without_sinks(plan, query, key, value, log_decay, segment_ids, lasting, bias), sinks)


def with_sinks(out, lse, sinks):
    """The output with sinks [H] or None, from the output without them [B,T,H,V] and its log-sum-exps [B,T,H]."""
    if sinks is None:
        return out
    # The sink only adds e^b to the normaliser, so the output is o · e^lse / (e^lse + e^b).
    share = jax.nn.sigmoid(lse - sinks.astype(lse.dtype)[None, None])
    return (out.astype(lse.dtype) * share[..., None]).astype(out.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _without_sinks(plan, query, key, value, log_decay, segment_ids, lasting, bias):
    """(output [B,T,H,V] in value's dtype, log-sum-exps [B,T,H] in the accumulation dtype)."""
    return _forward(plan, query, key, value, log_decay, segment_ids, lasting, bias)[0]


# _forward and _backward are jitted, so that JAX traces each once per shape and not at every call.
@functools.partial(jax.jit, static_argnums=0)
def _forward(plan, query, key, value, log_decay, segment_ids, lasting, bias):
    arrays, bounds, settings = layout(plan, query, key, value, log_decay, segment_ids, lasting, bias)
    out, lse = read_forward(*arrays, bounds, **settings)
    back = lambda x: H.unfold_queries(x, query.shape[2] // key.shape[2])[:, : key.shape[1]]
    out, lse = made((back(out).astype(value.dtype), back(lse)))
    return (out, lse), (query, key, value, log_decay, segment_ids, lasting, bias, out, lse)


@hand_written("chunked", "implementation='parallel' or 'recurrent'")
@functools.partial(jax.jit, static_argnums=0)
def _backward(plan, residuals, cotangents):
    query, key, value, log_decay, segment_ids, lasting, bias, out, lse = residuals
    arrays, bounds, settings = layout(plan, query, key, value, log_decay, segment_ids, lasting, bias)
    last, time, (heads, length) = tiles.last_chunks(bounds), key.shape[1], arrays[1].shape[1:3]
    group = query.shape[2] // heads
    fold = lambda x: H.fold_queries(H.pad_time(x, length), heads)
    dq, dk, dv, dg, dbias = read_backward(*arrays, last, *map(fold, (out, lse, *cotangents)), **settings)
    back = lambda x: H.heads_last(x)[:, :time]
    rows = lambda x: H.unfold_queries(x, group)[:, :time]
    if dg is not None:
        dg = rows(dg.reshape(*dg.shape[:2], length * group)).astype(log_decay.dtype)
    dq, dk, dv = rows(dq).astype(query.dtype), back(dk).astype(key.dtype), back(dv).astype(value.dtype)
    return dq, dk, dv, dg, None, None, dbias


_without_sinks.defvjp(_forward, _backward)
