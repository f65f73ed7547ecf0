"""The bound that a rotary embedding's base sets to the context.

    B_m = Σ_{i < d/2} cos(m θ_i),    θ_i = base^(−2i/d)        must be ≥ 0 for every distance 1 ≤ m ≤ L

Let k have independent components of one variance σ². A query q and a key like it, q + ε, then have the expected score
2 σ² B_m above that of q and another key, at distance m: where B_m < 0, the likeness of a key lowers its score. Source:
Men et al., "Base of RoPE bounds context length", NeurIPS 2024, arXiv 2405.14591, theorem 1. Computed in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from deltaformer_jax.config import rope_scaling
from deltaformer_jax.config.mixer import entry
from deltaformer_jax.config.sections import ModelConfig

BLOCK = 65536
# The longest context for which a warning names the least base: a run should not wait for the search at its start.
SEARCHED = 8192
# Bases above 1e30 are not tried: the angles of all slow pairs are about 0 there, so that a larger one changes nothing.
MOST_POWER = 30
# The mixers whose queries and keys are compared by a product alone; retention's decay with the distance.
ATTENTION = ("delta_former", "softmax_attention")


def frequencies(base: float, width: int, scaling: str = "none") -> np.ndarray:
    """θ_i for i < width/2, float64, scaled as `model.rope_scaling` says."""
    return np.array(rope_scaling.frequencies(base, width, rope_scaling.parse(scaling)))


def sums(theta: np.ndarray, first: int, last: int) -> np.ndarray:
    """B_m for m = first … last, float64."""
    return np.cos(np.arange(first, last + 1, dtype=np.float64)[:, None] * theta).sum(axis=1)


def blocks(theta: np.ndarray, longest: int, size: int = BLOCK) -> Iterator[tuple[int, np.ndarray]]:
    """Yield B_m for m = 1 … longest in blocks: (the first m of the block, its values)."""
    for first in range(1, longest + 1, size):
        yield first, sums(theta, first, min(first + size - 1, longest))


def first_negative(theta: np.ndarray, longest: int) -> int | None:
    """The least m ≤ longest with B_m < 0; None if there is none."""
    for first, values in blocks(theta, longest, 4096):
        negative = np.flatnonzero(values < 0)
        if len(negative):
            return first + int(negative[0])
    return None


def least_base(
    longest: int, start: float, width: int, scaling: str = "none", stop: Callable[[], bool] = lambda: False
) -> float | None:
    """The least base of two significant digits, at least `start`, with B_m ≥ 0 for all m ≤ longest; None if stopped, or
    if no base has that, as with one pair of features.

    The bases that satisfy this do not form an interval, so that all are tried in ascending order.
    """
    digits, power = (int(part) for part in f"{start:.1e}".replace(".", "").split("e"))
    digits += float(f"{digits}e{power - 1}") < start  # it was rounded down
    while power < MOST_POWER and not stop():
        if digits == 100:
            digits, power = 10, power + 1
        base = float(f"{digits}e{power - 1}")
        if first_negative(frequencies(base, width, scaling), longest) is None:
            return base
        digits += 1
    return None


class Rotation(NamedTuple):
    """One rotary embedding of an attention layer. field: the config's that holds its base, "rope_base" or
    "write_rope_base". width: rotated features of a head. window: the most distances that it scores; None: all, as
    where some tokens are seen behind it."""

    field: str
    base: float
    width: int
    scaling: str
    window: int | None


def rotations(model: ModelConfig) -> set[Rotation]:
    """The rotary embeddings of the model's attention layers."""
    found = set()
    for mixer in map(entry, model.mixers):
        if mixer.name not in ATTENTION:
            continue
        value = lambda field, own=dict(mixer.overrides): own.get(field, getattr(model, field))
        width = int(value("head_dim") * value("rotary_fraction"))
        # First tokens and separators are seen behind a window, at any distance.
        behind = value("initial_tokens") or value("separators") or value("separator_tokens")
        window = None if behind else value("window") or None
        bases = {"rope_base": value("rope_base") or 0}
        if mixer.name == "delta_former" and (value("write_rope_base") or 0) > 0:
            bases["write_rope_base"] = value("write_rope_base")
        for field, base in bases.items():
            if base and (field == "rope_base" or base != bases["rope_base"]):
                found.add(Rotation(field, base, width, value("rope_scaling"), window))
    return found


def beyond_bound(model: ModelConfig, length: int) -> list[str]:
    """A line for each base of the model's attention layers that breaks the bound within `length` tokens."""
    longest = {}
    for field, base, width, scaling, window in sorted(rotations(model), key=str):
        kind = (field, base, width, scaling)
        longest[kind] = max(longest.get(kind, 0), min(length, window or length))
    return [line for kind, most in longest.items() if (line := _broken(*kind, most))]


def _broken(field: str, base: float, width: int, scaling: str, longest: int) -> str | None:
    theta = frequencies(base, width, scaling)
    first = first_negative(theta, longest)
    if first is None:
        return None
    count = sum(int(np.sum(values < 0)) for _, values in blocks(theta, longest))
    base_said = f"{base:g}" if scaling == "none" else f"{base:g}, scaled by {scaling}"
    line = (
        f"model.{field} = {base_said}: at {count} of the distances up to {longest}, from {first} on, attention scores"
        f" a key like the query below others (heads of {width} rotated features; arXiv 2405.14591)"
    )
    if longest > SEARCHED:
        return line
    least = least_base(longest, max(10.0, base), width, scaling)
    if least is None:
        return f"{line}. No base of this width is without such a distance"
    return f"{line}. The least base of two digits without such a distance is {least:g}"
