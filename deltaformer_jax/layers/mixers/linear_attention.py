"""Linear attention: softmax attention with φ(q)·φ(k) in place of e^{q·k}, which needs only a memory of fixed size.

    S ← S + φ(k_t) v_tᵀ,   z ← z + φ(k_t),      o_t = Sᵀ φ(q_t) / (z · φ(q_t)),      φ(x) = elu(x) + 1 > 0

The code stores z as one more column of S, by appending a feature that is always 1 to every value.
Source: Katharopoulos et al., arXiv 2006.16236, eq. 7 to 9 and 16 to 20.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from deltaformer_jax import ops
from deltaformer_jax.layers.caches import StateCache, remember
from deltaformer_jax.layers.linear import kernel, product_flops, product_into_stream
from deltaformer_jax.layers.memory_inputs import MemoryInputs
from deltaformer_jax.layers.padding import clear_padding
from deltaformer_jax.ops.common.tiles import accumulation_dtype


class LinearAttention(nnx.Module):
    """A linear attention mixer with num_heads heads of queries, keys and values.

        LinearAttention(d_model=256, num_heads=4, head_dim=64, rngs=nnx.Rngs(0))

    `value_dim=None`: head_dim. Features, memory and normaliser are float32; everything else is computed in `dtype`.
    `chunk_size` and `implementation` are passed to `ops.gated_linear_attention`.
    """

    def __init__(
        self,
        d_model: int,
        *,
        num_heads: int,
        head_dim: int,
        value_dim: int | None = None,
        output_scale: float = 1.0,
        chunk_size: int | None = None,
        implementation: str | None = None,
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        width = value_dim or head_dim
        self.inputs = MemoryInputs(d_model, num_heads, num_heads, head_dim, width, conv_size=0, dtype=dtype, rngs=rngs)
        self.output = kernel(
            rngs,
            (num_heads, width, d_model),
            ("heads", "head_dim", "embed"),
            fan_in=num_heads * width,
            scale=output_scale,
        )
        self.state_shape = (num_heads, head_dim, width + 1)
        self.chunk_size, self.implementation, self.dtype = chunk_size, implementation, jnp.dtype(dtype)

    def __call__(self, x, *, segment_ids=None, positions=None, cache: StateCache | None = None):
        """x [B,T,d_model] -> (y [B,T,d_model] in the compute dtype, the updated cache or None).

        `segment_ids` int [B,T]: 0 is padding, whose output is 0; a document starts from an empty memory. `positions`
        are not used.
        """
        x = clear_padding(x, segment_ids)
        query, key, value, tails, _ = self.inputs(x)
        # Sums of positive features grow with the length. They are kept in float32 and divided before rounding to dtype.
        wide = accumulation_dtype(self.dtype)
        feature = lambda x: jax.nn.elu(x.astype(wide)) + 1
        value = jnp.concatenate([value.astype(wide), jnp.ones((*value.shape[:3], 1), wide)], axis=-1)
        rule = functools.partial(
            ops.gated_linear_attention, scale=1.0, chunk_size=self.chunk_size, implementation=self.implementation
        )
        arrays = dict(query=feature(query), key=feature(key), value=value, segment_ids=segment_ids)
        read, cache = remember(rule, arrays, cache, tails)
        # The normaliser is positive at real tokens and 0 at padding.
        total = jnp.where(read[..., -1:] > 0, read[..., -1:], 1)
        read = (read[..., :-1] / total).astype(self.dtype)
        return product_into_stream(read, self.output, self.dtype, axes=2), cache

    def init_cache(self, batch: int, capacity: int) -> StateCache:
        """An empty cache. Its size is fixed and it serves any number of tokens; `capacity` is ignored."""
        del capacity
        return StateCache.empty(batch, *self.state_shape, (), self.dtype)

    def flops_per_token(self, length: int) -> float:
        """The products with kernels, and 4 K (V + 1) for each head. It does not depend on `length`. The extra work of
        the chunked form is not counted."""
        del length
        heads, key_dim, value_dim = self.state_shape
        return self.inputs.flops_per_token() + product_flops(self.output) + 4.0 * heads * key_dim * value_dim
