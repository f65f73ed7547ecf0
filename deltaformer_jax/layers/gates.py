"""Data-dependent gates: on an attention mixer's output (`OutputGate`), and on the decay of a recurrent mixer's memory
(`HeadDecay` with one decay per head, `ChannelDecay` with one per key channel); the logits of gates with one number per
channel (`ChannelGate`).

    g = −e^A ⊙ softplus(x W + b) ≤ 0          g is log_decay, the natural logarithm of the decay

e^A starts uniform in [1, 16) and softplus(b) log-uniform in [0.001, 0.1]. At x W = 0 the initial decays then have time
constants 1 / (e^A softplus(b)) from about 1 token to 1000 tokens. Source: Gu and Dao, Mamba-2, arXiv 2405.21060, and
Yang et al., Gated Delta Networks, arXiv 2412.06464, for one decay per head; Kimi Linear, arXiv 2510.26692, for one per
channel, with a low-rank W.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from deltaformer_jax.layers.linear import (
    along,
    kernel,
    plus,
    product,
    product_flops,
    product_of_heads,
    product_of_low_rank,
    wide_kernel,
)
from deltaformer_jax.ops.common.tiles import accumulation_dtype


class OutputGate(nnx.Module):
    """o ⊙ sigmoid(x W_g): a gate on the output of attention, one number per head and feature.

    (o [B,T,H,K], x W_g [B,T,H,K]) -> [B,T,H,K] in `dtype`; the sigmoid and the product with it are float32. The mixer
    computes x W_g with its other products of x (`linear.products`). Softmax weights add up to 1; with the gate a token
    can still read almost nothing. Source: Qiu et al., "Gated Attention for Large Language Models", arXiv 2505.06708,
    section 2 (the elementwise sigmoid gate after attention).
    """

    def __init__(self, d_model: int, num_heads: int, head_dim: int, *, dtype, rngs: nnx.Rngs):
        self.kernel = kernel(rngs, (d_model, num_heads, head_dim), ("embed", "heads", "head_dim"))
        self.dtype = jnp.dtype(dtype)

    def __call__(self, o, mapped):
        wide = accumulation_dtype(self.dtype)
        gate = jax.nn.sigmoid(mapped.astype(wide))
        return (o.astype(wide) * gate).astype(self.dtype)

    def flops_per_token(self) -> float:
        """2 d_model H K."""
        return product_flops(self.kernel)


class ChannelGate(nnx.Module):
    """g = x W + b, one number per head and channel: x [B,T,d_model] -> [B,T,heads,width], float32 (float64 for
    float64). b starts at 0, so sigmoid(g) starts around 1/2. `bias=False`: without b."""

    def __init__(self, d_model: int, heads: int, width: int, *, bias: bool = True, rngs: nnx.Rngs):
        self.kernel = wide_kernel(rngs, (d_model, heads, width), ("embed", "heads", "head_dim"))
        zeros = jnp.zeros((heads, width), jnp.float32)
        self.bias = nnx.Param(zeros, axes=("heads", "head_dim"), decay=False) if bias else None

    def __call__(self, x):
        return plus(product(_wide(x), self.kernel, _wide(x).dtype, precision="highest"), self.bias)

    def flops_per_token(self) -> float:
        return product_flops(self.kernel)


def _log_rate(rngs: nnx.Rngs, heads: int) -> nnx.Param:
    start = jax.random.uniform(rngs.params(), (heads,), jnp.float32, 1.0, 16.0)
    return nnx.Param(jnp.log(start), axes=("heads",), decay=False)


def _step_bias(rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str, ...]) -> nnx.Param:
    """b, drawn so that softplus(b) is log-uniform in [0.001, 0.1]."""
    low, high = jnp.log(1e-3), jnp.log(0.1)
    step = jnp.exp(jax.random.uniform(rngs.params(), shape, jnp.float32, low, high))
    return nnx.Param(step + jnp.log(-jnp.expm1(-step)), axes=axes, decay=False)


def _wide(x):
    return x.astype(accumulation_dtype(x.dtype))


class HeadDecay(nnx.Module):
    """x [B,T,d_model] -> log_decay g [B,T,heads], float32 (float64 for float64). Weight decay skips A and b."""

    def __init__(self, d_model: int, heads: int, *, rngs: nnx.Rngs):
        self.kernel = wide_kernel(rngs, (d_model, heads), ("embed", "heads"))
        self.log_rate = _log_rate(rngs, heads)
        self.bias = _step_bias(rngs, (heads,), ("heads",))

    def __call__(self, x):
        step = product_of_heads(_wide(x), self.kernel)
        return -jnp.exp(along(self.log_rate, step)) * jax.nn.softplus(step + along(self.bias, step))

    def flops_per_token(self) -> float:
        return product_flops(self.kernel)


class ChannelDecay(nnx.Module):
    """x [B,T,d_model] -> log_decay g [B,T,heads,width] with W = W₁ W₂ of rank `rank`; A is one number per head.

    `lower_bound` L < 0 bounds the decay: g = L sigmoid(e^A (x W + b)), as in GLM-5 and Ling. 0: the unbounded form.
    """

    def __init__(self, d_model: int, heads: int, width: int, *, rank: int, lower_bound: float = 0.0, rngs: nnx.Rngs):
        self.down = wide_kernel(rngs, (d_model, rank), ("embed", "rank"))
        self.up = wide_kernel(rngs, (rank, heads, width), ("rank", "heads", "head_dim"))
        self.log_rate = _log_rate(rngs, heads)
        self.bias = _step_bias(rngs, (heads, width), ("heads", "head_dim"))
        self.lower_bound = lower_bound

    def __call__(self, x):
        low = product_of_low_rank(_wide(x), self.down, _wide(x).dtype, precision="highest")
        step = product(low, self.up, low.dtype, precision="highest")
        step, rate = step + along(self.bias, step), jnp.exp(along(self.log_rate, low))[..., None]
        if self.lower_bound:
            return self.lower_bound * jax.nn.sigmoid(rate * step)
        return -rate * jax.nn.softplus(step)

    def flops_per_token(self) -> float:
        return product_flops(self.down, self.up)
