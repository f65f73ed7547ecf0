"""KV shifting: each token's key (or value) mixed with its predecessor's.

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
    """x'_t = current x_t + previous x_{t−1}, with x_{−1} = 0 before a segment's first token.

    Args:
      x: [B, T, G, K], keys before their rotary embedding, or values.
      current, previous: [G], one scalar per head.
      segment_ids: [B, T] int, 0 for padding; the mix starts anew with each segment. None: one segment a row.
      last: [B, G, K], the raw x of the token before this call's first, for decoding; enters the row's first segment.

    Returns:
      [B, T, G, K] in x's dtype, 0 at padding. Cost: two multiply-adds a number.

    Raises:
      ValueError, TypeError: a shape or dtype that does not fit, named with what would.

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
    # The scalars are learnt in float32: rounding them to a narrow x's dtype would lose what was learnt.
    dtype = accumulation_dtype(x.dtype)
    current, previous = (jnp.asarray(s, dtype)[None, None, :, None] for s in (current, previous))
    return (current * x.astype(dtype) + previous * before.astype(dtype)).astype(x.dtype)
