"""The read with self-adjusted softmax, tile by tile, forward and backward:

    o_i = Σ_{j≤i} w_ij u_j,      w = p a,      p = softmax(s),      a = (s − m) / (M − m)        (basic: a = s)

with m = min(min_j s_ij, 0) and M = max(max_j s_ij, 0) of the row, and a = 1 where M − m is 0. As in flash attention, a
row keeps sums over the tiles that it has seen, with μ its running maximum, and m and M beside them:

    A = Σ e^{s−μ} u,      B = Σ e^{s−μ} s u,      l = Σ e^{s−μ},      o = (B − m A) / (l (M − m))        (basic: B / l)

|s| ≤ M − m, so that B − m A loses no digits beside l (M − m). Backward, with D = 1 / (M − m) (0 where M − m is 0),
G_ij = dO_i·u_j, R_i = dO_i·o_i and P_i = dO_i·A_i/l_i:

    ds_ij = p_ij (G_ij a_ij − R_i + G_ij D_i) + [j is the argmin] (R_i − P_i) D_i − [j is the argmax] R_i D_i
    basic:  ds_ij = p_ij (G_ij s_ij − R_i + G_ij)

The places of the extremes are found in the forward pass and kept. The backward pass computes the scores again, with
other roundings, and could not find them by their value. For A/l, which P needs, one more output is kept.

Cost: 1.5 times that of a softmax read forward, as much backward. Memory: O(T (K+V)) per head.
Source: "Self-Adjust Softmax", arXiv 2502.18277; this streaming form and its gradients are this project's.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from deltaformer_jax.ops.common import tiles
from deltaformer_jax.ops.common.chunked_read import visible_columns
from deltaformer_jax.ops.common.score_decay import add_decay, log_decay_gradient, score_decay
from deltaformer_jax.ops.common.similarity import Softmax

_SOFTMAX = Softmax()


class Rows(NamedTuple):
    """What the backward pass needs of the rows: log-sum-exp, m, M, the columns of m and M (−1: it is no score), all
    [B, h, T·r], and A/l [B, h, T·r, V] in the dtype of keys. None: not needed."""

    lse: jax.Array
    low: jax.Array | None
    high: jax.Array | None
    low_at: jax.Array | None
    high_at: jax.Array | None
    soft: jax.Array | None


def adjusted_forward(q, k, u, segments, log_decay, first, *, similarity, scale, chunk, window=None, lasting=None):
    """(o [B, h, T·r, V] in the accumulation dtype, Rows). Arguments as `chunked_read.read_forward`."""
    batch, heads, length, width = u.shape
    group = q.shape[2] // length
    dtype = tiles.accumulation_dtype(k.dtype)
    decay = score_decay(log_decay, chunk)

    def one_chunk(carry, c):
        rows, left = tiles.scale_rows(tiles.take(q, c, chunk * group), scale)

        def step(j, running, diagonal):
            scores = tiles.dot(rows, tiles.take(k, j, chunk).mT, k.dtype) * left
            scores = add_decay(scores, decay, c, j, chunk, diagonal)
            visible = visible_columns(c, j, group, chunk, segments, window, lasting, diagonal)
            values, (sums, adjusted, low, high) = tiles.take(u, j, chunk), running
            weights, highest, shrink = tiles.new_weights(sums, scores, visible)
            total, weighted = (x * y for x, y in zip(sums[1:], (shrink, shrink[..., None])))
            sums = highest, total + jnp.sum(weights, axis=-1), weighted + tiles.dot(weights, values, k.dtype)
            adjusted = adjusted * shrink[..., None] + tiles.dot(weights * scores, values, k.dtype)
            if not similarity.normalised:
                return sums, adjusted, low, high
            return sums, adjusted, *(_extreme(*now, scores, visible, j * chunk) for now in ((low, -1), (high, 1)))

        shape = (batch, heads, chunk * group)
        nothing = (tiles.zeros(shape, dtype, u), jnp.full_like(u, -1, jnp.int32, shape=shape))
        running = (tiles.start_sum((*shape, width), dtype, u), tiles.zeros((*shape, width), dtype, u), nothing, nothing)
        running = lax.fori_loop(first[c], c, lambda j, running: step(j, running, False), running)
        sums, adjusted, (low, low_at), (high, high_at) = step(c, running, True)
        inverse = tiles.inverse_normaliser(_SOFTMAX, sums)[..., None]
        soft, read = sums[2] * inverse, adjusted * inverse
        if similarity.normalised:
            over_span = _over_span(low, high)[..., None]
            read = jnp.where(over_span > 0, (read - low[..., None] * soft) * over_span, soft)
        found = (read, tiles.log_normaliser(_SOFTMAX, sums), low, high, low_at, high_at, soft)
        return tuple(tiles.put(x, part, c) for x, part in zip(carry, found)), None

    rows = (batch, heads, length * group)
    numbers, places = tiles.zeros(rows, dtype, u), tiles.zeros(rows, jnp.int32, u)
    wide = tiles.zeros((*rows, width), dtype, u)
    start = (wide, numbers, numbers, numbers, places, places, wide.astype(k.dtype))
    out, lse, *extremes, soft = lax.scan(one_chunk, start, jnp.arange(length // chunk, dtype=jnp.int32))[0]
    if similarity.normalised:
        return out, Rows(lse, *extremes, soft)
    return out, Rows(lse, None, None, None, None, None if decay is None else soft)


def _extreme(running, sign, scores, visible, offset):
    """(M, its column) after one more tile of columns from `offset` on; (m, its column) for `sign` −1."""
    best, at = running
    beyond = sign * scores > 0
    beyond = jnp.where(beyond if visible is None else beyond & visible, sign * scores, 0)
    place = jnp.argmax(beyond, axis=-1).astype(jnp.int32)
    found = jnp.max(beyond, axis=-1)
    further = found > sign * best
    return jnp.where(further, sign * found, best), jnp.where(further, offset + place, at)


def _over_span(low, high):
    """1 / (M − m); 0 where M − m is 0 or not a normal number."""
    span = high - low
    wide = span >= jnp.finfo(span.dtype).tiny
    return jnp.where(wide, 1 / jnp.where(wide, span, 1), 0)


def adjusted_backward(
    q, k, u, segments, log_decay, last, out, rows: Rows, dout, *, similarity, scale, chunk, window=None, lasting=None
):
    """The gradients (dq, dk, du, dlog_decay) for the cotangent dout [B, h, T·r, V], as `chunked_read.read_backward`."""
    batch, heads, length, _ = k.shape
    group = q.shape[2] // length
    dtype = tiles.accumulation_dtype(k.dtype)
    decay = score_decay(log_decay, chunk)
    dot_with = lambda x: None if x is None else jnp.sum(dout.astype(dtype) * x.astype(dtype), axis=-1)
    of_out, of_soft = dot_with(out), dot_with(rows.soft)
    over_span = at_low = at_high = None
    if similarity.normalised:
        over_span = _over_span(rows.low, rows.high)
        at_low, at_high = (of_out - of_soft) * over_span, of_out * over_span

    def weights_and_slopes(i, j, scores, visible, dots):
        """(w, ds) of one tile."""
        take = lambda x: tiles.take(x, i, chunk * group)[..., None]
        weights = tiles.weights_again(_SOFTMAX, scores, take(rows.lse)[..., 0], visible)
        if not similarity.normalised:
            scores = tiles.keep(visible, scores)
            return weights * scores, weights * (dots * (scores + 1) - take(of_out))
        inverse = take(over_span)
        adjust = tiles.keep(visible, jnp.where(inverse > 0, (scores - take(rows.low)) * inverse, 1))
        slopes = tiles.keep(visible, weights * (dots * (adjust + inverse) - take(of_out)))
        column = (j * chunk + jnp.arange(chunk, dtype=jnp.int32))[None, None, None]
        slopes = slopes + jnp.where(column == take(rows.low_at), take(at_low), 0)
        return weights * adjust, slopes - jnp.where(column == take(rows.high_at), take(at_high), 0)

    def one_chunk(carry, j):
        dq, dk, du, all_column_sums = carry
        keys, values = tiles.take(k, j, chunk), tiles.take(u, j, chunk)

        def step(i, carry, diagonal):
            dq, dkeys, dvalues, column_sums = carry
            queries, grad = tiles.take(q, i, chunk * group), tiles.take(dout, i, chunk * group)
            visible = visible_columns(i, j, group, chunk, segments, window, lasting, diagonal)
            scores = add_decay(tiles.dot(queries, keys.mT, k.dtype) * scale, decay, i, j, chunk, diagonal)
            dots = tiles.dot(grad, values.mT, k.dtype)
            weights, dscores = weights_and_slopes(i, j, scores, visible, dots)
            if decay is not None:
                by_token = dscores.reshape(batch, heads, chunk, group, chunk)
                column_sums = column_sums + jnp.swapaxes(jnp.sum(by_token, axis=2), 2, 3)
            dscores = dscores * scale
            dvalues = dvalues + tiles.dot(weights.mT, grad, k.dtype)
            dkeys = dkeys + tiles.dot(dscores.mT, queries, k.dtype)
            return tiles.add_to(dq, tiles.dot(dscores, keys, k.dtype), i), dkeys, dvalues, column_sums

        column_sums = None if decay is None else tiles.zeros((batch, heads, chunk, group), dtype, u)
        carry = (dq, tiles.zeros(keys.shape, dtype, u), tiles.zeros(values.shape, dtype, u), column_sums)
        carry = step(j, carry, True)
        dq, *columns = lax.fori_loop(j + 1, last[j] + 1, lambda i, carry: step(i, carry, False), carry)
        whole = (dk, du, all_column_sums)
        return (dq, *(None if x is None else tiles.put(x, part, j) for x, part in zip(whole, columns))), None

    column_sums = None if decay is None else tiles.zeros(log_decay.shape, dtype, u)
    start = (*(tiles.zeros(x.shape, dtype, u) for x in (q, k, u)), column_sums)
    dq, dk, du, column_sums = lax.scan(one_chunk, start, jnp.arange(length // chunk, dtype=jnp.int32))[0]
    if decay is None:
        return dq, dk, du, None
    row_sums = of_soft  # of dS: Σ_j p_ij G_ij D_i and what the extremes get; of basic weights Σ_j p_ij G_ij
    if similarity.normalised:
        row_sums = of_soft * over_span
        row_sums = row_sums + jnp.where(rows.low_at >= 0, at_low, 0) - jnp.where(rows.high_at >= 0, at_high, 0)
    return dq, dk, du, log_decay_gradient(row_sums.reshape(column_sums.shape), column_sums)
