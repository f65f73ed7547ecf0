"""DeltaFormer by its definition, one token after another. Every other form is tested against this one.

    u_t = α_t v_t − β_t Σ_{i<t} κ₁(w_t, k_i) u_i
    o_t = Σ_{i≤t} κ₂(q_t, k_i) u_i

Work O(T²) as in every form, but in T steps that nothing overlaps; differentiable as often as one likes, keeping a copy
of u for each step, O(T² V). Source: Xu et al., DeltaFormer (NeurIPS 2025), eq. 8 and 9.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax

from deltaformer_jax.ops.similarity import row_weights


def write_recurrent(w, k, v, alpha, beta, segments, *, similarity, scale):
    """One head: w, k [T, K], v [T, V], alpha, beta, segments [T] -> u [T, V]."""
    index = jnp.arange(k.shape[0], dtype=jnp.int32)

    def token(u, t):
        visible = (index < t) & (segments == segments[t]) & (segments[t] != 0)
        weights = row_weights(similarity, k @ w[t] * scale, visible)
        u_t = alpha[t] * v[t] - beta[t] * (weights @ u)
        return u.at[t].set(u_t), None

    return lax.scan(token, jnp.zeros_like(v), index)[0]


def read_recurrent(q, k, u, segments, *, similarity, scale):
    """One head of keys, r query heads: q [T, r, K], k [T, K], u [T, V], segments [T] -> o [T, r, V]."""
    index = jnp.arange(k.shape[0], dtype=jnp.int32)

    def token(_, t):
        visible = (index <= t) & (segments == segments[t]) & (segments[t] != 0)
        scores = q[t] @ k.T * scale
        return None, row_weights(similarity, scores, jnp.broadcast_to(visible, scores.shape)) @ u

    return lax.scan(token, None, index)[1]
