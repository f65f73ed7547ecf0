"""Token embeddings and the way back to logits.

    x_t = √d_model · E[token_t],        logits_t = y_t Eᵀ (tied)  or  y_t W (untied)

E and W start as truncated normals of standard deviation 0.02: small, because with a tied table a token's logit for
itself starts at 0.02 d_model, and a larger one is a confident wrong guess that training first has to undo; √d_model
brings x near unit size. The table is padded to a multiple of 128 rows, so that it can be cut evenly over devices; no
token looks the added rows up, and their logits are cut off.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
from flax import nnx

from deltaformer_jax.layers.linear import truncated_normal
from deltaformer_jax.ops.common.checks import as_int32
from deltaformer_jax.ops.common.tiles import accumulation_dtype

ROW_MULTIPLE = 128
INITIAL_STD = 0.02


class Embedding(nnx.Module):
    """tokens int [B,T] -> [B,T,d_model] in `dtype`; `logits` [B,T,d_model] -> float32 [B,T,vocab_size].

    `tied`: the logits' kernel is the table. A token outside [0, vocab_size) gives NaN, a padding token (segment id 0)
    is not looked at and gives token 0's row. Cost: 2 d_model vocab_size FLOPs per token for the logits.
    """

    def __init__(self, vocab_size: int, d_model: int, *, tied: bool, dtype=jnp.float32, rngs: nnx.Rngs):
        rows = -(-vocab_size // ROW_MULTIPLE) * ROW_MULTIPLE
        self.table = nnx.Param(truncated_normal(rngs, (rows, d_model), INITIAL_STD), axes=("vocab", "embed"))
        if tied:
            self.head = None
        else:
            self.head = nnx.Param(
                truncated_normal(rngs, (d_model, rows), INITIAL_STD), axes=("embed", "vocab"), compute=True
            )
        self.vocab_size, self.d_model, self.rows, self.dtype = vocab_size, d_model, rows, jnp.dtype(dtype)

    def __call__(self, tokens, segment_ids=None):
        tokens = as_int32(tokens)
        if segment_ids is not None:
            tokens = jnp.where(segment_ids != 0, tokens, 0)
        row = jnp.where((tokens >= 0) & (tokens < self.vocab_size), tokens, self.rows)
        vectors = self.table[...].at[row].get(mode="fill", fill_value=jnp.nan)
        return (vectors.astype(accumulation_dtype(vectors.dtype)) * math.sqrt(self.d_model)).astype(self.dtype)

    def logits(self, x):
        # Operands in the compute dtype, sums in float32 (float64 for float64).
        wide = accumulation_dtype(self.dtype)
        rows = x.astype(self.dtype).reshape(-1, self.d_model)
        if self.head is None:
            scores = jnp.einsum("nd,vd->nv", rows, self.table[...].astype(self.dtype), preferred_element_type=wide)
        else:
            scores = jnp.einsum("nd,dv->nv", rows, self.head[...].astype(self.dtype), preferred_element_type=wide)
        return scores[:, : self.vocab_size].reshape(*x.shape[:-1], self.vocab_size)

    def flops_per_token(self, length: int) -> float:
        """2 d_model vocab_size, of the logits; looking a row up counts nothing. The padding's columns don't count."""
        del length
        return 2.0 * self.d_model * self.vocab_size
