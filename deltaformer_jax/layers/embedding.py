"""Token embeddings, and the logits computed from the model's output.

    x_t = scale · E[token_t],        logits_t = y_t Eᵀ (tied)  or  y_t W (untied)

With a normalised head the logit of token v is y_t · W_v / ‖W_v‖, of W's column or E's row v, as in Baichuan-M1 (arXiv
2502.12671; the formula is that of its published code).

E and W start as truncated normals of standard deviation 0.02. The value is small because with a tied table a token's
logit for itself starts near 0.02 d_model. A larger value would be a confident wrong prediction, which training would
first have to undo. The scale √d_model brings x near unit size; models from elsewhere have 1. The table is padded to a
multiple of 128 rows so that it can be sharded evenly; no token id points to the added rows, and their logits are
dropped.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from deltaformer_jax.layers.linear import truncated_normal
from deltaformer_jax.ops.common.checks import as_int32
from deltaformer_jax.ops.common.tiles import accumulation_dtype
from deltaformer_jax.sharding.shards import cut_of, look_up_columns

ROW_MULTIPLE = 128
INITIAL_STD = 0.02


class Embedding(nnx.Module):
    """tokens int [B,T] -> [B,T,d_model] in `dtype`; `logits` [B,T,d_model] -> float32 [B,T,vocab_size].

    `tied`: the logits use the embedding table E as their kernel. `scale=None`: √d_model. `normalised`: each token's
    vector of that kernel is divided by its length, in float32. A token id outside [0,
    vocab_size) gives NaN. The id of a padding token (segment id 0) is ignored, and token 0's row is returned. Cost: 2
    d_model vocab_size FLOPs per token for the logits.
    """

    def __init__(
        self,
        vocab_size: int,
        d_model: int,
        *,
        tied: bool,
        scale: float | None = None,
        normalised: bool = False,
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        rows = -(-vocab_size // ROW_MULTIPLE) * ROW_MULTIPLE
        self.table = nnx.Param(truncated_normal(rngs, (rows, d_model), INITIAL_STD), axes=("vocab", "embed"))
        if tied:
            self.head = None
        else:
            self.head = nnx.Param(
                truncated_normal(rngs, (d_model, rows), INITIAL_STD), axes=("embed", "vocab"), compute=True
            )
        self.scale = math.sqrt(d_model) if scale is None else scale
        self.normalised = normalised
        self.vocab_size, self.d_model, self.rows, self.dtype = vocab_size, d_model, rows, jnp.dtype(dtype)

    def __call__(self, tokens, segment_ids=None):
        tokens = as_int32(tokens)
        if segment_ids is not None:
            tokens = jnp.where(segment_ids != 0, tokens, 0)
        row = jnp.where((tokens >= 0) & (tokens < self.vocab_size), tokens, self.rows)
        return self._vectors(row) if cut_of(self.table) is None else look_up_columns(self._vectors, row)

    def _vectors(self, row):
        vectors = self.table[...].at[row].get(mode="fill", fill_value=jnp.nan)
        return (vectors.astype(accumulation_dtype(vectors.dtype)) * self.scale).astype(self.dtype)

    def logits(self, x):
        # Operands are in the compute dtype, sums in float32 (float64 for float64).
        rows = x.astype(self.dtype).reshape(-1, self.d_model)
        kernel, width = (self.table[...], 1) if self.head is None else (self.head[...], 0)
        if self.normalised:
            kernel = _of_unit_length(kernel, width)
        product = _wide_product if accumulation_dtype(self.dtype) == self.dtype else _narrow_product
        return product(width, rows, kernel)[:, : self.vocab_size].reshape(*x.shape[:-1], self.vocab_size)

    def with_ready_head(self) -> Embedding:
        """The embedding with the kernel of its logits normalised once, for callers that take logits several times.

        A tied embedding then has a kernel apart from its table. The embedding itself, if nothing is to be normalised.
        """
        if not self.normalised:
            return self
        ready = nnx.merge(*nnx.split(self))
        kernel = self.table[...].T if self.head is None else self.head[...]
        ready.head = nnx.data(nnx.Param(_of_unit_length(kernel, 0), axes=("embed", "vocab"), compute=True))
        ready.normalised = False
        return ready

    def flops_per_token(self, length: int) -> float:
        """2 d_model vocab_size, for the logits. The lookup and the columns that pad the vocabulary are not counted."""
        del length
        return 2.0 * self.d_model * self.vocab_size


def _of_unit_length(kernel, width):
    """The kernel, whose axis `width` is d_model, with vectors of length 1 along it. A vector of zeros stays one."""
    wide = kernel.astype(accumulation_dtype(kernel.dtype))
    squares = jnp.sum(jnp.square(wide), axis=width, keepdims=True)
    return (wide * lax.rsqrt(jnp.where(squares > 0, squares, 1.0))).astype(kernel.dtype)


def _wide_product(width, rows, kernel):
    """rows [n, d] times the kernel, whose axis `width` is d, in the accumulation dtype: [n, v]."""
    wide = accumulation_dtype(rows.dtype)
    return lax.dot_general(rows, kernel.astype(rows.dtype), (((1,), (width,)), ((), ())), preferred_element_type=wide)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _narrow_product(width, rows, kernel):
    """`_wide_product` S = X Kᵀ for rows X in bfloat16 or float16, whose backward pass multiplies in that dtype too:

        dX = dS K,        dK = dSᵀ X

    The cotangent of the logits is float32. JAX's own rule would multiply it in float32, at half of the speed or less.
    The kernel's gradient is summed in float32.
    """
    return _wide_product(width, rows, kernel)


def _narrow_forward(width, rows, kernel):
    return _wide_product(width, rows, kernel), (rows, kernel)


def _narrow_backward(width, residuals, cotangent):
    rows, kernel = residuals
    narrow = cotangent.astype(rows.dtype)
    to_rows = (((1,), (1 - width,)), ((), ()))
    d_rows = lax.dot_general(narrow, kernel.astype(rows.dtype), to_rows, preferred_element_type=cotangent.dtype)
    left, right = (narrow, rows) if width == 1 else (rows, narrow)
    d_kernel = lax.dot_general(left, right, (((0,), (0,)), ((), ())), preferred_element_type=cotangent.dtype)
    return d_rows.astype(rows.dtype), d_kernel.astype(kernel.dtype)


_narrow_product.defvjp(_narrow_forward, _narrow_backward)
