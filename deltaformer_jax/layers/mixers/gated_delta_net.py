"""Gated DeltaNet: the delta rule with a memory that decays by a data-dependent factor per head.

    S ← e^{g_t} S,      S ← S + β_t k_t (v_t − Sᵀ k_t)ᵀ,      o_t = Sᵀ q_t / √K
    y = (RMSNorm(o) ⊙ swish(x W_g)) W_o

with q, k of unit length, β = sigmoid(x W_β + b) and g = −e^A softplus(x W + b'), one number per head.
Source: Yang, Kautz, Hatamizadeh, Gated Delta Networks, arXiv 2412.06464, eq. 10 and section 3.4; grouped value heads
as in Qwen3-Next.
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx

from deltaformer_jax.layers.gates import HeadDecay
from deltaformer_jax.layers.linear import Gate
from deltaformer_jax.layers.memory_inputs import MemoryInputs, MemoryOutput
from deltaformer_jax.layers.mixers.delta_rule import DeltaRuleMixer


class GatedDeltaNet(DeltaRuleMixer):
    """A Gated DeltaNet mixer with H = num_heads query and key heads and Hv = num_value_heads value heads.

        GatedDeltaNet(d_model=256, num_heads=4, head_dim=64, rngs=nnx.Rngs(0))

    `num_value_heads=None`: H; otherwise a multiple of H. `value_dim=None`: head_dim. `conv_size`: width in tokens of
    the short convolutions; 0: none. `output_gate=False` leaves out the factor swish(x W_g). `negative_eigenvalues`: β
    in (0, 2) instead of (0, 1). `beta_bias=False`: β without its bias. `conv_bias`: biases of the convolutions.
    `input_silu`: SiLU on q, k and v also where there is no convolution. `output_gate_activation`: "swish" or "sigmoid".
    `output_norm_epsilon=None`: norm_epsilon. The memory, β and g are float32; everything else is computed in `dtype`.
    `chunk_size` and `implementation` are passed to `ops.gated_delta_rule`.
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
        negative_eigenvalues: bool = False,
        beta_bias: bool = True,
        conv_bias: bool = False,
        input_silu: bool = False,
        output_gate_activation: str = "swish",
        norm_epsilon: float = 1e-6,
        output_norm_epsilon: float | None = None,
        output_scale: float = 1.0,
        chunk_size: int | None = None,
        implementation: str | None = None,
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        heads, width = num_value_heads or num_heads, value_dim or head_dim
        super().__init__(
            MemoryInputs(
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
            ),
            Gate(d_model, heads, axis="heads", bias=beta_bias, rngs=rngs),
            HeadDecay(d_model, heads, rngs=rngs),
            MemoryOutput(
                d_model,
                heads,
                width,
                gate=output_gate_activation if output_gate else "",
                epsilon=norm_epsilon if output_norm_epsilon is None else output_norm_epsilon,
                output_scale=output_scale,
                dtype=dtype,
                rngs=rngs,
            ),
            state_shape=(heads, head_dim, width),
            negative_eigenvalues=negative_eigenvalues,
            chunk_size=chunk_size,
            implementation=implementation,
        )
