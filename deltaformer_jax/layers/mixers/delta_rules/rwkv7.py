"""RWKV-7's time mixing: a delta rule that erases with one key and writes with another, at a rate for each key channel.

    S ← Diag(w_t) S − (a_t ⊙ κ_t) (Sᵀ κ_t)ᵀ + k̃_t v_tᵀ,      o_t = Sᵀ r_t
    y = (g ⊙ (RMSNorm(o) + (r · (ρ ⊙ k̃)) v)) W_o

The vectors of a token come from its x mixed with the previous token's, x^i = x + (x_{t−1} − x) ⊙ μ_i, with a trained μ
for each of r, k, v, w, a and g:

    r, k, v = x^r W_r, x^k W_k, x^v W_v            the read, key and value of each head
    w = exp(−e^{−1/2} sigmoid(tanh(x^w A) B + c))  decay, in (0.545, 1)
    a = sigmoid(x^a A B + c)                       learning rate, in (0, 1); A, B and c are each gate's own
    g = sigmoid(x^g A) B                           output gate
    κ = k ⊙ ξ / ‖k ⊙ ξ‖                            the key that is erased
    k̃ = k ⊙ (1 + (a − 1) ⊙ α)                      the key that is written

ξ, α and ρ are trained, one number per key channel. Source: Peng et al., RWKV-7, arXiv 2503.14456. The update is the
paper's. What is around it follows descriptions of the paper's block; its text and code were not compared.

What differs from the paper's block: values are not mixed with those of the first layer, because mixers do not see each
other; o is normalised by an RMSNorm with a gain that the heads share, where the paper has a group norm; μ starts
uniform in (0, 1), where the paper's depends on the layer; and the feed-forward layer is the model's own, without a
token shift.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx

from deltaformer_jax import ops
from deltaformer_jax.layers.caches import StateCache, remember
from deltaformer_jax.layers.linear import (
    along,
    kernel,
    product,
    product_flops,
    product_into_stream,
    product_of_low_rank,
    wide_kernel,
)
from deltaformer_jax.layers.norms import HeadNorm, l2_normalize
from deltaformer_jax.layers.padding import clear_padding
from deltaformer_jax.layers.short_convolution import weighted_sum
from deltaformer_jax.ops.common.tiles import accumulation_dtype
from deltaformer_jax.sharding import over_previous_tokens

# The six mixes of a token with the one before it, in the order of the rows of μ.
_MIXES = ("read", "key", "value", "decay", "rate", "gate")


class _LowRank(nnx.Module):
    """f(x A) B + c: x [B,T,d_model] -> [B,T,heads,width], in float32 (float64 for float64) if `wide`, else in x's
    dtype. `start` [heads, width]: c's first value; None: no c."""

    def __init__(self, d_model, rank, heads, width, *, inner=lambda x: x, start=None, wide=True, rngs):
        draw = wide_kernel if wide else kernel
        self.down = draw(rngs, (d_model, rank), ("embed", "rank"))
        self.up = draw(rngs, (rank, heads, width), ("rank", "heads", "head_dim"))
        self.bias = None if start is None else nnx.Param(start, axes=("heads", "head_dim"), decay=False)
        self.inner, self.wide = inner, wide

    def __call__(self, x):
        dtype = accumulation_dtype(x.dtype) if self.wide else x.dtype
        precision = "highest" if self.wide else None
        low = self.inner(product_of_low_rank(x.astype(dtype), self.down, dtype, precision=precision))
        y = product(low, self.up, dtype, precision=precision)
        return y if self.bias is None else y + along(self.bias, y)

    def flops_per_token(self) -> float:
        return product_flops(self.down, self.up)


class RWKV7(nnx.Module):
    """A mixer with the update of RWKV-7, with num_heads heads of reads, keys and values.

        RWKV7(d_model=256, num_heads=4, head_dim=64, rngs=nnx.Rngs(0))

    `value_dim=None`: head_dim. `gate_rank` is the rank of the low-rank kernels A B of decay, learning rate and output
    gate; None: head_dim. The memory, w and a are float32; everything else is computed in `dtype`. `chunk_size` and
    `implementation` are passed to `ops.generalized_delta_rule`, which has no kernels.
    """

    def __init__(
        self,
        d_model: int,
        *,
        num_heads: int,
        head_dim: int,
        value_dim: int | None = None,
        gate_rank: int | None = None,
        norm_epsilon: float = 1e-6,
        output_norm_epsilon: float | None = None,
        output_scale: float = 1.0,
        chunk_size: int | None = None,
        implementation: str | None = None,
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        width, rank = value_dim or head_dim, gate_rank or head_dim
        for name, size in dict(num_heads=num_heads, head_dim=head_dim, value_dim=width).items():
            if size < 1:
                raise ValueError(f"{name}={size} must be at least 1")
        axes, own = ("embed", "heads", "head_dim"), ("heads", "head_dim")
        channels = (num_heads, head_dim)
        self.mix = nnx.Param(
            jax.random.uniform(rngs.params(), (len(_MIXES), d_model), jnp.float32), axes=("mix", "embed"), decay=False
        )
        self.read = kernel(rngs, (d_model, *channels), axes)
        self.key = kernel(rngs, (d_model, *channels), axes)
        self.value = kernel(rngs, (d_model, num_heads, width), axes)
        # From channels that keep for 670 tokens, 1/(e^−½ sigmoid(−6)), to some that keep for 6.
        start = jnp.broadcast_to(jnp.linspace(-6.0, -1.0, head_dim, dtype=jnp.float32), channels)
        self.decay = _LowRank(d_model, rank, *channels, inner=jnp.tanh, start=start, rngs=rngs)
        self.rate = _LowRank(d_model, rank, *channels, start=jnp.zeros(channels, jnp.float32), rngs=rngs)
        self.gate = _LowRank(d_model, rank, num_heads, width, inner=jax.nn.sigmoid, wide=False, rngs=rngs)
        ones = jnp.ones(channels, jnp.float32)
        self.erased = nnx.Param(ones, axes=own, decay=False)  # ξ
        self.written = nnx.Param(ones, axes=own, decay=False)  # α
        self.bonus = nnx.Param(jnp.zeros(channels, jnp.float32), axes=own, decay=False)  # ρ
        self.norm = HeadNorm(width, epsilon=norm_epsilon if output_norm_epsilon is None else output_norm_epsilon)
        self.output = kernel(
            rngs,
            (num_heads, width, d_model),
            ("heads", "head_dim", "embed"),
            fan_in=num_heads * width,
            scale=output_scale,
        )
        self.state_shape, self.width = (*channels, width), d_model
        self.chunk_size, self.implementation, self.dtype = chunk_size, implementation, jnp.dtype(dtype)

    def __call__(self, x, *, segment_ids=None, positions=None, cache: StateCache | None = None):
        """x [B,T,d_model] -> (y [B,T,d_model] in the compute dtype, the updated cache or None).

        `segment_ids` int [B,T]: 0 is padding, whose output is 0; a document starts from an empty memory, and its first
        token is mixed with 0. `positions` are not used: the recurrence itself depends on the order of the tokens.
        """
        x = clear_padding(x, segment_ids).astype(self.dtype)
        before, tails = self._previous(x, segment_ids, None if cache is None else cache.tails)
        mixes = [x + (before - x) * along(mix, x).astype(x.dtype) for mix in self.mix[...]]
        of = dict(zip(_MIXES, mixes, strict=True))
        read, key, value = (product(of[name], getattr(self, name), self.dtype) for name in ("read", "key", "value"))
        wide = accumulation_dtype(self.dtype)
        log_decay = -math.exp(-0.5) * jax.nn.sigmoid(self.decay(of["decay"]))
        rate = jax.nn.sigmoid(self.rate(of["rate"]))
        erase = l2_normalize(key.astype(wide) * along(self.erased, key))
        written = key.astype(wide) * (1.0 + (rate - 1.0) * along(self.written, rate))
        arrays = dict(
            query=read,
            key=written.astype(self.dtype),
            value=value,
            erase_key=erase,
            erase_write=rate * erase,
            log_decay=log_decay,
            segment_ids=segment_ids,
        )
        rule = functools.partial(
            ops.generalized_delta_rule, scale=1.0, chunk_size=self.chunk_size, implementation=self.implementation
        )
        o, cache = remember(rule, arrays, cache, tails)
        bonus = jnp.sum(read.astype(wide) * written * along(self.bonus, written), axis=-1, keepdims=True)
        o = self.norm(o.astype(wide)) + bonus * value.astype(wide)
        gate = self.gate(of["gate"])
        return product_into_stream(o.astype(self.dtype) * gate, self.output, self.dtype, axes=2), cache

    def _previous(self, x, segment_ids, tails):
        """(the previous token of each token's document, zeros before its first, x's tail for the next call or ())."""
        x, shift = x[:, :, None], jnp.asarray([0.0, 1.0]).reshape(2, 1, 1)
        if tails is not None:
            before, tail = weighted_sum(x, shift, segment_ids, *tails)
            return before[:, :, 0].astype(x.dtype), (tail,)
        alone = lambda x, segment_ids: weighted_sum(x, shift, segment_ids)[0]
        return over_previous_tokens(alone, 1, x, segment_ids)[:, :, 0].astype(x.dtype), ()

    def init_cache(self, batch: int, capacity: int) -> StateCache:
        """An empty cache. Its size is fixed and it serves any number of tokens; `capacity` is ignored."""
        del capacity
        return StateCache.empty(
            batch, *self.state_shape, (jnp.zeros((batch, 1, 1, self.width), self.dtype),), self.dtype
        )

    def flops_per_token(self, length: int) -> float:
        """The products with kernels, 2 for each number of μ, ξ, α and ρ, and 8 K V for each head: 2 K V each for the
        read Sᵀ κ, the erasing, the write, and the read Sᵀ r. It does not depend on `length`. The extra work of the
        chunked form is not counted."""
        del length
        heads, key_dim, value_dim = self.state_shape
        low_rank = sum(part.flops_per_token() for part in (self.decay, self.rate, self.gate))
        channels = product_flops(self.mix, self.erased, self.written, self.bonus)
        kernels = product_flops(self.read, self.key, self.value, self.output)
        return kernels + low_rank + channels + 8.0 * heads * key_dim * value_dim
