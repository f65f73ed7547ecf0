"""DeltaProduct: several steps of the delta rule for each token, with keys, values and strengths of their own.

    S ← S + β_{t,j} k_{t,j} (v_{t,j} − Sᵀ k_{t,j})ᵀ,    j = 1 … n,      then o_t = Sᵀ q_t / √K

with q, k of unit length. The transition of a token is a product of n matrices I − β k kᵀ. With β up to 2
(`negative_eigenvalues`) each of them may reflect. Two reflections make a rotation, and n of them any permutation that
is a product of n swaps.
Gated DeltaProduct lets the memory decay before the first of a token's steps, by one number per head.

Each is the delta rule on n·T tokens, of which every n-th is read. With n = 1 they are DeltaNet and Gated DeltaNet.
Source: Siems et al., DeltaProduct, arXiv 2502.10297.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from deltaformer_jax import ops
from deltaformer_jax.layers.caches import StateCache
from deltaformer_jax.layers.gates import HeadDecay
from deltaformer_jax.layers.linear import Gate
from deltaformer_jax.layers.memory_inputs import MemoryInputs, MemoryOutput
from deltaformer_jax.layers.mixers.delta_rule import DeltaRuleMixer
from deltaformer_jax.layers.norms import l2_normalize
from deltaformer_jax.layers.padding import clear_padding
from deltaformer_jax.sharding import over_devices


class DeltaProduct(DeltaRuleMixer):
    """A DeltaProduct mixer with H = num_heads query and key heads and Hv = num_value_heads value heads.

        DeltaProduct(d_model=256, num_heads=4, head_dim=64, householder_steps=2, negative_eigenvalues=True, ...)

    `householder_steps`: n, the steps of the delta rule per token; time and the kernels of keys, values and β grow with
    it, the state does not. All other arguments are DeltaNet's, and with n = 1 so are the parameters and the output. The
    memory and β are float32; everything else is computed in `dtype`. `chunk_size`, in steps, and `implementation` are
    passed to `ops.gated_delta_rule`. `output_gate=None`: none, in GatedDeltaProduct one.

    `inputs` and `beta` have n·heads heads, the n steps of a head side by side.
    """

    decays = False

    def __init__(
        self,
        d_model: int,
        *,
        num_heads: int,
        head_dim: int,
        householder_steps: int = 2,
        num_value_heads: int | None = None,
        value_dim: int | None = None,
        conv_size: int = 4,
        output_gate: bool | None = None,
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
                writes=_checked(householder_steps),
                dtype=dtype,
                rngs=rngs,
            ),
            Gate(d_model, heads * householder_steps, axis="heads", bias=beta_bias, rngs=rngs),
            HeadDecay(d_model, heads, rngs=rngs) if self.decays else None,
            MemoryOutput(
                d_model,
                heads,
                width,
                gate=output_gate_activation if (self.decays if output_gate is None else output_gate) else "",
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
        self.steps = householder_steps

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
        arrays = dict(
            query=jnp.repeat(l2_normalize(query), self.steps, axis=1),  # all but a token's last reads are dropped
            key=self._in_turn(l2_normalize(key)),
            value=self._in_turn(value),
            beta=self._in_turn(self.beta_scale * jax.nn.sigmoid(self.beta(x))),
            segment_ids=None if segment_ids is None else jnp.repeat(segment_ids, self.steps, axis=1),
        )
        if self.decay is not None:
            decay = self.decay(x)
            later = jnp.zeros((*decay.shape[:2], self.steps - 1, decay.shape[2]), decay.dtype)
            arrays["log_decay"] = jnp.concatenate([decay[:, :, None], later], axis=2).reshape(
                decay.shape[0], -1, decay.shape[2]
            )
        rule = functools.partial(ops.gated_delta_rule, chunk_size=self.chunk_size, implementation=self.implementation)
        if cache is None:
            read = over_devices(rule, arrays)
        else:
            read, state = rule(**arrays, initial_state=cache.state)
            cache = cache.after(state, tails, segment_ids, x.shape[1])
        return self.output(read[:, self.steps - 1 :: self.steps], x, mapped), cache

    def _in_turn(self, x):
        """[B, T, heads·n, ...] -> [B, T·n, heads, ...]."""
        x = jnp.swapaxes(x.reshape(*x.shape[:2], -1, self.steps, *x.shape[3:]), 2, 3)
        return x.reshape(x.shape[0], -1, *x.shape[3:])

    def flops_per_token(self, length: int) -> float:
        """The products with kernels, and (4 n + 2) K V for each value head: 2 K V each for the reads Sᵀ k and the
        writes of the n steps, and for the read Sᵀ q. It does not depend on `length`. The extra work of the chunked form
        is not counted."""
        heads, key_dim, value_dim = self.state_shape
        return super().flops_per_token(length) + 4.0 * (self.steps - 1) * heads * key_dim * value_dim


class GatedDeltaProduct(DeltaProduct):
    """A Gated DeltaProduct mixer with H = num_heads query and key heads and Hv = num_value_heads value heads.

        GatedDeltaProduct(d_model=256, num_heads=4, head_dim=64, householder_steps=2, negative_eigenvalues=True, ...)

    The arguments are DeltaProduct's. The memory decays, by g in float32, before the first of a token's steps, and
    `output_gate=None` is an output gate. With n = 1 parameters and output are GatedDeltaNet's.
    """

    decays = True


def _checked(steps: int) -> int:
    if steps < 1:
        raise ValueError(f"householder_steps={steps} must be at least 1")
    return steps
