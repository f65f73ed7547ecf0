"""Retention: a linear memory with one fixed decay per head.

    S ← γ_h S + k_t v_tᵀ,      o_t = Sᵀ q_t / √K,      γ_h = 1 − 2^{−5−h},      y = (RMSNorm(o) ⊙ swish(x W_g)) W_o

with rotary queries and keys. Source: Sun et al., RetNet, arXiv 2307.08621, eq. 5 to 8.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np
from flax import nnx

from deltaformer_jax import ops
from deltaformer_jax.layers.caches import StateCache, remember
from deltaformer_jax.layers.memory_inputs import MemoryInputs, MemoryOutput
from deltaformer_jax.layers.padding import clear_padding, default_positions
from deltaformer_jax.layers.rotary import check_rotary, rotate


class Retention(nnx.Module):
    """A retention mixer with num_heads heads; head h = 0, 1, ... has the decay γ_h = 1 − 2^(−5−h) per token.

        Retention(d_model=256, num_heads=4, head_dim=64, rngs=nnx.Rngs(0))

    `value_dim=None`: head_dim (the paper's values are twice as wide as its keys). `rope_base=None`: no rotary
    embedding. `output_gate=False` leaves out the factor swish(x W_g). The memory is float32; everything else is
    computed in `dtype`. `chunk_size` and `implementation` are passed to `ops.gated_linear_attention`.
    """

    def __init__(
        self,
        d_model: int,
        *,
        num_heads: int,
        head_dim: int,
        value_dim: int | None = None,
        rope_base: float | None = 10_000.0,
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
        check_rotary(head_dim, rope_base)
        self.inputs = MemoryInputs(d_model, num_heads, num_heads, head_dim, width, conv_size=0, dtype=dtype, rngs=rngs)
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
        self.rope_base = rope_base
        self.state_shape = (num_heads, head_dim, width)
        self.chunk_size, self.implementation, self.dtype = chunk_size, implementation, jnp.dtype(dtype)

    def __call__(self, x, *, segment_ids=None, positions=None, cache: StateCache | None = None):
        """x [B,T,d_model] -> (y [B,T,d_model] in the compute dtype, the updated cache or None).

        `segment_ids` int [B,T]: 0 is padding, whose output is 0; a document starts from an empty memory. `positions`
        int [B,T] for the rotary embedding: by default the index among the segment's real tokens, counted on from the
        tokens in the cache.
        """
        x = clear_padding(x, segment_ids)
        query, key, value, tails, mapped = self.inputs(x, beside=self.output.beside)
        if self.rope_base is not None:
            positions = default_positions(x, segment_ids, cache) if positions is None else positions
            query, key = rotate(query, positions, self.rope_base), rotate(key, positions, self.rope_base)
        rule = functools.partial(
            ops.gated_linear_attention, chunk_size=self.chunk_size, implementation=self.implementation
        )
        decays = jnp.broadcast_to(log_decays(self.state_shape[0]), (*x.shape[:2], self.state_shape[0]))
        arrays = dict(query=query, key=key, value=value, log_decay=decays, segment_ids=segment_ids)
        read, cache = remember(rule, arrays, cache, tails)
        return self.output(read, x, mapped), cache

    def init_cache(self, batch: int, capacity: int) -> StateCache:
        """An empty cache. Its size is fixed and it serves any number of tokens; `capacity` is ignored."""
        del capacity
        return StateCache.empty(batch, *self.state_shape, (), self.dtype)

    def flops_per_token(self, length: int) -> float:
        """The products with kernels, and 4 K V for each head: 2 K V each for the write and the read. It does not depend
        on `length`. The extra work of the chunked form is not counted."""
        del length
        heads, key_dim, value_dim = self.state_shape
        return self.inputs.flops_per_token() + self.output.flops_per_token() + 4.0 * heads * key_dim * value_dim


def log_decays(heads: int):
    """log(1 − 2^(−5−h)) [heads]. log1p keeps the precision where the decay is close to 1."""
    return jnp.asarray(np.log1p(-(2.0 ** (-5.0 - np.arange(heads)))))
