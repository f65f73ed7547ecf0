"""The definition of the gated delta rule and of gated linear attention, one token after another.

    S ← e^{g_t} S                          g ≤ 0: one number per head, or one per key channel (a row of S)
    u_t = β_t (v_t − Sᵀ k_t)               the delta rule; gated linear attention has u_t = v_t
    S ← S + k_t u_tᵀ
    o_t = scale · Sᵀ q_t

All other forms are tested against this one. Work: O(T K V) per head, in T sequential steps. JAX differentiates this
form, any number of times; the backward pass keeps a copy of S for each step, O(T K V) per head.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from deltaformer_jax.ops.common import heads as H
from deltaformer_jax.ops.common.tiles import accumulation_dtype


def recurrent(query, key, value, beta, log_decay, state, real, resets, *, scale, delta):
    """query, key [B, T, H, K], value [B, T, Hv, V], state [B, Hv, K, V] -> (output [B, T, Hv, V], state).

    beta [B, T, Hv] or None; log_decay [B, T, Hv], [B, T, Hv, K] or None. real and resets are [B, T] bools. Tokens that
    are not real are skipped (None: all are real). The state is set to 0 before each token with a reset (None: no
    resets). `delta` True: the gated delta rule; False: gated linear attention.
    """
    dtype = accumulation_dtype(value.dtype)
    value_heads = value.shape[2]
    per_channel = log_decay is not None and log_decay.ndim == 4

    def clean(x):
        """x, 0 at padding. A padding token then decays by e^0 = 1, writes 0 and reads 0."""
        return x if real is None else jnp.where(real.reshape(*real.shape, *[1] * (x.ndim - 2)), x, 0)

    def prepare(x):
        return None if x is None else jnp.moveaxis(clean(x).astype(dtype), 1, 0)

    def token(state, inputs):
        q, k, v, b, g, reset = inputs
        if reset is not None:
            state = jnp.where(reset[:, None, None, None], 0, state)
        if g is not None:
            state = jnp.exp(g[..., None] if per_channel else g[..., None, None]) * state
        u = v
        if delta:
            u = v - _read(state, k)
            u = u if b is None else b[..., None] * u
        state = state + k[..., :, None] * u[..., None, :]
        return state, _read(state, q)

    inputs = (
        prepare(H.repeat_heads(query, value_heads)) * scale,
        *map(prepare, (H.repeat_heads(key, value_heads), value, beta, log_decay)),
        None if resets is None else resets.T,
    )
    if value.shape[1] == 1:
        state, out = token(state.astype(dtype), jax.tree.map(lambda x: x[0], inputs))
        return clean(out[:, None]).astype(value.dtype), state
    state, out = lax.scan(token, state.astype(dtype), inputs)
    # The outputs at padding are 0 already. The mask is for the gradients: a cotangent at padding, even NaN, stops here.
    return clean(jnp.moveaxis(out, 0, 1)).astype(value.dtype), state


def _read(state, x):
    """Sᵀ x: state [B, Hv, K, V], x [B, Hv, K] -> [B, Hv, V]."""
    return jnp.einsum("bhkv,bhk->bhv", state, x, precision=lax.Precision.HIGHEST)
