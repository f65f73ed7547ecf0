"""Root-mean-square normalisation.

Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", NeurIPS 2019, eq. 4.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx


def rms_normalize(x, epsilon: float = 1e-6):
    """y = x / sqrt(mean(x²) + epsilon) over the last axis: a vector of width K comes out with length √K, or a little
    less. Computed in float32 (float64 for float64), returned in x's dtype; zero stays zero."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
    return (wide * jax.lax.rsqrt(mean_square + epsilon)).astype(x.dtype)


class RMSNorm(nnx.Module):
    """y = g ⊙ x / sqrt(mean(x²) + epsilon) over the last axis, g a trained vector that starts at 1.

    x `[..., width]`; computed in float32, returned in x's dtype. `axis` names the width for sharding. g is not
    decayed.
    """

    def __init__(self, width: int, *, epsilon: float = 1e-6, axis: str = "embed"):
        self.scale = nnx.Param(jnp.ones((width,), jnp.float32), axes=(axis,), decay=False)
        self.epsilon = epsilon

    def __call__(self, x):
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        return (rms_normalize(wide, self.epsilon) * self.scale[...]).astype(x.dtype)
