"""The gated feed-forward layer.

Source: Shazeer, "GLU Variants Improve Transformer", arXiv 2002.05202, eq. 6 (SwiGLU, no biases).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from deltaformer_jax.layers.linear import kernel, product_flops, product_into_stream, products
from deltaformer_jax.ops.common.rematerialisation import kept


class SwiGLU(nnx.Module):
    """y = (silu(x W_gate) ⊙ x W_up) W_down: x [B,T,d_model] -> [B,T,d_model] in `dtype`, the compute dtype.

    `output_scale` multiplies W_down's initial values; the model gives 1/√(2 num_layers).
    Cost: 6 d_model mlp_dim FLOPs per token.
    """

    def __init__(self, d_model: int, mlp_dim: int, *, output_scale: float = 1.0, dtype=jnp.float32, rngs: nnx.Rngs):
        if mlp_dim < 1:
            raise ValueError(f"mlp_dim={mlp_dim} must be at least 1")
        self.gate = kernel(rngs, (d_model, mlp_dim), ("embed", "mlp"))
        self.up = kernel(rngs, (d_model, mlp_dim), ("embed", "mlp"))
        self.down = kernel(rngs, (mlp_dim, d_model), ("mlp", "embed"), scale=output_scale)
        self.dtype = jnp.dtype(dtype)
        self.d_model, self.mlp_dim = d_model, mlp_dim

    def __call__(self, x):
        x = kept(x.astype(self.dtype))
        gate, up = products(x, [self.gate, self.up], self.dtype)
        return product_into_stream(kept(jax.nn.silu(gate) * up), self.down, self.dtype)

    def flops_per_token(self, length: int) -> float:
        """6 d_model mlp_dim forward FLOPs, for three products; a multiply-add counts 2. `length` has no influence."""
        del length
        return product_flops(self.gate, self.up, self.down)
