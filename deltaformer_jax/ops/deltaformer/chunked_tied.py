"""DeltaFormer in one pass over the keys, for the tied case: w = q, both similarities softmax, equal scales.

With E_ij = e^{s_ij}, L1_i = Σ_{j<i} E_ij, L2_i = L1_i + E_ii, π_i = E_ii / L2_i, P_ij = E_ij / L1_i (0 in a first row):

    s_i = Σ_{j<i} P_ij u_j,    u_i = α_i v_i − β_i s_i,    o_i = (1 − π_i) s_i + π_i u_i

The forward pass therefore costs one flash attention instead of two. The backward pass is one sweep over the chunks of
columns, from the last to the first. With ρ_i = 1 − π_i and

    H_i = ρ_i dO_i − β_i G_i,   D1_i = −G_i·(α_i v_i − u_i),   D2_i = dO_i·o_i,   c_i = ρ_i D2_i + D1_i

it computes

    G_j = Σ_{i>j} P_ij H_i + π_j dO_j              (inside a chunk, a transposed solve, because H_i contains G_i)
    dS_ij = P_ij (H_i·u_j − c_i) for j < i,        dS_ii = π_i (dO_i·u_i − D2_i)
    dV = α G,   dα_i = v_i·G_i,   dβ_i = −G_i·s_i,   dQ = scale · dS K,   dK = scale · dSᵀ Q

This takes five matrix products per pair of tiles, as many as the backward pass of flash attention.

Only L1 has a running maximum. π and ρ are the sigmoids of ±(s_ii − log L1), each computed separately. If L1 and L2
shared a maximum, s would be lost in rows where s_ii dominates; and computing ρ as 1 − π would cancel. s is a residual
in the place of o, because neither (αv − u)/β nor (o − πu)/ρ recovers it if β or ρ is 0.

Derived for this project from Xu et al., DeltaFormer (NeurIPS 2025), eq. 8 and 9.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax

from deltaformer_jax.ops.common import tiles
from deltaformer_jax.ops.common.similarity import Softmax
from deltaformer_jax.ops.common.triangular import solve_unit_lower, solve_unit_lower_transposed
from deltaformer_jax.ops.deltaformer.chunked_write import times

_SOFTMAX = Softmax()


def tied_forward(q, k, v, alpha, beta, segments, first, *, scale, chunk, window):
    """(o, u, s [B, h, T, V], log L1, π, ρ [B, h, T]), all in the accumulation dtype.

    q, k [B, h, T, K], v [B, h, T, V], alpha, beta [B, h, T] or None, segments [B, 1, T] or None, first [T/C]
    (`tiles.first_chunks`).
    """
    batch, heads, length, width = v.shape
    dtype = tiles.accumulation_dtype(k.dtype)
    strict = tiles.strictly_below(chunk)

    def one_chunk(carry, c):
        u = carry[1]
        rows, left = tiles.scale_rows(tiles.take(q, c, chunk), scale)
        row_segments = tiles.take(segments, c, chunk)

        def scores(j):
            return tiles.dot(rows, tiles.take(k, j, chunk).mT, k.dtype) * left

        def earlier(j, running):
            visible = tiles.same_segment(row_segments, tiles.take(segments, j, chunk))
            visible = tiles.selected(visible, c, j, chunk, window)
            return tiles.absorb(_SOFTMAX, running, scores(j), visible, tiles.take(u, j, chunk), k.dtype)

        running = lax.fori_loop(first[c], c, earlier, tiles.start_sum((batch, heads, chunk, width), dtype, v))
        visible = tiles.both(strict, tiles.same_segment(row_segments, row_segments))
        visible = tiles.selected(visible, c, c, chunk, window)
        own = scores(c)
        weights, running = tiles.absorb_weights(_SOFTMAX, running, own, visible)
        inverse = tiles.inverse_normaliser(_SOFTMAX, running)[..., None]
        past, weights = running[2] * inverse, weights * inverse
        gate = tiles.take(beta, c, chunk)
        target = times(tiles.take(alpha, c, chunk), tiles.take(v, c, chunk).astype(dtype))
        solved = solve_unit_lower(times(gate, weights), target - times(gate, past))
        summary = past + tiles.dot(weights, solved, dtype)

        # π = 1 / (1 + e^{lse1 − s_ii}); π = 1 in a row without earlier tokens.
        lse1 = tiles.log_normaliser(_SOFTMAX, running)
        seen = running[1] > 0
        own = jnp.diagonal(own, axis1=2, axis2=3)
        share = jnp.where(seen, 1 / (1 + jnp.exp(jnp.where(seen, lse1 - own, 0))), 1)
        rest = jnp.where(seen, 1 / (1 + jnp.exp(jnp.where(seen, own - lse1, 0))), 0)
        out = rest[..., None] * summary + share[..., None] * solved
        parts = (out, solved, summary, lse1, share, rest)
        return tuple(tiles.put(x, part, c) for x, part in zip(carry, parts)), None

    start = (*[tiles.zeros(v.shape, dtype, v)] * 3, *[tiles.zeros(v.shape[:3], dtype, v)] * 3)
    return lax.scan(one_chunk, start, jnp.arange(length // chunk, dtype=jnp.int32))[0]


def tied_backward(
    q, k, v, alpha, beta, segments, last, u, summary, lse1, share, rest, dout, du, *, scale, chunk, window
):
    """The gradients (dq, dk, dv, dalpha, dbeta) for the cotangents dout and du [B, h, T, V] of o and u.

    All are in the accumulation dtype. `summary` is s, `share` is π and `rest` is ρ.
    """
    length = k.shape[2]
    dtype = tiles.accumulation_dtype(k.dtype)
    dout, summary = dout.astype(dtype), summary.astype(dtype)
    out = rest[..., None] * summary + share[..., None] * u
    read_dot = jnp.sum(dout * out, axis=-1)
    read_share = rest[..., None] * dout
    own_column = jnp.eye(chunk, dtype=dtype)[None, None]
    strict = tiles.strictly_below(chunk)

    def weights_of(i, keys, visible):
        scores = tiles.dot(tiles.take(q, i, chunk), keys.mT, k.dtype) * scale
        return tiles.weights_again(_SOFTMAX, scores, tiles.take(lse1, i, chunk), visible)

    def adjoints(i, grad):
        """H and c of the rows of chunk i, given their G."""
        both_ways = tiles.take(read_share, i, chunk) - times(tiles.take(beta, i, chunk), grad)
        written = times(tiles.take(alpha, i, chunk), tiles.take(v, i, chunk).astype(dtype))
        write_dot = -jnp.sum(grad * (written - tiles.take(u, i, chunk)), axis=-1)
        return both_ways, tiles.take(rest * read_dot, i, chunk) + write_dot

    def one_chunk(carry, j):
        g, dq, dk = carry
        keys, values = tiles.take(k, j, chunk), tiles.take(u, j, chunk)
        column_segments = tiles.take(segments, j, chunk)

        def later(i, inner):
            dq, incoming, dkeys = inner
            visible = tiles.same_segment(tiles.take(segments, i, chunk), column_segments)
            visible = tiles.selected(visible, i, j, chunk, window)
            weights = weights_of(i, keys, visible)
            both_ways, centre = adjoints(i, tiles.take(g, i, chunk))
            dscores = weights * (tiles.dot(both_ways, values.mT, k.dtype) - centre[..., None]) * scale
            incoming = incoming + tiles.dot(weights.mT, both_ways, k.dtype)
            dkeys = dkeys + tiles.dot(dscores.mT, tiles.take(q, i, chunk), k.dtype)
            return tiles.add_to(dq, tiles.dot(dscores, keys, k.dtype), i), incoming, dkeys

        own_share, own_dout = tiles.take(share, j, chunk), tiles.take(dout, j, chunk)
        incoming = tiles.take(du, j, chunk).astype(dtype) + own_share[..., None] * own_dout
        start = (dq, incoming, tiles.zeros(keys.shape, dtype, v))
        dq, incoming, dkeys = lax.fori_loop(j + 1, last[j] + 1, later, start)

        visible = tiles.both(strict, tiles.same_segment(column_segments, column_segments))
        visible = tiles.selected(visible, j, j, chunk, window)
        weights = weights_of(j, keys, visible)
        incoming = incoming + tiles.dot(weights.mT, tiles.take(read_share, j, chunk), dtype)
        grad = solve_unit_lower_transposed(times(tiles.take(beta, j, chunk), weights), incoming)
        both_ways, centre = adjoints(j, grad)
        dscores = weights * (tiles.dot(both_ways, values.mT, k.dtype) - centre[..., None])
        own = own_share * (jnp.sum(own_dout * values, axis=-1) - tiles.take(read_dot, j, chunk))
        dscores = (dscores + own_column * own[..., None]) * scale
        rows = tiles.take(q, j, chunk)
        dkeys = dkeys + tiles.dot(dscores.mT, rows, k.dtype)
        dq = tiles.add_to(dq, tiles.dot(dscores, keys, k.dtype), j)
        return (tiles.put(g, grad, j), dq, tiles.put(dk, dkeys, j)), None

    start = tuple(tiles.zeros(x.shape, dtype, v) for x in (v, q, k))
    (g, dq, dk), _ = lax.scan(one_chunk, start, jnp.arange(length // chunk, dtype=jnp.int32), reverse=True)
    dalpha = jnp.sum(v.astype(dtype) * g, axis=-1)
    return dq, dk, times(alpha, g), dalpha, -jnp.sum(g * summary, axis=-1)
