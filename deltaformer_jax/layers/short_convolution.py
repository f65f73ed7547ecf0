"""A short causal convolution over time, separate for each feature (depthwise), followed by SiLU.

    y_t = silu(Σ_{j=0}^{W−1} w_j ⊙ x_{t−j}),      x_{t−j} = 0 before the first token of a segment

Source: Fu et al., H3, arXiv 2212.14052, section 3; in DeltaNet, Yang et al., arXiv 2406.06484, section 3.3.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from deltaformer_jax.layers.linear import bias, plus, wide_kernel
from deltaformer_jax.ops.common.tiles import accumulation_dtype
from deltaformer_jax.sharding import over_previous_tokens


class ShortConvolution(nnx.Module):
    """x [B,T,H,K] -> (y [B,T,H,K] in x's dtype, the tail for the next call or None).

    `tail` [B,W−1,H,K] holds the last W − 1 real tokens before this call, the newest last, and zeros if there were
    fewer. With a tail each row must hold one contiguous document, with padding on either side. The weights w are [W, H,
    K] and drawn with fan-in W. `has_bias`: a bias [H, K] is added before SiLU. Cost: W multiply-adds per feature.
    Raises ValueError for a width below 1.
    """

    def __init__(
        self, width: int, heads: int, head_dim: int, *, axis: str = "heads", has_bias: bool = False, rngs: nnx.Rngs
    ):
        if width < 1:
            raise ValueError(f"conv_size={width} must be at least 1 token, or 0 for none")
        self.weight = wide_kernel(rngs, (width, heads, head_dim), ("conv", axis, "head_dim"))
        self.bias = bias((heads, head_dim), (axis, "head_dim")) if has_bias else None
        self.width = width

    def __call__(self, x, *, segment_ids=None, tail=None):
        if tail is not None:
            return self._convolve(x, segment_ids, tail)
        alone = lambda x, segment_ids: self._convolve(x, segment_ids)[0]
        return over_previous_tokens(alone, self.width - 1, x, segment_ids), None

    def _convolve(self, x, segment_ids, tail=None):
        total, after = weighted_sum(x, self.weight[...], segment_ids, tail)
        y = jax.nn.silu(plus(total, self.bias))
        if segment_ids is not None:
            y = jnp.where((segment_ids != 0)[:, :, None, None], y, 0)
        return y.astype(x.dtype), after

    def empty_tail(self, batch: int, dtype):
        """The tail before the first token: zeros [B,W−1,H,K]."""
        return jnp.zeros((batch, self.width - 1, *self.weight.shape[-2:]), dtype)


def weighted_sum(x, weight, segment_ids, tail=None):
    """Σ_{j<W} w_j x_{t−j} over the tokens of a segment, 0 at padding, and the tail for the next call.

    x [B,T,H,K], weight [W,H,K] or [W,H,1], `tail` [B,W−1,H,K] as in `ShortConvolution` or None. Returns [B,T,H,K] in
    the dtype of sums, float32 or float64, and the next tail, or None without a tail.
    """
    wide, width, time = accumulation_dtype(x.dtype), weight.shape[0], x.shape[1]
    weight = weight.astype(wide)[:, None, None]
    real = jnp.ones(x.shape[:2], bool) if segment_ids is None else segment_ids != 0
    x = jnp.where(real[:, :, None, None], x, 0)
    rank = jnp.cumsum(real, axis=1, dtype=jnp.int32) - 1  # index among the row's real tokens; -1 before the first
    total = weight[0] * x.astype(wide)
    for j in range(1, width):
        before = jnp.pad(x, ((0, 0), (j, 0), (0, 0), (0, 0)))[:, :time]
        if segment_ids is not None:
            ids = jnp.pad(segment_ids, ((0, 0), (j, 0)))[:, :time]
            before = jnp.where((ids == segment_ids)[:, :, None, None], before, 0)
        if tail is not None:
            # For a token of rank r < j, the token j places before it is in the tail's slot W − 1 + r − j.
            slot = jnp.clip(width - 1 + rank - j, 0, width - 2)
            older = jnp.take_along_axis(tail.astype(x.dtype), slot[:, :, None, None], axis=1)
            before = jnp.where((real & (rank < j))[:, :, None, None], older, before)
        total = total + weight[j] * before.astype(wide)
    return total, None if tail is None else _next_tail(x, real, rank, tail)


def _next_tail(x, real, rank, tail):
    """The last W − 1 tokens of each row, counting the old tail's tokens first and then the row's real tokens."""
    slots = tail.shape[1]
    if slots == 0:
        return tail
    count = rank[:, -1:] + 1
    # Ranks of the tokens to keep; those with negative ranks are in the old tail.
    wanted = count - slots + jnp.arange(slots, dtype=jnp.int32)[None]
    first = jnp.argmax(real, axis=1, keepdims=True).astype(jnp.int32)
    new = jnp.take_along_axis(x, jnp.clip(first + wanted, 0, x.shape[1] - 1)[:, :, None, None], axis=1)
    old = jnp.take_along_axis(tail, jnp.clip(slots + wanted, 0, slots - 1)[:, :, None, None], axis=1)
    return jnp.where((wanted >= 0)[:, :, None, None], new.astype(tail.dtype), old)
