"""Kimi Delta Attention: the delta rule with a memory whose key channels decay by data-dependent factors, one each.

    S ← Diag(e^{g_t}) S,      S ← S + β_t k_t (v_t − Sᵀ k_t)ᵀ,      o_t = Sᵀ q_t / √K
    y = (RMSNorm(o) ⊙ sigmoid(x W₁ W₂)) W_o

with q, k of unit length, β = sigmoid(x W_β + b) and g = −e^A softplus(x W₃ W₄ + b'), a vector over K.
Source: Kimi Linear, arXiv 2510.26692, section 3.
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx

from deltaformer_jax.layers.gates import ChannelDecay
from deltaformer_jax.layers.linear import Gate
from deltaformer_jax.layers.memory_inputs import MemoryInputs, MemoryOutput
from deltaformer_jax.layers.mixers.delta_rule import DeltaRuleMixer


class KimiDeltaAttention(DeltaRuleMixer):
    """A Kimi Delta Attention mixer with num_heads heads of queries, keys and values.

        KimiDeltaAttention(d_model=256, num_heads=4, head_dim=64, rngs=nnx.Rngs(0))

    `value_dim=None`: head_dim. The decay's kernel W₃ W₄ has rank head_dim, the output gate's kernel W₁ W₂ rank
    value_dim. `conv_size`: width in tokens of the short convolutions; 0: none. `output_gate=False` leaves out the
    factor sigmoid(x W₁ W₂). `negative_eigenvalues`: β in (0, 2) instead of (0, 1). The memory, β and g are float32;
    everything else is computed in `dtype`. `chunk_size` and `implementation` are passed to `ops.gated_delta_rule`.
    """

    def __init__(
        self,
        d_model: int,
        *,
        num_heads: int,
        head_dim: int,
        value_dim: int | None = None,
        conv_size: int = 4,
        output_gate: bool = True,
        negative_eigenvalues: bool = False,
        norm_epsilon: float = 1e-6,
        output_scale: float = 1.0,
        chunk_size: int | None = None,
        implementation: str | None = None,
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        width = value_dim or head_dim
        super().__init__(
            MemoryInputs(d_model, num_heads, num_heads, head_dim, width, conv_size=conv_size, dtype=dtype, rngs=rngs),
            Gate(d_model, num_heads, axis="heads", rngs=rngs),
            ChannelDecay(d_model, num_heads, head_dim, rank=head_dim, rngs=rngs),
            MemoryOutput(
                d_model,
                num_heads,
                width,
                gate="sigmoid" if output_gate else "",
                gate_rank=width,
                epsilon=norm_epsilon,
                output_scale=output_scale,
                dtype=dtype,
                rngs=rngs,
            ),
            state_shape=(num_heads, head_dim, width),
            negative_eigenvalues=negative_eigenvalues,
            chunk_size=chunk_size,
            implementation=implementation,
        )
