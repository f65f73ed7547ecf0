"""The definition of the generalized delta rule, one token after another.

    u_t = Sᵀ b_t                                         what the erase key reads, before the decay
    S ← Diag(e^{g_t}) S − a_t u_tᵀ + k_t v_tᵀ            g ≤ 0: one number per key channel, a row of S
    o_t = scale · Sᵀ q_t

The chunked form is tested against this one. Work: O(T K V) per head, in T sequential steps. JAX differentiates this
form, any number of times; the backward pass keeps a copy of S for each step, O(T K V) per head.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from deltaformer_jax.ops.common import heads as H
from deltaformer_jax.ops.common.tiles import accumulation_dtype


def recurrent(query, key, value, erase_key, erase_write, log_decay, state, real, resets, *, scale):
    """query, key [B, T, H, K], value [B, T, Hv, V], state [B, Hv, K, V] -> (output [B, T, Hv, V], state).

    erase_key, erase_write [B, T, H or Hv, K]; log_decay [B, T, Hv, K] or None. real and resets are [B, T] bools. Tokens
    that are not real are skipped (None: all are real). The state is set to 0 before each token with a reset (None: no
    resets).
    """
    dtype = accumulation_dtype(value.dtype)
    value_heads = value.shape[2]

    def clean(x):
        """x, 0 at padding. A padding token then decays by e^0 = 1, erases 0, writes 0 and reads 0."""
        return x if real is None else jnp.where(real.reshape(*real.shape, *[1] * (x.ndim - 2)), x, 0)

    def prepare(x):
        x = None if x is None else H.repeat_heads(clean(x).astype(dtype), value_heads)
        return None if x is None else jnp.moveaxis(x, 1, 0)

    def token(state, inputs):
        q, k, v, b, a, g, reset = inputs
        if reset is not None:
            state = jnp.where(reset[:, None, None, None], 0, state)
        kept = state if g is None else jnp.exp(g[..., None]) * state
        erased = a[..., :, None] * _read(state, b)[..., None, :]
        state = kept - erased + k[..., :, None] * v[..., None, :]
        return state, _read(state, q)

    inputs = (
        prepare(query) * scale,
        *map(prepare, (key, value, erase_key, erase_write, log_decay)),
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
