"""Gated DeltaNet-2: Kimi Delta Attention whose β is two gates, one for what is erased and one for what is written.

    S ← Diag(e^{g_t}) S,      S ← S − k_t (Sᵀ (b_t ⊙ k_t))ᵀ + k_t (w_t ⊙ v_t)ᵀ,      o_t = Sᵀ q_t / √K
    y = (RMSNorm(o) ⊙ sigmoid(x W₁ W₂)) W_o

with q, k of unit length, the erase gate b = sigmoid(x W_b + c) per key channel, the write gate w = sigmoid(x W_w + d)
per value channel, and g as in Kimi Delta Attention. With b = w = β, one number per head, it is Kimi Delta Attention.
Source: Hatamizadeh, Choi, Kautz, Gated DeltaNet-2, arXiv 2605.22791. The recurrence is the paper's. Of the layer around
it only descriptions could be read: that both gates are sigmoids of full-rank projections, and that decay and output
gate have low rank. The biases c and d, and that `negative_eigenvalues` doubles both gates, are this library's choices.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from deltaformer_jax import ops
from deltaformer_jax.layers.caches import StateCache, remember
from deltaformer_jax.layers.gates import ChannelDecay, ChannelGate
from deltaformer_jax.layers.memory_inputs import MemoryInputs, MemoryOutput
from deltaformer_jax.layers.norms import l2_normalize
from deltaformer_jax.layers.padding import clear_padding
from deltaformer_jax.ops.common import heads as H


class GatedDeltaNet2(nnx.Module):
    """A Gated DeltaNet-2 mixer with H = num_heads query and key heads and Hv = num_value_heads value heads.

        GatedDeltaNet2(d_model=256, num_heads=4, head_dim=64, rngs=nnx.Rngs(0))

    `negative_eigenvalues`: b and w in (0, 2) instead of (0, 1). `beta_bias=False`: b and w without their biases. All
    other arguments are KimiDeltaAttention's. The memory, b, w and g are float32; everything else is computed in
    `dtype`. `chunk_size` and `implementation` are passed to `ops.generalized_delta_rule`, which has no kernels.
    """

    def __init__(
        self,
        d_model: int,
        *,
        num_heads: int,
        head_dim: int,
        num_value_heads: int | None = None,
        value_dim: int | None = None,
        conv_size: int = 4,
        output_gate: bool = True,
        output_gate_bias: bool = False,
        gate_rank: int | None = None,
        decay_lower_bound: float = 0.0,
        negative_eigenvalues: bool = False,
        beta_bias: bool = True,
        conv_bias: bool = False,
        input_silu: bool = False,
        output_gate_activation: str = "sigmoid",
        norm_epsilon: float = 1e-6,
        output_norm_epsilon: float | None = None,
        output_scale: float = 1.0,
        chunk_size: int | None = None,
        implementation: str | None = None,
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        heads, width = num_value_heads or num_heads, value_dim or head_dim
        self.inputs = MemoryInputs(
            d_model,
            num_heads,
            heads,
            head_dim,
            width,
            conv_size=conv_size,
            conv_bias=conv_bias,
            silu=input_silu,
            dtype=dtype,
            rngs=rngs,
        )
        self.erase = ChannelGate(d_model, heads, head_dim, bias=beta_bias, rngs=rngs)
        self.write = ChannelGate(d_model, heads, width, bias=beta_bias, rngs=rngs)
        self.decay = ChannelDecay(
            d_model, heads, head_dim, rank=gate_rank or head_dim, lower_bound=decay_lower_bound, rngs=rngs
        )
        self.output = MemoryOutput(
            d_model,
            heads,
            width,
            gate=output_gate_activation if output_gate else "",
            gate_rank=gate_rank or width,
            gate_bias=output_gate_bias,
            epsilon=norm_epsilon if output_norm_epsilon is None else output_norm_epsilon,
            output_scale=output_scale,
            dtype=dtype,
            rngs=rngs,
        )
        self.gate_scale = 2.0 if negative_eigenvalues else 1.0
        self.state_shape = (heads, head_dim, width)
        self.chunk_size, self.implementation, self.dtype = chunk_size, implementation, jnp.dtype(dtype)

    def __call__(self, x, *, segment_ids=None, positions=None, cache: StateCache | None = None):
        """x [B,T,d_model] -> (y [B,T,d_model] in the compute dtype, the updated cache or None).

        `segment_ids` int [B,T]: 0 is padding, whose output is 0; a document starts from an empty memory. `positions`
        are not used: the recurrence itself depends on the order of the tokens.
        """
        x = clear_padding(x, segment_ids)
        query, key, value, tails, mapped = self.inputs(
            x,
            segment_ids=segment_ids,
            tails=None if cache is None else cache.tails,
            beside=self.output.beside,
        )
        key, log_decay = l2_normalize(key), self.decay(x)
        gated = lambda part, y: self.gate_scale * jax.nn.sigmoid(part(x)) * y.astype(log_decay.dtype)
        # The op's erase key reads the state before its decay; this rule's reads the state after it.
        erase_key = jnp.exp(log_decay) * gated(self.erase, H.repeat_heads(key, log_decay.shape[2]))
        arrays = dict(
            query=l2_normalize(query),
            key=key,
            value=gated(self.write, value).astype(value.dtype),
            erase_key=erase_key,
            erase_write=key,
            log_decay=log_decay,
            segment_ids=segment_ids,
        )
        rule = functools.partial(
            ops.generalized_delta_rule, chunk_size=self.chunk_size, implementation=self.implementation
        )
        read, cache = remember(rule, arrays, cache, tails)
        return self.output(read, x, mapped), cache

    def init_cache(self, batch: int, capacity: int) -> StateCache:
        """An empty cache. Its size is fixed and it serves any number of tokens; `capacity` is ignored."""
        del capacity
        return StateCache.empty(batch, *self.state_shape, self.inputs.empty_tails(batch), self.dtype)

    def flops_per_token(self, length: int) -> float:
        """The products with kernels, and 6 K V for each value head: 2 K V each for the read Sᵀ (b ⊙ k), the write, and
        the read Sᵀ q. It does not depend on `length`. The extra work of the op is not counted."""
        del length
        heads, key_dim, value_dim = self.state_shape
        gates = self.erase.flops_per_token() + self.write.flops_per_token() + self.decay.flops_per_token()
        kernels = self.inputs.flops_per_token() + gates + self.output.flops_per_token()
        return kernels + 6.0 * heads * key_dim * value_dim
