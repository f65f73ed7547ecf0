"""The definition of DeltaFormer, one token after another ("recurrent"), and the same with two T×T matrices
("parallel"), for reading and for small T. All other forms are tested against the recurrent one.

    u_t = α_t v_t − β_t Σ_{i<t} κ₁(w_t, k_i) u_i                U = (I + diag(β) A)⁻¹ diag(α) V
    o_t = Σ_{i≤t} κ₂(q_t, k_i) u_i                                O = P₂ U

A is the strictly lower triangular matrix of κ₁(w_i, k_j), P₂ the lower triangular matrix of κ₂(q_i, k_j). With a
window, both sums run only over the tokens i with t − i < window and those that last.

With a bias b(t, i) of the scores, which may depend on those of all heads, the functions `write_biased_*` and
`read_biased_*` take all heads: κ₁ is then applied to w_t·k_i + b(t, i), κ₂ to q_t·k_i + b(t, i).

Both forms take O(T²) work. The recurrent form takes T sequential steps; its backward pass keeps a copy of u for each
step, O(T² V) per head. The parallel form keeps O(T²) per head. JAX differentiates both, any number of times.
Source: Xu et al., DeltaFormer (NeurIPS 2025), eq. 8 and 9, and section 3.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax

from deltaformer_jax.ops.common.similarity import row_weights
from deltaformer_jax.ops.common.tiles import within
from deltaformer_jax.ops.common.triangular import solve_by_halves


def write_recurrent(w, k, v, alpha, beta, segments, lasting, *, similarity, scale, window):
    """The write of one head: w, k [T, K], v [T, V], alpha, beta, segments [T], lasting [T] or None (the tokens that
    stay visible behind the window) -> u [T, V]."""
    index = jnp.arange(k.shape[0], dtype=jnp.int32)

    def token(u, t):
        visible = (index < t) & (segments == segments[t]) & (segments[t] != 0)
        if window is not None:
            visible &= within(t - index, window, lasting)
        weights = row_weights(similarity, k @ w[t] * scale, visible)
        u_t = alpha[t] * v[t] - beta[t] * (weights @ u)
        return u.at[t].set(u_t), None

    return lax.scan(token, jnp.zeros_like(v), index)[0]


def read_recurrent(q, k, u, segments, lasting, *, similarity, scale, window):
    """The read of one key head by r query heads: q [T, r, K], k [T, K], u [T, V], segments [T], lasting [T] or None ->
    o [T, r, V]."""
    index = jnp.arange(k.shape[0], dtype=jnp.int32)

    def token(_, t):
        visible = (index <= t) & (segments == segments[t]) & (segments[t] != 0)
        if window is not None:
            visible &= within(t - index, window, lasting)
        scores = q[t] @ k.T * scale
        return None, row_weights(similarity, scores, jnp.broadcast_to(visible, scores.shape)) @ u

    return lax.scan(token, None, index)[1]


def _visible(segments, window, lasting, strict):
    row, column = jnp.arange(segments.shape[0])[:, None], jnp.arange(segments.shape[0])[None, :]
    visible = (column < row if strict else column <= row) & (segments[:, None] == segments[None, :])
    if window is not None:
        visible &= within(row - column, window, None if lasting is None else lasting[None])
    return visible & (segments != 0)[:, None]


def write_parallel(w, k, v, alpha, beta, segments, lasting, *, similarity, scale, window):
    """`write_recurrent` for all tokens at once.

    The system is solved by matrix products instead of LAPACK. jaxlib's batched triangular solve can deadlock on a CPU
    with two threads, if two of them run at the same time, as forward and backward of one program can (jaxlib 0.10.2).
    """
    weights = row_weights(similarity, w @ k.T * scale, _visible(segments, window, lasting, strict=True))
    return solve_by_halves(beta[:, None] * weights, alpha[:, None] * v)


def read_parallel(q, k, u, segments, lasting, *, similarity, scale, window):
    """`read_recurrent` for all tokens at once."""
    visible = _visible(segments, window, lasting, strict=False)[:, None, :]
    scores = jnp.einsum("irk,jk->irj", q, k) * scale
    return row_weights(similarity, scores, jnp.broadcast_to(visible, scores.shape)) @ u


def _biased_scores(rows, k, places, bias, scale):
    """All scores with their bias [H, T, T]: rows, k [T, H, K], places [T]."""
    index = jnp.arange(k.shape[0], dtype=jnp.int32)
    ago = jnp.maximum(index[:, None] - index[None, :], 0)
    scores = jnp.einsum("ihk,jhk->hij", rows, k) * scale
    return scores + bias(scores[None], ago[None], places[None])[0]


def _biased_scores_of(t, rows, k, places, bias, scale):
    """Row t of `_biased_scores` [H, T]."""
    ago = jnp.maximum(t - jnp.arange(k.shape[0], dtype=jnp.int32), 0)
    scores = jnp.einsum("hk,jhk->hj", rows[t], k) * scale
    return scores + bias(scores[None, :, None], ago[None, None], places[t][None, None])[0, :, 0]


def write_biased_recurrent(w, k, v, alpha, beta, segments, places, lasting, bias, *, similarity, scale, window):
    """The write of one batch row by all Hu write heads -> u [T, Hu, V]: w, k [T, Hu, K], v [T, Hu, V], alpha and beta
    [T, Hu], segments and places (positions in the segment) [T], lasting [T] or None, bias a PositionBias."""
    index = jnp.arange(k.shape[0], dtype=jnp.int32)

    def token(u, t):
        visible = (index < t) & (segments == segments[t]) & (segments[t] != 0)
        if window is not None:
            visible &= within(t - index, window, lasting)
        scores = _biased_scores_of(t, w, k, places, bias, scale)
        weights = row_weights(similarity, scores, jnp.broadcast_to(visible, scores.shape))
        u_t = alpha[t][:, None] * v[t] - beta[t][:, None] * jnp.einsum("hj,jhv->hv", weights, u)
        return u.at[t].set(u_t), None

    return lax.scan(token, jnp.zeros_like(v), index)[0]


def write_biased_parallel(w, k, v, alpha, beta, segments, places, lasting, bias, *, similarity, scale, window):
    """`write_biased_recurrent` for all tokens at once."""
    scores = _biased_scores(w, k, places, bias, scale)
    visible = jnp.broadcast_to(_visible(segments, window, lasting, strict=True), scores.shape)
    weights = beta.T[:, :, None] * row_weights(similarity, scores, visible)
    return jnp.swapaxes(solve_by_halves(weights, jnp.swapaxes(alpha[:, :, None] * v, 0, 1)), 0, 1)


def read_biased_recurrent(q, k, u, segments, places, lasting, bias, *, similarity, scale, window):
    """The read of one batch row by all H heads -> o [T, H, V]: q, k [T, H, K], u [T, H, V], segments and places
    (positions in the segment) [T], lasting [T] or None, bias a PositionBias."""
    index = jnp.arange(k.shape[0], dtype=jnp.int32)

    def token(_, t):
        visible = (index <= t) & (segments == segments[t]) & (segments[t] != 0)
        if window is not None:
            visible &= within(t - index, window, lasting)
        scores = _biased_scores_of(t, q, k, places, bias, scale)
        weights = row_weights(similarity, scores, jnp.broadcast_to(visible, scores.shape))
        return None, jnp.einsum("hj,jhv->hv", weights, u)

    return lax.scan(token, None, index)[1]


def read_biased_parallel(q, k, u, segments, places, lasting, bias, *, similarity, scale, window):
    """`read_biased_recurrent` for all tokens at once."""
    scores = _biased_scores(q, k, places, bias, scale)
    visible = jnp.broadcast_to(_visible(segments, window, lasting, strict=False), scores.shape)
    return jnp.einsum("hij,jhv->ihv", row_weights(similarity, scores, visible), u)
