"""The definition of softmax attention, token by token and as one T×T matrix. The chunked form is tested against it.

    s_ti = scale · q_t·k_i + b(t, i) + Σ_{i<l≤t} g_l,      o_t = Σ_i e^{s_ti} v_i / (e^b + Σ_j e^{s_tj})

With another similarity than softmax, o_t = Σ_i κ(s_t)_i v_i, without a sink. Without a position bias b(t, i), heads are
independent, and the functions take one. With it they take all heads, because it may depend on the scores of all.
Source: see `causal_attention`.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax

from deltaformer_jax.ops.common.score_decay import decay_between
from deltaformer_jax.ops.common.similarity import Softmax, row_weights
from deltaformer_jax.ops.common.tiles import within


def attend_recurrent(q, k, v, segments, log_decay, sinks, lasting, *, scale, window, similarity):
    """One key head and its r query heads -> o [T, r, V].

    q [T, r, K], k [T, K], v [T, V], segments [T], log_decay [T, r], sinks [r] or None, lasting [T] or None: the tokens
    that stay visible behind the window. The scan carries D, the sum of the log decays after each past token.
    """
    index = jnp.arange(k.shape[0], dtype=jnp.int32)

    def token(decay, t):
        decay = jnp.where(index < t, decay + log_decay[t][:, None], 0)
        visible = (index <= t) & (segments == segments[t]) & (segments[t] != 0)
        if window is not None:
            visible &= within(t - index, window, lasting)
        return decay, _weights(similarity, q[t] @ k.T * scale + decay, visible, sinks) @ v

    return lax.scan(token, jnp.zeros((q.shape[1], k.shape[0]), q.dtype), index)[1]


def attend_parallel(q, k, v, segments, log_decay, sinks, lasting, *, scale, window, similarity):
    """`attend_recurrent` for all tokens at once. Memory: O(T²) per query head."""
    index = jnp.arange(k.shape[0], dtype=jnp.int32)
    ago = index[:, None] - index[None, :]
    visible = (ago >= 0) & (segments[:, None] == segments[None, :]) & (segments != 0)[:, None]
    if window is not None:
        visible &= within(ago, window, None if lasting is None else lasting[None])
    decay = jnp.moveaxis(decay_between(log_decay), 2, 1)
    scores = jnp.einsum("irk,jk->irj", q, k) * scale + decay
    return _weights(similarity, scores, visible[:, None], sinks) @ v


def attend_biased_recurrent(q, k, v, segments, places, log_decay, sinks, lasting, bias, *, scale, window):
    """All H heads of one batch row -> o [T, H, V].

    q, k [T, H, K], v [T, H, V], segments and places (positions in the segment) [T], log_decay [T, H], sinks [H] or
    None, lasting [T] or None, bias a PositionBias.
    """
    index = jnp.arange(k.shape[0], dtype=jnp.int32)

    def token(decay, t):
        decay = jnp.where(index < t, decay + log_decay[t][:, None], 0)
        visible = (index <= t) & (segments == segments[t]) & (segments[t] != 0)
        if window is not None:
            visible &= within(t - index, window, lasting)
        scores = jnp.einsum("hk,jhk->hj", q[t], k) * scale
        ago = jnp.maximum(t - index, 0)
        scores = scores + bias(scores[None, :, None], ago[None, None], places[t][None, None])[0, :, 0] + decay
        return decay, jnp.einsum("hj,jhv->hv", _weights(Softmax(), scores, visible, sinks), v)

    return lax.scan(token, jnp.zeros((q.shape[1], k.shape[0]), q.dtype), index)[1]


def attend_biased_parallel(q, k, v, segments, places, log_decay, sinks, lasting, bias, *, scale, window):
    """`attend_biased_recurrent` for all tokens at once. Memory: O(T²) per head, times what the bias keeps of a pair."""
    index = jnp.arange(k.shape[0], dtype=jnp.int32)
    ago = index[:, None] - index[None, :]
    visible = (ago >= 0) & (segments[:, None] == segments[None, :]) & (segments != 0)[:, None]
    if window is not None:
        visible &= within(ago, window, None if lasting is None else lasting[None])
    scores = jnp.einsum("ihk,jhk->hij", q, k) * scale
    scores = scores + bias(scores[None], jnp.maximum(ago, 0)[None], places[None])[0]
    scores = jnp.moveaxis(scores, 0, 1) + jnp.moveaxis(decay_between(log_decay), 2, 1)
    return jnp.einsum("ihj,jhv->ihv", _weights(Softmax(), scores, visible[:, None], sinks), v)


def _weights(similarity, scores, visible, sinks):
    """κ of scores [..., r, N]. The sinks [r] are one more column, which is left out of the result."""
    visible = jnp.broadcast_to(visible.reshape(*[1] * (scores.ndim - visible.ndim), *visible.shape), scores.shape)
    if sinks is None:
        return row_weights(similarity, scores, visible)
    column = jnp.broadcast_to(sinks.reshape(*[1] * (scores.ndim - 2), -1, 1), (*scores.shape[:-1], 1))
    with_sink = jnp.concatenate([scores, column], axis=-1)
    visible = jnp.concatenate([visible, jnp.ones_like(column, bool)], axis=-1)
    return row_weights(similarity, with_sink, visible)[..., :-1]
