"""The output of a recurrent mixer: each head normalised, and let through by a gate.

    y = RMSNorm(o) ⊙ activation(gate)

Source: Sun et al., RetNet, arXiv 2307.08621, eq. 8 (swish); RMSNorm for its group norm as in Yang et al., arXiv
2312.06635.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from deltaformer_jax.layers.norms import RMSNorm

ACTIVATIONS = {"swish": jax.nn.silu, "sigmoid": jax.nn.sigmoid}


class HeadNorm(nnx.Module):
    """o [B,T,H,V], gate [B,T,H,V] or None -> [B,T,H,V] in o's dtype; computed in float32. All heads share the gain."""

    def __init__(self, width: int, *, activation: str = "swish", epsilon: float = 1e-6):
        self.norm = RMSNorm(width, epsilon=epsilon, axis="head_dim")
        self.activation = activation

    def __call__(self, o, gate=None):
        wide = self.norm(o.astype(jnp.promote_types(o.dtype, jnp.float32)))
        if gate is not None:
            wide = wide * ACTIVATIONS[self.activation](gate.astype(wide.dtype))
        return wide.astype(o.dtype)


def l2_normalize(x, epsilon: float = 1e-6):
    """x / √(Σ x² + epsilon) over the last axis, in float32, returned in x's dtype; zero stays zero."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return (wide * jax.lax.rsqrt(jnp.sum(jnp.square(wide), axis=-1, keepdims=True) + epsilon)).astype(x.dtype)
