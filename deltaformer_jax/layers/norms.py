"""Normalisation: RMSNorm, L2 normalisation, and the per-head norm and gate of recurrent mixers.

Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", NeurIPS 2019, eq. 4.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from deltaformer_jax.layers.linear import along
from deltaformer_jax.ops.common.rematerialisation import kept
from deltaformer_jax.ops.common.tiles import accumulation_dtype

ACTIVATIONS = {"swish": jax.nn.silu, "sigmoid": jax.nn.sigmoid}


def rms_normalize(x, epsilon: float = 1e-6):
    """y = x / sqrt(mean(x²) + epsilon) over the last axis: a vector of width K gets length √K, or slightly less.

    Computed in float32 (float64 for float64), returned in x's dtype. A zero vector stays zero.
    """
    wide = x.astype(accumulation_dtype(x.dtype))
    mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
    return (wide * kept(jax.lax.rsqrt(mean_square + epsilon))).astype(x.dtype)


def l2_normalize(x, epsilon: float = 1e-6):
    """x / √(Σ x² + epsilon) over the last axis, in float32, returned in x's dtype. A zero vector stays zero."""
    wide = x.astype(accumulation_dtype(x.dtype))
    return (wide * jax.lax.rsqrt(jnp.sum(jnp.square(wide), axis=-1, keepdims=True) + epsilon)).astype(x.dtype)


class RMSNorm(nnx.Module):
    """y = g ⊙ x / sqrt(mean(x²) + epsilon) over the last axis, g a trained vector that starts at 1.

    x `[..., width]`; computed in float32, returned in x's dtype. `axis` names the width for sharding. g gets no weight
    decay. `gain`: the parameter `scale` is "scale": g itself; "one_plus_scale": g − 1, as Qwen's models store it.
    """

    def __init__(self, width: int, *, epsilon: float = 1e-6, axis: str = "embed", gain: str = "scale"):
        self.plus_one = gain == "one_plus_scale"
        start = jnp.zeros if self.plus_one else jnp.ones
        self.scale = nnx.Param(start((width,), jnp.float32), axes=(axis,), decay=False)
        self.epsilon = epsilon

    def __call__(self, x):
        wide = x.astype(accumulation_dtype(x.dtype))
        gain = along(self.scale, x)
        return (rms_normalize(wide, self.epsilon) * (1.0 + gain if self.plus_one else gain)).astype(x.dtype)


class AllHeadsNorm(nnx.Module):
    """RMSNorm of all heads of a token together: x [B,T,H,K], normalised over H and K, with a gain [H, K].

    Source: OLMo 2, arXiv 2501.00656, section 3.2 (its qk-norm).
    """

    def __init__(self, heads: int, head_dim: int, axis: str, *, epsilon: float = 1e-6, gain: str = "scale"):
        self.plus_one = gain == "one_plus_scale"
        start = jnp.zeros if self.plus_one else jnp.ones
        self.scale = nnx.Param(start((heads, head_dim), jnp.float32), axes=(axis, "head_dim"), decay=False)
        self.epsilon = epsilon

    def __call__(self, x):
        wide = x.astype(accumulation_dtype(x.dtype))
        mean_square = jnp.mean(jnp.square(wide), axis=(-2, -1), keepdims=True)
        gain = along(self.scale, x)
        unit = wide * jax.lax.rsqrt(mean_square + self.epsilon)
        return (unit * (1.0 + gain if self.plus_one else gain)).astype(x.dtype)


class HeadNorm(nnx.Module):
    """y = RMSNorm(o) ⊙ activation(gate): each head of a recurrent mixer's output is normalised, then gated.

    o [B,T,H,V], gate [B,T,H,V] or None -> [B,T,H,V] in o's dtype; computed in float32. All heads share the gain.
    Source: Sun et al., RetNet, arXiv 2307.08621, eq. 8 (swish gate, with a group norm); RMSNorm instead of the group
    norm as in Yang et al., arXiv 2312.06635.
    """

    def __init__(self, width: int, *, activation: str = "swish", epsilon: float = 1e-6):
        self.norm = RMSNorm(width, epsilon=epsilon, axis="head_dim")
        self.activation = activation

    def __call__(self, o, gate=None):
        wide = self.norm(o.astype(accumulation_dtype(o.dtype)))
        if gate is not None:
            wide = wide * ACTIVATIONS[self.activation](gate.astype(wide.dtype))
        return kept(wide.astype(o.dtype))
