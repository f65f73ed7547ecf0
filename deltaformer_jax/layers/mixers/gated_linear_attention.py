"""Gated linear attention: a linear memory whose key channels decay by data-dependent factors, one per channel.

    S ← Diag(e^{g_t}) S + k_t v_tᵀ,      o_t = Sᵀ q_t / √K,      y = (RMSNorm(o) ⊙ swish(x W_g)) W_o

with g = log sigmoid(x W₁ W₂ + b) / 16, a vector over K; W₁ W₂ has rank 16.
Source: Yang et al., arXiv 2312.06635, section 4.4.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from deltaformer_jax import ops
from deltaformer_jax.layers.caches import StateCache, remember
from deltaformer_jax.layers.linear import along, product, product_flops, product_of_low_rank, wide_kernel
from deltaformer_jax.layers.memory_inputs import MemoryInputs, MemoryOutput
from deltaformer_jax.layers.padding import clear_padding
from deltaformer_jax.ops.common.tiles import accumulation_dtype

RANK = 16
# Divides the log decay. At the start a channel then decays by sigmoid(0)^(1/16) = 0.96 per token, not by 0.5.
TEMPERATURE = 16.0


class GatedLinearAttention(nnx.Module):
    """A gated linear attention mixer with num_heads heads of queries, keys and values.

        GatedLinearAttention(d_model=256, num_heads=4, head_dim=32, value_dim=64, rngs=nnx.Rngs(0))

    `value_dim=None`: head_dim (the paper's keys are half as wide as its values). `conv_size`: width in tokens of short
    convolutions of q, k and v; 0, as in the paper: none. `output_gate=False` leaves out the factor swish(x W_g). The
    memory and g are float32; everything else is computed in `dtype`. `chunk_size` and `implementation` are passed to
    `ops.gated_linear_attention`.
    """

    def __init__(
        self,
        d_model: int,
        *,
        num_heads: int,
        head_dim: int,
        value_dim: int | None = None,
        conv_size: int = 0,
        output_gate: bool = True,
        norm_epsilon: float = 1e-6,
        output_norm_epsilon: float | None = None,
        output_scale: float = 1.0,
        chunk_size: int | None = None,
        implementation: str | None = None,
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        width = value_dim or head_dim
        self.inputs = MemoryInputs(
            d_model, num_heads, num_heads, head_dim, width, conv_size=conv_size, dtype=dtype, rngs=rngs
        )
        self.decay_down = wide_kernel(rngs, (d_model, RANK), ("embed", "rank"))
        self.decay_up = wide_kernel(rngs, (RANK, num_heads, head_dim), ("rank", "heads", "head_dim"))
        self.decay_bias = nnx.Param(
            jnp.zeros((num_heads, head_dim), jnp.float32), axes=("heads", "head_dim"), decay=False
        )
        self.output = MemoryOutput(
            d_model,
            num_heads,
            width,
            gate="swish" if output_gate else "",
            epsilon=norm_epsilon if output_norm_epsilon is None else output_norm_epsilon,
            output_scale=output_scale,
            dtype=dtype,
            rngs=rngs,
        )
        self.state_shape = (num_heads, head_dim, width)
        self.chunk_size, self.implementation, self.dtype = chunk_size, implementation, jnp.dtype(dtype)

    def __call__(self, x, *, segment_ids=None, positions=None, cache: StateCache | None = None):
        """x [B,T,d_model] -> (y [B,T,d_model] in the compute dtype, the updated cache or None).

        `segment_ids` int [B,T]: 0 is padding, whose output is 0; a document starts from an empty memory. `positions`
        are not used.
        """
        x = clear_padding(x, segment_ids)
        query, key, value, tails, mapped = self.inputs(
            x,
            segment_ids=segment_ids,
            tails=None if cache is None else cache.tails,
            beside=self.output.beside,
        )
        rule = functools.partial(
            ops.gated_linear_attention, chunk_size=self.chunk_size, implementation=self.implementation
        )
        arrays = dict(query=query, key=key, value=value, log_decay=self._log_decay(x), segment_ids=segment_ids)
        read, cache = remember(rule, arrays, cache, tails)
        return self.output(read, x, mapped), cache

    def _log_decay(self, x):
        wide = x.astype(accumulation_dtype(x.dtype))
        low = product_of_low_rank(wide, self.decay_down, wide.dtype, precision="highest")
        gate = product(low, self.decay_up, wide.dtype, precision="highest")
        return jax.nn.log_sigmoid(gate + along(self.decay_bias, gate)) / TEMPERATURE

    def init_cache(self, batch: int, capacity: int) -> StateCache:
        """An empty cache. Its size is fixed and it serves any number of tokens; `capacity` is ignored."""
        del capacity
        return StateCache.empty(batch, *self.state_shape, self.inputs.empty_tails(batch), self.dtype)

    def flops_per_token(self, length: int) -> float:
        """The products with kernels, and 4 K V for each head: 2 K V each for the write and the read. It does not depend
        on `length`. The extra work of the chunked form is not counted."""
        del length
        heads, key_dim, value_dim = self.state_shape
        gates = product_flops(self.decay_down, self.decay_up)
        return self.inputs.flops_per_token() + gates + self.output.flops_per_token() + 4.0 * heads * key_dim * value_dim
