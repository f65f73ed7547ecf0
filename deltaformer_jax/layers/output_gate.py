"""A gate on what an attention mixer has read, each feature of each head its own.

    o ⊙ sigmoid(x W_g)

It lets a token take nothing, where the weights of softmax must add up to 1. Source: Qiu et al., "Gated Attention for
Large Language Models", arXiv 2505.06708, section 2 (behind the read, element by element, a sigmoid).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from deltaformer_jax.layers.linear import kernel, product_flops
from deltaformer_jax.layers.query_key_value import project


class OutputGate(nnx.Module):
    """(o [B,T,H,K], x [B,T,d_model]) -> [B,T,H,K] in `dtype`; the sigmoid and its product are float32."""

    def __init__(self, d_model: int, num_heads: int, head_dim: int, *, dtype, rngs: nnx.Rngs):
        self.kernel = kernel(rngs, (d_model, num_heads, head_dim), ("embed", "heads", "head_dim"))
        self.dtype = jnp.dtype(dtype)

    def __call__(self, o, x):
        wide = jnp.promote_types(self.dtype, jnp.float32)
        gate = jax.nn.sigmoid(project(x, self.kernel, self.dtype).astype(wide))
        return (o.astype(wide) * gate).astype(self.dtype)

    def flops_per_token(self) -> float:
        """2 d_model H K."""
        return product_flops(self.kernel)
