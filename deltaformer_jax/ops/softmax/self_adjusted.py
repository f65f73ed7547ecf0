"""The chunked form of attention with self-adjusted softmax, with a hand-written backward pass.

The residuals are the arguments, the output, and what `reads.self_adjusted.Rows` lists.
Source: see `causal_attention`.
"""

from __future__ import annotations

import functools

import jax

from deltaformer_jax.ops.common import heads as H
from deltaformer_jax.ops.common import tiles
from deltaformer_jax.ops.common.hand_written import hand_written, made
from deltaformer_jax.ops.common.reads.self_adjusted import adjusted_backward, adjusted_forward
from deltaformer_jax.ops.softmax.chunked import Inputs, Plan, layout


def self_adjusted_chunked(plan: Plan, lasting: jax.Array | None, inputs: Inputs):
    """The output [B,T,H,V] in value's dtype; arguments as of `attention_chunked`, without sinks."""
    query, key, value, log_decay, _, segment_ids = inputs
    return _attend(plan, query, key, value, log_decay, segment_ids, lasting)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan, query, key, value, log_decay, segment_ids, lasting):
    return _forward(plan, query, key, value, log_decay, segment_ids, lasting)[0]


@functools.partial(jax.jit, static_argnums=0)
def _forward(plan, query, key, value, log_decay, segment_ids, lasting):
    arrays, bounds, settings = layout(plan, query, key, value, log_decay, segment_ids, lasting)
    out, rows = adjusted_forward(*arrays, bounds, **settings)
    out = H.unfold_queries(out, query.shape[2] // key.shape[2])[:, : key.shape[1]].astype(value.dtype)
    out, rows = made((out, rows))
    return out, (query, key, value, log_decay, segment_ids, lasting, out, rows)


@hand_written("chunked", "implementation='parallel' or 'recurrent'")
@functools.partial(jax.jit, static_argnums=0)
def _backward(plan, residuals, cotangent):
    query, key, value, log_decay, segment_ids, lasting, out, of_rows = residuals
    arrays, bounds, settings = layout(plan, query, key, value, log_decay, segment_ids, lasting)
    last, time, (heads, length) = tiles.last_chunks(bounds), key.shape[1], arrays[1].shape[1:3]
    group = query.shape[2] // heads
    fold = lambda x: H.fold_queries(H.pad_time(x, length), heads)
    dq, dk, dv, dg = adjusted_backward(*arrays, last, fold(out), of_rows, fold(cotangent), **settings)
    back = lambda x: H.heads_last(x)[:, :time]
    rows = lambda x: H.unfold_queries(x, group)[:, :time]
    if dg is not None:
        dg = rows(dg.reshape(*dg.shape[:2], length * group)).astype(log_decay.dtype)
    return rows(dq).astype(query.dtype), back(dk).astype(key.dtype), back(dv).astype(value.dtype), dg, None, None


_attend.defvjp(_forward, _backward)
