"""The chunked form of DeltaFormer, with a hand-written backward pass. It runs and trains on every platform.

The residuals are query, write query, key, value, u, the output (s instead of the output in the one-pass case, see
chunked_tied.py), alpha, beta, the segment ids and up to three numbers per row. None has T×T or T×C numbers. u is kept
and used in float32 even for narrower inputs, because the backward pass of softmax needs α v − u. For small β this
difference would be lost in the rounding of u.

With F = 2 T² K · B H floating-point operations (one causal pass of two matrix products), the forward pass takes

    w = k, H/G = r      (1 + 1/r) F
    w = q, one pass     1 F
    otherwise           2 F

The backward pass takes 2.5 times as much. Memory: O(T (K+V)) per head. In packed rows, a pair of chunks is skipped if
no row of the batch has a document in both.
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
from deltaformer_jax.ops.common.reads.self_adjusted import adjusted_backward, adjusted_forward
from deltaformer_jax.ops.common.similarity import SelfAdjust, Similarity, with_arrays, without_gradient
from deltaformer_jax.ops.deltaformer.chunked_tied import tied_backward, tied_forward
from deltaformer_jax.ops.deltaformer.chunked_write import write_backward, write_forward
from deltaformer_jax.ops.position_bias import Biases


@dataclasses.dataclass(frozen=True)
class Plan:
    """The static arguments of a call. `read_similarity` is None if only u is needed. `tied` says that one pass does
    both the write and the read (chunked_tied.py). `chunk` is the number of rows of a chunk. `window` and `initial` are
    those of `delta_attention`."""

    write_similarity: Similarity
    write_scale: float
    read_similarity: Similarity | None
    read_scale: float | None
    tied: bool
    chunk: int
    window: int | None = None
    initial: int = 0


class Inputs(NamedTuple):
    """The arrays of a call, 0 at padding: query [B,T,H,K] (None if only u is needed), write_query [B,T,Hu,K] (None: it
    is the key, or the query if the plan is tied), key [B,T,G,K], value [B,T,G,V], alpha and beta [B,T,Hu] or None,
    segment_ids [B,T] or None."""

    query: jax.Array | None
    write_query: jax.Array | None
    key: jax.Array
    value: jax.Array
    alpha: jax.Array | None
    beta: jax.Array | None
    segment_ids: jax.Array | None


def delta_chunked(plan: Plan, held: tuple[tuple, tuple], lasting: jax.Array | None, biases: Biases, inputs: Inputs):
    """(output [B,T,H,V] or None, u [B,T,Hu,V]), both in value's dtype. `held` is described in `whole_plan`; `lasting`
    bool [B,T]: the tokens that stay visible behind the window; `biases`: of the scores, none if the plan is tied."""
    return _differentiable(plan, without_gradient(held) if any(held) else held, inputs, lasting, biases)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _differentiable(plan, held, inputs, lasting, biases):
    return _forward(plan, held, inputs, lasting, biases)[0]


def whole_plan(plan: Plan, held: tuple[tuple, tuple]) -> Plan:
    """`plan` with the arrays put back into its similarities. `held` is (arrays of the write similarity, arrays of the
    read similarity), as `without_arrays` took them out."""
    return dataclasses.replace(
        plan,
        write_similarity=with_arrays(plan.write_similarity, held[0]),
        read_similarity=with_arrays(plan.read_similarity, held[1]),
    )


def _layout(plan, write_query, key, value, alpha, beta, segment_ids, lasting, biases):
    """(write heads, padded length, the arguments of `write_forward`, and of these that of all passes by name): heads
    first, padded to whole chunks."""
    length = -(-key.shape[1] // plan.chunk) * plan.chunk
    heads = key.shape[2] if write_query is None else write_query.shape[2]
    first = lambda x: H.heads_first(H.pad_time(x, length))
    key, value = first(H.repeat_heads(key, heads)), first(H.repeat_heads(value, heads))
    write_query = key if write_query is None else first(write_query)
    skips = not isinstance(plan.read_similarity, SelfAdjust) and not biases.given
    bounds, segments, seen = seen_columns(segment_ids, lasting, plan.window, length, plan.chunk, skips=skips)
    how = dict(chunk=plan.chunk, window=plan.window, **seen)
    return heads, length, write_query, key, value, first(alpha), first(beta), segments, bounds, how


def _settings(plan, how, biases, segment_ids, time, length):
    """The keyword arguments of the write and of the read: `how` with the similarity and the scale of each, and where
    there is a bias, it and the positions of the `time` tokens, padded to `length`."""
    write = dict(similarity=plan.write_similarity, scale=plan.write_scale, **how)
    read = dict(similarity=plan.read_similarity, scale=plan.read_scale, **how)
    for settings, bias in zip((write, read), biases):
        if bias is not None:
            places = token_positions(segment_ids, 1 if segment_ids is None else segment_ids.shape[0], time)
            settings |= dict(bias=bias, positions=H.pad_time(places, length)[:, None])
    return write, read


# _forward and _backward are jitted, so that JAX traces each once per shape, and not again for another platform of the
# program or for the next layer.
@functools.partial(jax.jit, static_argnums=0)
def _forward(plan, held, inputs, lasting, biases):
    query, write_query, key, value, alpha, beta, segment_ids = inputs
    plan = whole_plan(plan, held)
    time, dtype = key.shape[1], value.dtype
    if plan.tied:
        write_query = query
    given = (write_query, key, value, alpha, beta, segment_ids, lasting, biases)
    heads, length, w, k, v, a, b, segments, bounds, how = _layout(plan, *given)
    back = lambda x: None if x is None else H.heads_last(x)[:, :time]
    if plan.tied:
        out, u, summary, *rows = tied_forward(w, k, v, a, b, segments, bounds, scale=plan.write_scale, **how)
        out, u, summary, rows = made((back(out).astype(dtype), back(u), back(summary).astype(dtype), rows))
        return (out, u.astype(dtype)), (held, inputs, lasting, biases, u, summary, rows)
    write, read = _settings(plan, how, biases, segment_ids, time, length)
    u, lse_write = write_forward(w, k, v, a, b, segments, bounds, **write)
    if plan.read_similarity is None:
        u, lse_write = made((back(u), lse_write))
        return (None, u.astype(dtype)), (held, inputs, lasting, biases, u, None, (lse_write,))
    q = H.fold_queries(H.pad_time(query, length), heads)
    self_adjusted = isinstance(plan.read_similarity, SelfAdjust)
    out, of_rows = (adjusted_forward if self_adjusted else read_forward)(q, k, u, segments, None, bounds, **read)
    out = H.unfold_queries(out, query.shape[2] // heads)[:, :time].astype(dtype)
    out, u, lse_write, of_rows = made((out, back(u), lse_write, of_rows))
    # Only the backward pass of softmax needs the output.
    kept = out if self_adjusted or plan.read_similarity.normalised else None
    return (out, u.astype(dtype)), (held, inputs, lasting, biases, u, kept, (lse_write, of_rows))


@hand_written("chunked", "implementation='parallel' or 'recurrent'")
@functools.partial(jax.jit, static_argnums=0)
def _backward(plan, residuals, cotangents):
    held, inputs, lasting, biases, u, kept, rows = residuals
    query, write_query, key, value, alpha, beta, segment_ids = inputs
    plan = whole_plan(plan, held)
    dout, du = cotangents
    time, kv_heads = key.shape[1], key.shape[2]
    if plan.tied:
        write_query = query
    given = (write_query, key, value, alpha, beta, segment_ids, lasting, biases)
    heads, length, w, k, v, a, b, segments, bounds, how = _layout(plan, *given)
    first = lambda x: H.heads_first(H.pad_time(x, length))
    back = lambda x: H.heads_last(x)[:, :time]
    last = tiles.last_chunks(bounds)
    u = first(u)
    du = first(du).astype(u.dtype)
    dq = of_write = of_read = None
    if plan.tied:
        kept = (u, first(kept), *rows)
        dw, dk, dv, dalpha, dbeta = tied_backward(
            w, k, v, a, b, segments, last, *kept, first(dout), du, scale=plan.write_scale, **how
        )
    else:
        dk_read, (write, read) = 0, _settings(plan, how, biases, segment_ids, time, length)
        if plan.read_similarity is not None:
            fold = lambda x: None if x is None else H.fold_queries(H.pad_time(x, length), heads)
            rest = (fold(kept), rows[1], fold(dout))
            given = (fold(query), k, u, segments, None, last, *rest)
            if isinstance(plan.read_similarity, SelfAdjust):
                dq, dk_read, du_read, _ = adjusted_backward(*given, **read)
            else:
                dq, dk_read, du_read, _, of_read = read_backward(*given, **read)
            dq = H.unfold_queries(dq, query.shape[2] // heads)[:, :time].astype(query.dtype)
            du = du + du_read
        given = (w, k, v, a, b, segments, last, u, rows[0], du)
        dw, dk, dv, dalpha, dbeta, of_write = write_backward(*given, **write)
        dk = dk + dk_read
    if plan.tied:
        dq, dw = back(dw).astype(query.dtype), None
    elif write_query is None:
        dk, dw = dk + dw, None
    else:
        dw = back(dw).astype(write_query.dtype)
    gradients = Inputs(
        query=dq,
        write_query=dw,
        key=H.sum_heads(back(dk), kv_heads).astype(key.dtype),
        value=H.sum_heads(back(dv), kv_heads).astype(value.dtype),
        alpha=None if alpha is None else back(dalpha).astype(alpha.dtype),
        beta=None if beta is None else back(dbeta).astype(beta.dtype),
        segment_ids=None,
    )
    # No gradient for `held`: if it were differentiated, without_gradient would have raised.
    return None, gradients, None, Biases(of_write, of_read)


_differentiable.defvjp(_forward, _backward)
