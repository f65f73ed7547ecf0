"""Rotary position embedding: rotate pairs of features by an angle proportional to the position.

    (x_i, x_{i+K/2}) -> (x_i cos θ − x_{i+K/2} sin θ,  x_i sin θ + x_{i+K/2} cos θ),   θ = position · base^(−2i/K)

for i < K/2, so that q·k after the rotation depends on the difference of their positions alone.
Source: Su et al., "RoFormer", arXiv 2104.09864, eq. 34; pairs half a width apart, as in GPT-NeoX and Llama.
"""

from __future__ import annotations

import jax.numpy as jnp

from deltaformer_jax.ops.common.tiles import accumulation_dtype


def check_rotary(head_dim: int, base: float | None) -> None:
    """Raise ValueError, naming the argument, for a head or a base that cannot be rotated. None: no rotary embedding."""
    if base is None:
        return
    if head_dim % 2:
        raise ValueError(
            f"head_dim={head_dim} must be even for the rotary embedding; rope_base=None (0 in a config) switches "
            "that off"
        )
    if not base > 1:  # NaN too
        raise ValueError(f"rope_base={base} must be greater than 1; None (0 in a config) means no rotary embedding")


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
