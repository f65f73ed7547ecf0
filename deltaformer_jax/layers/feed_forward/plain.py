"""Feed-forward layers of two products: y = f(x W_up) W_down.

Sources: relu, Vaswani et al., arXiv 1706.03762, eq. 2; gelu, Hendrycks and Gimpel, arXiv 1606.08415; relu², So et al.,
"Primer", arXiv 2109.08668. No biases.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from deltaformer_jax.layers.feed_forward.sizes import check_width
from deltaformer_jax.layers.linear import kernel, product_flops, product_into_stream, products
from deltaformer_jax.ops.common.rematerialisation import kept


class ReluFeedForward(nnx.Module):
    """y = relu(x W_up) W_down: x [B,T,d_model] -> [B,T,d_model] in `dtype`, the compute dtype.

    `output_scale` multiplies W_down's initial values. Cost: 4 d_model mlp_dim FLOPs per token.
    """

    activation = staticmethod(jax.nn.relu)

    def __init__(self, d_model: int, mlp_dim: int, *, output_scale: float = 1.0, dtype=jnp.float32, rngs: nnx.Rngs):
        check_width(mlp_dim)
        self.up = kernel(rngs, (d_model, mlp_dim), ("embed", "mlp"))
        self.down = kernel(rngs, (mlp_dim, d_model), ("mlp", "embed"), scale=output_scale)
        self.dtype = jnp.dtype(dtype)
        self.d_model, self.mlp_dim = d_model, mlp_dim

    def __call__(self, x):
        x = kept(x.astype(self.dtype))
        (up,) = products(x, [self.up], self.dtype)
        return product_into_stream(kept(self.activation(up)), self.down, self.dtype)

    def flops_per_token(self, length: int) -> float:
        """4 d_model mlp_dim forward FLOPs, for two products; a multiply-add counts 2. `length` has no influence."""
        del length
        return product_flops(self.up, self.down)


class GeluFeedForward(ReluFeedForward):
    """y = gelu(x W_up) W_down, otherwise as `ReluFeedForward`. gelu by its approximation with tanh."""

    activation = staticmethod(jax.nn.gelu)


class SquaredReluFeedForward(ReluFeedForward):
    """y = relu(x W_up)² W_down, otherwise as `ReluFeedForward`."""

    @staticmethod
    def activation(x):
        return jnp.square(jax.nn.relu(x))
