"""Rotary position embedding: rotate pairs of features by an angle proportional to the position.

    (x_i, x_{i+K/2}) -> (x_i cos θ − x_{i+K/2} sin θ,  x_i sin θ + x_{i+K/2} cos θ),   θ = position · base^(−2i/K)

for i < K/2, so that q·k after the rotation depends on the difference of their positions alone. A scaling for longer
contexts changes the frequencies base^(−2i/K) (`config/rope_scaling.py`).
Source: Su et al., "RoFormer", arXiv 2104.09864, eq. 34; pairs half a width apart, as in GPT-NeoX and Llama.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from deltaformer_jax.config.rope_scaling import frequencies, magnitude, parse
from deltaformer_jax.ops.common.tiles import accumulation_dtype


def rotary_width(head_dim: int, fraction: float) -> int:
    """The number of features that are rotated, rounded down as other implementations do."""
    return int(head_dim * fraction)


def check_rotary(
    head_dim: int, base: float | None, fraction: float = 1.0, scaling: str = "none", name: str = "rope_base"
) -> None:
    """Raise ValueError, naming the argument, for a head, a base, a fraction or a scaling that cannot be rotated. A base
    of None: no rotary embedding. `name`: the base's."""
    try:
        rule = parse(scaling).rule
    except ValueError as error:
        raise ValueError(f"rope_scaling={scaling!r}: {error}") from None
    if base is None:
        if rule != "none":
            raise ValueError(f"rope_scaling={scaling!r}: there is no rotary embedding to scale, since {name} is None")
        return
    width = rotary_width(head_dim, fraction)
    if width % 2 or not 0 < width <= head_dim:
        what = (
            f"head_dim={head_dim}" if fraction == 1 else f"rotary_fraction={fraction}: {width} of {head_dim} features"
        )
        raise ValueError(f"{what} must be even for the rotary embedding; {name}=None (0 in a config) switches that off")
    if rule == "ntk" and width < 4:
        raise ValueError(f"rope_scaling={scaling!r}: needs at least 4 rotated features, not {width}")
    if not base > 1:  # NaN too
        raise ValueError(f"{name}={base} must be greater than 1; None (0 in a config) means no rotary embedding")


def rotate(x, positions, base: float, fraction: float = 1.0, scaling: str = "none"):
    """x `[B,T,H,K]`, positions `[B,T]` integers, base > 1 -> `[B,T,H,K]` in x's dtype.

    Products are float32 (float64 for float64), and so are angles, to 1.3e-6 at every position below 2^31. Lengths are
    kept. `fraction`: the first fraction · K features, an even number, are rotated as if they were the whole head; the
    others stay as they are. `scaling`: such as "linear:4", see `config/rope_scaling.py`.
    """
    if fraction != 1.0:
        width = rotary_width(x.shape[-1], fraction)
        return jnp.concatenate([rotate(x[..., :width], positions, base, scaling=scaling), x[..., width:]], axis=-1)
    half = x.shape[-1] // 2
    wide = accumulation_dtype(x.dtype)
    rule = parse(scaling)
    frequency = np.asarray(frequencies(base, 2 * half, rule))[None, None, None]
    angle = _angles(positions[:, :, None, None], frequency, wide)
    cosine, sine = jnp.cos(angle)[..., None, :], jnp.sin(angle)
    if (factor := magnitude(rule)) != 1:
        cosine, sine = factor * cosine, factor * sine
    # Pairs as an axis of their own, which is reversed. XLA fuses this, and its derivative, into one pass over x; halves
    # that are cut out and joined again it writes to memory in between.
    pairs = x.reshape(*x.shape[:-1], 2, half).astype(wide)
    rotated = pairs * cosine + pairs[..., ::-1, :] * jnp.stack([-sine, sine], axis=-2)
    return rotated.reshape(x.shape).astype(x.dtype)


def _angles(positions, frequency, dtype):
    """positions · frequency in `dtype`, in float32 without whole turns.

    A product in float32 would be wrong by 0.03 at position 10⁶. The frequency is therefore a 32-bit fraction of a turn
    and a remainder. The integer product of position and fraction wraps around at whole turns and is otherwise exact.
    What remains are roundings of half a turn, of the remainder, of their sum and of its product: 7 · π · 2^−24.
    """
    if dtype == jnp.float64:
        return positions.astype(dtype) * frequency
    units = frequency / (2 * np.pi) * 2.0**32  # 2^32 of them are a turn
    fraction = np.round(units)
    wrapped = ((fraction + 2**31) % 2**32 - 2**31).astype(np.int32)
    product = (positions.astype(jnp.int32) * wrapped).astype(dtype)
    remainder = positions.astype(dtype) * (units - fraction).astype(dtype)
    return (product + remainder) * np.asarray(2 * np.pi / 2.0**32, dtype)
