"""The write of DeltaFormer, chunk by chunk, forward and backward:

    u_t = α_t v_t − β_t Σ_{i<t} κ(w_t, k_i) u_i,        that is   (I + diag(β) A) U = diag(α) V

The forward pass takes the chunks in order. For each, it sums over the earlier chunks as flash attention does, and then
solves the chunk's own triangular system. The backward pass takes the chunks of columns from the last to the first. With
M = I + diag(β) A and G = M⁻ᵀ dU, it computes

    G_j  = dU_j − Σ_{i>j} A_ij β_i G_i             a transposed solve inside the chunk
    dS_ij = κ'(s_ij) (−β_i G_i·u_j − D_i),         D_i = −G_i·(α_i v_i − u_i) for softmax, 0 otherwise
    dV = α G,   dα_i = v_i·G_i,   dβ_i = −Σ_j A_ij G_i·u_j,   dW = scale · dS K,   dK = scale · dSᵀ W

It takes five matrix products per pair of tiles, and keeps no array of T×C or T×T numbers. D needs no pass over the keys
of its own, because β_i Σ_j A_ij u_j = α_i v_i − u_i. Work per head: T² (K + V)/2 multiply-adds forward, 2.5 times as
many backward. Memory per head: O(T (K+V)). A position bias (ops/position_bias.py) is computed for each tile, once
forward and once backward, where `jax.vjp` differentiates it.

Columns that last behind a window are in tiles of their own (reads/behind_window.py). Forward, a chunk of rows visits
them before its near chunks. Backward, G of a chunk is known when its turn comes, and goes at once to all columns that
last behind its rows' windows; their own turn comes later, and begins with what they were given.

Source: Xu et al., DeltaFormer (NeurIPS 2025), eq. 8 and section 3.4. The backward pass is derived here.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from deltaformer_jax.ops.common import tiles
from deltaformer_jax.ops.common.chunked_read import add_bias
from deltaformer_jax.ops.common.triangular import solve_unit_lower, solve_unit_lower_transposed


def times(gate, x):
    """gate ⊙ x in x's dtype, with one gate per row: gate [B, h, T], x [B, h, T] or [B, h, T, V]. None means 1."""
    if gate is None:
        return x
    gate = gate.astype(x.dtype)
    return gate[..., None] * x if x.ndim == 4 else gate * x


def product_dtype(similarity, dtype):
    """The dtype of the operands of products with the weights. Softmax rows are convex combinations, so the inputs' own
    dtype is precise enough. Rows of the other similarities may grow, so these need the accumulation dtype."""
    return dtype if similarity.normalised else tiles.accumulation_dtype(dtype)


def solve_chunk(similarity, running, scores, visible, target, beta):
    """(u [B, h, C, V], lse [B, h, C]) of one chunk, from the running sums over all earlier chunks.

    scores [B, h, C, C] are those of the chunk's own keys, `visible` is its strict mask, target = α v, beta may be None.
    """
    weights, running = tiles.absorb_weights(similarity, running, scores, visible)
    # One factor per row: β divided by the softmax normaliser.
    factor = times(beta, tiles.inverse_normaliser(similarity, running))[..., None]
    solved = solve_unit_lower(factor * weights, target - factor * running[2])
    return solved, tiles.log_normaliser(similarity, running)


def backward_tile(similarity, scale, rows, keys, values, visible, lse, grad, beta, row_dot):
    """(A, G Uᵀ, dS) of one tile: rows w [B, h, R, K] with their lse, G = `grad`, beta and D = `row_dot` (read for
    softmax only), columns keys [B, h, C, K] and values u [B, h, C, V]. dS is the cotangent of the unscaled scores."""
    scores = tiles.dot(rows, keys.mT, keys.dtype) * scale
    operand = product_dtype(similarity, keys.dtype)
    weights, products, dscores = backward_scores(similarity, scores, values, visible, lse, grad, beta, row_dot, operand)
    return weights, products, dscores * scale


def backward_scores(similarity, scores, values, visible, lse, grad, beta, row_dot, operand):
    """`backward_tile` from the scores of the tile, with scale and bias: its third result is their cotangent."""
    weights = tiles.weights_again(similarity, scores, lse, visible)
    products = tiles.dot(grad, values.mT, operand)
    dots = -times(beta, products)
    if similarity.normalised:
        dots = dots - row_dot[..., None]
    return weights, products, tiles.keep(visible, similarity.slope(scores, weights) * dots)


def write_forward(
    w,
    k,
    v,
    alpha,
    beta,
    segments,
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
    """w, k [B, h, T, K], v [B, h, T, V], alpha, beta [B, h, T] or None, segments [B, 1, T] or None, first [T/C]
    (`tiles.first_chunks`), lasting [B, 1, T] or None (the columns that stay visible behind the window), behind (a
    `Behind` of those of them that lie before the chunks of `first`; without a bias) or None if `first` leaves none out,
    bias: a PositionBias of the h heads or None, and then positions [1 or B, 1, T] -> u [B, h, T, V], lse [B, h, T] (the
    log-sum-exp of each row).

    u and lse are in the accumulation dtype for all inputs, because errors from rounding u to bfloat16 accumulate along
    the sequence.
    """
    batch, heads, length, width = v.shape
    dtype = tiles.accumulation_dtype(k.dtype)
    operand = product_dtype(similarity, k.dtype)
    strict = tiles.strictly_below(chunk)

    def one_chunk(carry, c):
        u, lse = carry
        rows, left = tiles.scale_rows(tiles.take(w, c, chunk), scale)
        row_segments = tiles.take(segments, c, chunk)

        def scores(j):
            plain = plain_scores(tiles.take(k, j, chunk))
            return plain if bias is None else add_bias(plain, bias, positions, c, j, chunk)

        def plain_scores(keys):
            return tiles.dot(rows, keys.mT, k.dtype) * left

        def earlier(j, running):
            visible = tiles.same_segment(row_segments, tiles.take(segments, j, chunk))
            visible = tiles.selected(visible, c, j, chunk, window, lasting)
            return tiles.absorb(similarity, running, scores(j), visible, tiles.take(u, j, chunk), operand)

        def earlier_behind(m, running):
            keys, values = behind.take(k, m, chunk), behind.take(u, m, chunk)
            return tiles.absorb(similarity, running, plain_scores(keys), behind.visible(c, m, chunk), values, operand)

        running = tiles.start_sum((batch, heads, chunk, width), dtype, v)
        if behind is not None:
            running = lax.fori_loop(behind.start[c], behind.stop[c], earlier_behind, running)
        running = lax.fori_loop(first[c], c, earlier, running)
        visible = tiles.both(strict, tiles.same_segment(row_segments, row_segments))
        visible = tiles.selected(visible, c, c, chunk, window, lasting)
        target = times(tiles.take(alpha, c, chunk), tiles.take(v, c, chunk).astype(dtype))
        solved, normaliser = solve_chunk(similarity, running, scores(c), visible, target, tiles.take(beta, c, chunk))
        return (tiles.put(u, solved, c), tiles.put(lse, normaliser, c)), None

    start = (tiles.zeros(v.shape, dtype, v), tiles.zeros(v.shape[:3], dtype, v))
    return lax.scan(one_chunk, start, jnp.arange(length // chunk, dtype=jnp.int32))[0]


def write_backward(
    w,
    k,
    v,
    alpha,
    beta,
    segments,
    last,
    u,
    lse,
    du,
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
    """The gradients (dw, dk, dv, dalpha, dbeta, dbias) for the cotangent du [B, h, T, V], all in the accumulation
    dtype.

    dalpha and dbeta are computed even if alpha and beta are None; dbias is like `bias`.
    """
    length = k.shape[2]
    dtype = tiles.accumulation_dtype(k.dtype)
    operand = product_dtype(similarity, k.dtype)
    strict = tiles.strictly_below(chunk)

    def scored(i, j, keys):
        """(scores, their pull-back to (plain scores, bias) or None) of the rows of chunk i and the columns of j."""
        plain = tiles.dot(tiles.take(w, i, chunk), keys.mT, k.dtype) * scale
        if bias is None:
            return plain, None
        return jax.vjp(lambda plain, bias: add_bias(plain, bias, positions, i, j, chunk), plain, bias)

    def tile(i, scored, values, visible, grad, dbias):
        """(A, G Uᵀ, dS as `backward_tile` has it, dbias with the tile's part) for the rows of chunk i, from what
        `scored` returns; `grad` is the rows' G."""
        scores, pull_back = scored
        row_dot = None
        if similarity.normalised:
            row_dot = -jnp.sum(grad * (_written(i) - tiles.take(u, i, chunk)), axis=-1)
        lses, gate = (tiles.take(x, i, chunk) for x in (lse, beta))
        given = (values, visible, lses, grad, gate, row_dot, operand)
        weights, products, dscores = backward_scores(similarity, scores, *given)
        if pull_back is not None:
            dscores, of_tile = pull_back(dscores)
            dbias = jax.tree.map(jnp.add, dbias, of_tile)
        return weights, products, dscores * scale, dbias

    def _written(i):
        return times(tiles.take(alpha, i, chunk), tiles.take(v, i, chunk).astype(dtype))

    def one_chunk(carry, j):
        g, dw, dk, dbeta, dbias, pending = carry
        keys, values = tiles.take(k, j, chunk), tiles.take(u, j, chunk)
        column_segments = tiles.take(segments, j, chunk)

        def later(i, inner):
            dw, dbeta, rest, dkeys, dbias = inner
            grad = tiles.take(g, i, chunk)
            visible = tiles.same_segment(tiles.take(segments, i, chunk), column_segments)
            visible = tiles.selected(visible, i, j, chunk, window, lasting)
            weights, products, dscores, dbias = tile(i, scored(i, j, keys), values, visible, grad, dbias)
            rest = rest - tiles.dot(weights.mT, times(tiles.take(beta, i, chunk), grad), operand)
            dkeys = dkeys + tiles.dot(dscores.mT, tiles.take(w, i, chunk), operand)
            dw = tiles.add_to(dw, tiles.dot(dscores, keys, operand), i)
            dbeta = tiles.add_to(dbeta, -jnp.sum(weights * products, axis=-1), i)
            return dw, dbeta, rest, dkeys, dbias

        rest, dkeys = tiles.take(du, j, chunk).astype(dtype), tiles.zeros(keys.shape, dtype, v)
        if behind is not None:
            rest, dkeys = tiles.take(pending, j, chunk), tiles.take(dk, j, chunk)
        start = (dw, dbeta, rest, dkeys, dbias)
        dw, dbeta, rest, dkeys, dbias = lax.fori_loop(j + 1, last[j] + 1, later, start)

        visible = tiles.both(strict, tiles.same_segment(column_segments, column_segments))
        visible = tiles.selected(visible, j, j, chunk, window, lasting)
        own = scored(j, j, keys)
        weights = tiles.weights_again(similarity, own[0], tiles.take(lse, j, chunk), visible)
        grad = solve_unit_lower_transposed(times(tiles.take(beta, j, chunk), weights), rest)
        weights, products, dscores, dbias = tile(j, own, values, visible, grad, dbias)
        dkeys = dkeys + tiles.dot(dscores.mT, tiles.take(w, j, chunk), operand)
        dw = tiles.add_to(dw, tiles.dot(dscores, keys, operand), j)
        dbeta = tiles.add_to(dbeta, -jnp.sum(weights * products, axis=-1), j)
        dk = tiles.put(dk, dkeys, j)

        def earlier_behind(m, inner):
            dw, dk, dbeta, pending = inner
            keys, visible = behind.take(k, m, chunk), behind.visible(j, m, chunk)
            weights, products, dscores, _ = tile(
                j, scored(j, None, keys), behind.take(u, m, chunk), visible, grad, None
            )
            written = times(tiles.take(beta, j, chunk), grad)
            pending = behind.add_to(pending, -tiles.dot(weights.mT, written, operand), m)
            dk = behind.add_to(dk, tiles.dot(dscores.mT, tiles.take(w, j, chunk), operand), m)
            dw = tiles.add_to(dw, tiles.dot(dscores, keys, operand), j)
            return dw, dk, tiles.add_to(dbeta, -jnp.sum(weights * products, axis=-1), j), pending

        if behind is not None:
            inner = (dw, dk, dbeta, pending)
            dw, dk, dbeta, pending = lax.fori_loop(behind.start[j], behind.stop[j], earlier_behind, inner)
        return (tiles.put(g, grad, j), dw, dk, dbeta, dbias, pending), None

    start = (
        tiles.zeros(v.shape, dtype, v),
        tiles.zeros(k.shape, dtype, v),
        tiles.zeros(k.shape, dtype, v),
        tiles.zeros(v.shape[:3], dtype, v),
        jax.tree.map(lambda x: tiles.zeros(x.shape, x.dtype, v), bias),
        # du, and what rows behind whose window a column lies have given to it before the turn of its chunk.
        None if behind is None else du.astype(dtype),
    )
    (g, dw, dk, dbeta, dbias, _), _ = lax.scan(
        one_chunk, start, jnp.arange(length // chunk, dtype=jnp.int32), reverse=True
    )
    return dw, dk, times(alpha, g), jnp.sum(v.astype(dtype) * g, axis=-1), dbeta, dbias
