"""The read of an associative memory, tile by tile, forward and backward:

    o_t = Σ_{i≤t} κ(q_t, k_i) u_i

With κ = softmax this is flash attention (Dao et al., arXiv 2205.14135). The other similarities have no normaliser.
The r query heads that share a key head are folded into rows, r per token: q is [B, h, T·r, K].

The backward pass, with P the weights, and D_i = dO_i·o_i − dlse_i for softmax, 0 otherwise:

    dU = Pᵀ dO,   dS_ij = κ'(s_ij) (dO_i·u_j − D_i),   dQ = scale · dS K,   dK = scale · dSᵀ Q

It takes five matrix products per pair of tiles. Memory: O(T (K+V)) per head. The decay that score_decay.py adds to the
scores needs no matrix product. A position bias (ops/position_bias.py) is computed for each tile, once forward and once
backward, where `jax.vjp` differentiates it. Columns that last behind a window are in tiles of their own
(reads/behind_window.py), which a chunk of rows visits beside its near chunks.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from deltaformer_jax.ops.common import tiles
from deltaformer_jax.ops.common.score_decay import add_decay, log_decay_gradient, score_decay


def visible_columns(i, j, rows_per_token, chunk, segments, window, lasting, diagonal):
    """Which columns of tile j the rows of tile i see: [B or 1, 1, C·r, C] bools, or None for all of them."""
    # The distance inside a tile does not depend on i or j, so XLA computes it once, outside the loops.
    column = jnp.arange(chunk, dtype=jnp.int32)
    ago = (jnp.repeat(column, rows_per_token)[:, None] - column[None, :])[None, None]
    visible = ago >= 0 if diagonal else None
    if window is not None:
        columns = None if lasting is None else tiles.take(lasting, j, chunk)[:, :, None, :]
        visible = tiles.both(visible, tiles.within(ago, window - (i - j) * chunk, columns))
    if segments is not None:
        row_segments = jnp.repeat(tiles.take(segments, i, chunk), rows_per_token, axis=2)
        visible = tiles.both(visible, tiles.same_segment(row_segments, tiles.take(segments, j, chunk)))
    return visible


def add_bias(scores, bias, positions, i, j, chunk):
    """scores [B, G, C·r, C] of row chunk i and column chunk j, plus the position bias, a function of all H heads."""
    batch, heads, rows, columns = scores.shape
    group, index = rows // chunk, jnp.arange(chunk, dtype=jnp.int32)
    distance = jnp.maximum(index[:, None] - index[None, :] + (i - j) * chunk, 0)[None]
    position = tiles.take(positions, i, chunk)[:, 0]
    by_head = jnp.swapaxes(scores.reshape(batch, heads, chunk, group, columns), 2, 3)
    added = bias(by_head.reshape(batch, heads * group, chunk, columns), distance, position)
    added = jnp.swapaxes(added.reshape(-1, heads, group, chunk, columns), 2, 3)
    return scores + added.reshape(-1, heads, rows, columns)


def backward_tile(similarity, scores, values, visible, lse, grad, row_dot, operand):
    """(P, dS) of one tile: the scores, decay included, of rows with their lse, dO = `grad` and D = `row_dot` (None
    unless softmax), and columns with u = `values`. dS is the cotangent of the scores."""
    weights = tiles.weights_again(similarity, scores, lse, visible)
    dots = tiles.dot(grad, values.mT, operand)
    if row_dot is not None:
        dots = dots - row_dot[..., None]
    return weights, tiles.keep(visible, similarity.slope(scores, weights) * dots)


def read_forward(
    q,
    k,
    u,
    segments,
    log_decay,
    first,
    *,
    similarity,
    scale,
    chunk,
    window=None,
    lasting=None,
    behind=None,
    bias=None,
    positions=None,
):
    """(o [B, h, T·r, V], lse [B, h, T·r]), both in the accumulation dtype; lse is the log-sum-exp of each row.

    q [B, h, T·r, K], k [B, h, T, K], u [B, h, T, V], segments [B, 1, T] or None, log_decay [B, h, T, r] or None, first
    [T/C] (`tiles.first_chunks`), lasting [B, 1, T] or None: the columns that stay visible behind the window. behind: a
    `Behind` of the lasting columns before the chunks of `first`, or None if `first` leaves none out; without a decay or
    a bias. bias: a PositionBias of the h·r query heads or None, and then positions [1 or B, 1, T].
    """
    batch, heads, length, width = u.shape
    group = q.shape[2] // length
    dtype = tiles.accumulation_dtype(k.dtype)
    operand = k.dtype if similarity.normalised else dtype
    decay = score_decay(log_decay, chunk)

    def one_chunk(carry, c):
        out, lse = carry
        rows, left = tiles.scale_rows(tiles.take(q, c, chunk * group), scale)

        def step(j, running, diagonal):
            scores = tiles.dot(rows, tiles.take(k, j, chunk).mT, k.dtype) * left
            if bias is not None:
                scores = add_bias(scores, bias, positions, c, j, chunk)
            scores = add_decay(scores, decay, c, j, chunk, diagonal)
            visible = visible_columns(c, j, group, chunk, segments, window, lasting, diagonal)
            return tiles.absorb(similarity, running, scores, visible, tiles.take(u, j, chunk), operand)

        def step_behind(m, running):
            scores = tiles.dot(rows, behind.take(k, m, chunk).mT, k.dtype) * left
            visible = behind.visible(c, m, chunk, group)
            return tiles.absorb(similarity, running, scores, visible, behind.take(u, m, chunk), operand)

        running = tiles.start_sum((batch, heads, chunk * group, width), dtype, u)
        if behind is not None:
            running = lax.fori_loop(behind.start[c], behind.stop[c], step_behind, running)
        running = lax.fori_loop(first[c], c, lambda j, running: step(j, running, False), running)
        running = step(c, running, True)
        read = running[2] * tiles.inverse_normaliser(similarity, running)[..., None]
        return (tiles.put(out, read, c), tiles.put(lse, tiles.log_normaliser(similarity, running), c)), None

    rows = (batch, heads, length * group)
    start = (tiles.zeros((*rows, width), dtype, u), tiles.zeros(rows, dtype, u))
    return lax.scan(one_chunk, start, jnp.arange(length // chunk, dtype=jnp.int32))[0]


def read_backward(
    q,
    k,
    u,
    segments,
    log_decay,
    last,
    out,
    lse,
    dout,
    dlse=None,
    *,
    similarity,
    scale,
    chunk,
    window=None,
    lasting=None,
    behind=None,
    bias=None,
    positions=None,
):
    """The gradients (dq, dk, du, dlog_decay, dbias) for the cotangents dout [B, h, T·r, V] and dlse [B, h, T·r] (None:
    0).

    All gradients are in the accumulation dtype. dlog_decay is [B, h, T, r] or None, dbias like `bias`. `last` is
    `tiles.last_chunks`. `out` is used for softmax only.
    """
    batch, heads, length, _ = k.shape
    group = q.shape[2] // length
    dtype = tiles.accumulation_dtype(k.dtype)
    operand = k.dtype if similarity.normalised else dtype
    decay = score_decay(log_decay, chunk)
    row_dot = None
    if similarity.normalised:
        row_dot = jnp.sum(dout.astype(dtype) * out.astype(dtype), axis=-1)
        row_dot = row_dot if dlse is None else row_dot - dlse

    def one_chunk(carry, j):
        dq, dk, du, all_column_sums, dbias = carry
        keys, values = tiles.take(k, j, chunk), tiles.take(u, j, chunk)

        def step(i, carry, diagonal):
            dq, dkeys, dvalues, column_sums, dbias = carry
            rows, grad = tiles.take(q, i, chunk * group), tiles.take(dout, i, chunk * group)
            visible = visible_columns(i, j, group, chunk, segments, window, lasting, diagonal)
            scores = tiles.dot(rows, keys.mT, k.dtype) * scale
            if bias is not None:
                biased = lambda scores, bias: add_bias(scores, bias, positions, i, j, chunk)
                scores, pull_back = jax.vjp(biased, scores, bias)
            scores = add_decay(scores, decay, i, j, chunk, diagonal)
            lses, dots = (tiles.take(x, i, chunk * group) for x in (lse, row_dot))
            weights, dscores = backward_tile(similarity, scores, values, visible, lses, grad, dots, operand)
            if decay is not None:
                by_token = dscores.reshape(batch, heads, chunk, group, chunk)
                column_sums = column_sums + jnp.swapaxes(jnp.sum(by_token, axis=2), 2, 3)
            if bias is not None:
                dscores, of_tile = pull_back(dscores)
                dbias = jax.tree.map(jnp.add, dbias, of_tile)
            dscores = dscores * scale
            dvalues = dvalues + tiles.dot(weights.mT, grad, operand)
            dkeys = dkeys + tiles.dot(dscores.mT, rows, operand)
            return tiles.add_to(dq, tiles.dot(dscores, keys, operand), i), dkeys, dvalues, column_sums, dbias

        column_sums = None if decay is None else tiles.zeros((batch, heads, chunk, group), dtype, u)
        carry = (dq, tiles.zeros(keys.shape, dtype, u), tiles.zeros(values.shape, dtype, u), column_sums, dbias)
        carry = step(j, carry, True)
        dq, *columns, dbias = lax.fori_loop(j + 1, last[j] + 1, lambda i, carry: step(i, carry, False), carry)
        whole = (dk, du, all_column_sums)
        return (dq, *(None if x is None else tiles.put(x, part, j) for x, part in zip(whole, columns)), dbias), None

    def rows_behind(carry, i):
        """(dq, dk, du) with what the rows of chunk i read behind the window."""
        rows, grad = tiles.take(q, i, chunk * group), tiles.take(dout, i, chunk * group)
        lses, dots = (tiles.take(x, i, chunk * group) for x in (lse, row_dot))

        def step(m, carry):
            drows, dk, du = carry
            keys, values = behind.take(k, m, chunk), behind.take(u, m, chunk)
            scores, visible = tiles.dot(rows, keys.mT, k.dtype) * scale, behind.visible(i, m, chunk, group)
            weights, dscores = backward_tile(similarity, scores, values, visible, lses, grad, dots, operand)
            dscores = dscores * scale
            dk = behind.add_to(dk, tiles.dot(dscores.mT, rows, operand), m)
            du = behind.add_to(du, tiles.dot(weights.mT, grad, operand), m)
            return drows + tiles.dot(dscores, keys, operand), dk, du

        dq, dk, du = carry
        drows, dk, du = lax.fori_loop(
            behind.start[i], behind.stop[i], step, (tiles.zeros(rows.shape, dtype, u), dk, du)
        )
        return (tiles.add_to(dq, drows, i), dk, du), None

    column_sums = None if decay is None else tiles.zeros(log_decay.shape, dtype, u)
    dbias = jax.tree.map(lambda x: tiles.zeros(x.shape, x.dtype, u), bias)
    start = (*(tiles.zeros(x.shape, dtype, u) for x in (q, k, u)), column_sums, dbias)
    chunks = jnp.arange(length // chunk, dtype=jnp.int32)
    dq, dk, du, column_sums, dbias = lax.scan(one_chunk, start, chunks)[0]
    if behind is not None:
        dq, dk, du = lax.scan(rows_behind, (dq, dk, du), chunks)[0]
    if decay is None:
        return dq, dk, du, None, dbias
    # The row sums of dD = dS need no accumulation: a softmax row of dS sums to dlse_i, the cotangent of the row's
    # log-sum-exp.
    row_sums = jnp.zeros_like(column_sums) if dlse is None else dlse.reshape(column_sums.shape)
    return dq, dk, du, log_decay_gradient(row_sums, column_sums), dbias
