"""Rotary position embedding: rotate pairs of features by an angle proportional to the position.

    (x_i, x_{i+K/2}) -> (x_i cos θ − x_{i+K/2} sin θ,  x_i sin θ + x_{i+K/2} cos θ),   θ = position · base^(−2i/K)

for i < K/2, so that q·k after the rotation depends on the difference of their positions alone.
Source: Su et al., "RoFormer", arXiv 2104.09864, eq. 34; pairs half a width apart, as in GPT-NeoX and Llama.
"""

from __future__ import annotations

import jax.numpy as jnp

from deltaformer_jax.ops.common.tiles import accumulation_dtype


def rotate(x, positions, base: float):
    """x `[B,T,H,K]` with K even, positions `[B,T]` integers, base > 1 -> `[B,T,H,K]` in x's dtype.

    Angles and products are float32 (float64 for float64). Lengths are kept.
    """
    half = x.shape[-1] // 2
    wide = accumulation_dtype(x.dtype)
    frequency = (base ** (-jnp.arange(half, dtype=wide) / half))[None, None, None]
    angle = positions[:, :, None, None].astype(wide) * frequency
    cosine, sine = jnp.cos(angle), jnp.sin(angle)
    first, second = x[..., :half].astype(wide), x[..., half:].astype(wide)
    return jnp.concatenate([first * cosine - second * sine, first * sine + second * cosine], axis=-1).astype(x.dtype)
