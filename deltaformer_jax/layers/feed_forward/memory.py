"""A feed-forward layer as an associative memory: the similarities of attention, over pairs that are parameters.

    y = Σ_j κ(x, k_j) v_j,        κ(x, k) = s, max(s, 0), e^s, or e^s / Σ_j e^s        with s = x·k

k_j and v_j are the N = mlp_dim keys and values. With κ = softmax this is attention over N pairs that every token sees.
Source: Zhong et al., arXiv 2505.19488, which reads the Transformer's feed-forward layer as such a memory.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from deltaformer_jax.config.checks import check_argument
from deltaformer_jax.layers.feed_forward.sizes import check_width
from deltaformer_jax.layers.linear import kernel, product_flops, product_into_stream, products
from deltaformer_jax.ops.common.rematerialisation import kept
from deltaformer_jax.ops.common.similarity import as_write_similarity


class MemoryFeedForward(nnx.Module):
    """y = Σ_j κ(x, k_j) v_j: x [B,T,d_model] -> [B,T,d_model] in `dtype`, the compute dtype.

    feed_forward_similarity: κ, "linear", "relu", "exp" or "softmax", in float32. `output_scale` multiplies the values'
    initial values. Cost: 4 d_model mlp_dim FLOPs per token.

    The values' initial variance is 1/N for the unnormalised similarities, as in other feed-forward layers. A softmax
    makes means of them, so there it is 1: y then has about the variance Σ_j κ_j².
    """

    def __init__(
        self,
        d_model: int,
        mlp_dim: int,
        *,
        feed_forward_similarity: str = "softmax",
        output_scale: float = 1.0,
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        check_width(mlp_dim)
        check_argument("feed_forward_similarity", feed_forward_similarity)
        self.similarity = as_write_similarity(feed_forward_similarity, "feed_forward_similarity")
        normalised = self.similarity.normalised
        self.keys = kernel(rngs, (d_model, mlp_dim), ("embed", "mlp"))
        self.values = kernel(
            rngs, (mlp_dim, d_model), ("mlp", "embed"), fan_in=1 if normalised else mlp_dim, scale=output_scale
        )
        # The keys start with variance 1/d_model, so x·k has about x's variance: the scores need no other scale.
        self.dtype = jnp.dtype(dtype)
        self.d_model, self.mlp_dim = d_model, mlp_dim

    def __call__(self, x):
        x = kept(x.astype(self.dtype))
        (scores,) = products(x, [self.keys], self.dtype)
        scores = scores.astype(jnp.promote_types(scores.dtype, jnp.float32))
        if self.similarity.normalised:
            weights = jax.nn.softmax(scores, axis=-1)
        else:
            weights = self.similarity.weight(scores)
        return product_into_stream(kept(weights.astype(self.dtype)), self.values, self.dtype)

    def flops_per_token(self, length: int) -> float:
        """4 d_model mlp_dim forward FLOPs, for two products; a multiply-add counts 2. `length` has no influence."""
        del length
        return product_flops(self.keys, self.values)
