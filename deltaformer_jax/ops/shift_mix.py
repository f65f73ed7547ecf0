"""KV shifting: mixes each token's key (or value) with the previous token's.

    x'_t = current · x_t + previous · x_{t−1}

Source: Xu et al., KV Shifting Attention (ICML 2025, arXiv 2411.19574), eq. 5 to 7.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from deltaformer_jax.ops.common.checks import as_segment_ids, check_tokens
from deltaformer_jax.ops.common.tiles import accumulation_dtype


def shift_mix(
    x: jax.Array,
    current: jax.Array,
    previous: jax.Array,
    *,
    segment_ids: jax.Array | None = None,
    last: jax.Array | None = None,
) -> jax.Array:
    """Mixes each token with its predecessor: x'_t = current · x_t + previous · x_{t−1}.

    x_{t−1} is 0 for the first token of a segment.

    Args:
      x: [B, T, G, K], keys before their rotary embedding, or values; float64, float32, bfloat16 or float16.
      current, previous: [G], one scalar per head.
      segment_ids: [B, T] ints, 0 for padding. No token is mixed with a token of another segment. None means one segment
        per row.
      last: [B, G, K], for decoding: the unmixed x of the token before this call's first token. It precedes the first
        segment of each row. None means 0.

    Returns:
      [B, T, G, K] in x's dtype, 0 at padding.

    Raises:
      ValueError, TypeError: a shape or dtype that does not fit. The message names the argument and what it must be.

    Cost: two multiply-adds per number.

    Source: KV Shifting Attention, eq. 5 to 7.
    """
    check_tokens("x", x)
    for name, scalars in (("current", current), ("previous", previous)):
        if jnp.shape(scalars) != (x.shape[2],):
            raise ValueError(f"{name} must have shape [heads] = ({x.shape[2]},); it has {jnp.shape(scalars)}")
    expected = (x.shape[0], *x.shape[2:])
    if last is not None and jnp.shape(last) != expected:
        raise ValueError(f"last must have shape [batch, heads, width] = {expected}; it has {jnp.shape(last)}")
    segment_ids = as_segment_ids(segment_ids, x)
    carried = jnp.zeros_like(x[:, :1]) if last is None else last[:, None].astype(x.dtype)
    before = jnp.concatenate([carried, x[:, :-1]], axis=1)
    if segment_ids is not None:
        real = segment_ids != 0
        x = jnp.where(real[..., None, None], x, 0)
        follows = jnp.concatenate(
            [jnp.zeros_like(real[:, :1]), (segment_ids[:, 1:] == segment_ids[:, :-1]) & real[:, 1:]], axis=1
        )
        first = real & (jnp.cumsum(real, axis=1, dtype=jnp.int32) == 1)
        before = jnp.where(follows[..., None, None], before, 0)
        before = jnp.where(first[..., None, None], carried, before)
    # The scalars are learnt in float32: rounding them to a narrower dtype of x would lose digits that were learnt.
    dtype = accumulation_dtype(x.dtype)
    current, previous = (jnp.asarray(s, dtype)[None, None, :, None] for s in (current, previous))
    return (current * x.astype(dtype) + previous * before.astype(dtype)).astype(x.dtype)
