"""The base class of the delta-rule mixers with a fixed-size memory: DeltaNet, Gated DeltaNet, Kimi Delta Attention."""

from __future__ import annotations

import functools

import jax
from flax import nnx

from deltaformer_jax import ops
from deltaformer_jax.layers.caches import StateCache, remember
from deltaformer_jax.layers.gates import ChannelDecay, HeadDecay
from deltaformer_jax.layers.linear import Gate, product_flops
from deltaformer_jax.layers.memory_inputs import MemoryInputs, MemoryOutput
from deltaformer_jax.layers.norms import l2_normalize
from deltaformer_jax.layers.padding import clear_padding


class DeltaRuleMixer(nnx.Module):
    """y = output(gated_delta_rule(q/|q|, k/|k|, v, β, g), x),    q, k, v = inputs(x),  β = c sigmoid(beta(x)),
    g = decay(x).

    `decay=None`: g = 0, no decay. `state_shape`: (value heads, K, V). `negative_eigenvalues`: c = 2 instead of 1. A
    subclass constructs the four parts in the order of the arguments; the order decides which random numbers each part's
    initial values get from a seed.
    """

    def __init__(
        self,
        inputs: MemoryInputs,
        beta: Gate,
        decay: HeadDecay | ChannelDecay | None,
        output: MemoryOutput,
        *,
        state_shape: tuple[int, int, int],
        negative_eigenvalues: bool,
        chunk_size: int | None,
        implementation: str | None,
    ):
        self.inputs, self.beta, self.decay, self.output = inputs, beta, decay, output
        self.beta_scale = 2.0 if negative_eigenvalues else 1.0
        self.state_shape, self.dtype = state_shape, inputs.dtype
        self.chunk_size, self.implementation = chunk_size, implementation

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
        rule = functools.partial(ops.gated_delta_rule, chunk_size=self.chunk_size, implementation=self.implementation)
        arrays = dict(
            query=l2_normalize(query),
            key=l2_normalize(key),
            value=value,
            beta=self.beta_scale * jax.nn.sigmoid(self.beta(x)),
            segment_ids=segment_ids,
        )
        if self.decay is not None:
            arrays["log_decay"] = self.decay(x)
        read, cache = remember(rule, arrays, cache, tails)
        return self.output(read, x, mapped), cache

    def init_cache(self, batch: int, capacity: int) -> StateCache:
        """An empty cache. Its size is fixed and it serves any number of tokens; `capacity` is ignored."""
        del capacity
        return StateCache.empty(batch, *self.state_shape, self.inputs.empty_tails(batch), self.dtype)

    def flops_per_token(self, length: int) -> float:
        """The products with kernels, and 6 K V for each value head: 2 K V each for the read Sᵀ k, the write, and the
        read Sᵀ q. It does not depend on `length`. The extra work of the chunked form is not counted."""
        del length
        heads, key_dim, value_dim = self.state_shape
        gates = product_flops(self.beta.kernel) + (0.0 if self.decay is None else self.decay.flops_per_token())
        kernels = self.inputs.flops_per_token() + gates + self.output.flops_per_token()
        return kernels + 6.0 * heads * key_dim * value_dim
