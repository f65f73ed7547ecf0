"""Gated feed-forward layers: y = (f(x W_gate) ⊙ x W_up) W_down.

Each hidden unit is an entry of a memory with two keys, a column of W_gate and one of W_up, and a value, a row of
W_down. Source: Shazeer, "GLU Variants Improve Transformer", arXiv 2002.05202, eq. 6 (no biases).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from deltaformer_jax.layers.feed_forward.sizes import check_width
from deltaformer_jax.layers.linear import kernel, product_flops, product_into_stream, products
from deltaformer_jax.ops.common.rematerialisation import kept


class SwiGLU(nnx.Module):
    """y = (silu(x W_gate) ⊙ x W_up) W_down: x [B,T,d_model] -> [B,T,d_model] in `dtype`, the compute dtype.

    `output_scale` multiplies W_down's initial values; the model gives 1/√(2 num_layers).
    Cost: 6 d_model mlp_dim FLOPs per token.
    """

    activation = staticmethod(jax.nn.silu)

    def __init__(self, d_model: int, mlp_dim: int, *, output_scale: float = 1.0, dtype=jnp.float32, rngs: nnx.Rngs):
        check_width(mlp_dim)
        self.gate = kernel(rngs, (d_model, mlp_dim), ("embed", "mlp"))
        self.up = kernel(rngs, (d_model, mlp_dim), ("embed", "mlp"))
        self.down = kernel(rngs, (mlp_dim, d_model), ("mlp", "embed"), scale=output_scale)
        self.dtype = jnp.dtype(dtype)
        self.d_model, self.mlp_dim = d_model, mlp_dim

    def __call__(self, x):
        x = kept(x.astype(self.dtype))
        gate, up = products(x, [self.gate, self.up], self.dtype)
        return product_into_stream(kept(self.activation(gate) * up), self.down, self.dtype)

    def flops_per_token(self, length: int) -> float:
        """6 d_model mlp_dim forward FLOPs, for three products; a multiply-add counts 2. `length` has no influence."""
        del length
        return product_flops(self.gate, self.up, self.down)


class GeGLU(SwiGLU):
    """y = (gelu(x W_gate) ⊙ x W_up) W_down, otherwise as `SwiGLU`. gelu by its approximation with tanh."""

    activation = staticmethod(jax.nn.gelu)
