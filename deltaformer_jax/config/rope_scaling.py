"""Frequencies of a rotary embedding, as they are or scaled for a context longer than that of training.

With θ_i = base^(−2i/d), i < d/2, wavelengths λ_i = 2π/θ_i, a factor s and the original context L:

    none              θ_i
    linear:s          θ_i / s                                       positions divided by s
    ntk:s             (base · s^{d/(d−2)})^(−2i/d)                  the slowest pair as in linear:s, the fastest kept
    yarn:s,L          (1 − r_i) θ_i + r_i θ_i / s                   r_i rises from 0 to 1 between the pairs that turn 32
                                                                    times and once within L; cosines and sines are
                                                                    multiplied by 1 + ln(s)/10
    llama3:s,a,b,L    θ_i if λ_i < L/b;  θ_i / s if λ_i > L/a;      between: (1 − g) θ_i / s + g θ_i,
                                                                    g = (L/λ_i − a)/(b − a)

Sources: linear, Chen et al., arXiv 2306.15595, eq. 4; ntk, Men et al., arXiv 2405.14591, eq. 6; yarn, Peng et al.,
arXiv 2309.00071, section 3; llama3, the configs of Llama 3.1. yarn's and llama3's borders and factors are those of
transformers 5.24.
"""

from __future__ import annotations

import math
from typing import NamedTuple

FORMS = {
    "linear": ("s",),
    "ntk": ("s",),
    "yarn": ("s", "original"),
    "llama3": ("s", "low", "high", "original"),
}
TURNS = (32, 1)  # of yarn: pairs that turn more often within the original context stay, those that turn less are scaled


class Scaling(NamedTuple):
    """A rule of `FORMS` and its numbers, or the rule "none"."""

    rule: str
    numbers: tuple[float, ...] = ()


NONE = Scaling("none")


def parse(text: str) -> Scaling:
    """The scaling of a text such as "yarn:4,4096". Raises ValueError that says what to give."""
    if text == "none":
        return NONE
    rule, _, numbers = text.partition(":")
    try:
        found = tuple(float(number) for number in numbers.split(","))
    except ValueError:
        found = ()
    if rule not in FORMS or len(found) != len(FORMS[rule]) or not all(map(math.isfinite, found)):
        forms = ", ".join(f"{name}:{','.join(of).upper()}" for name, of in FORMS.items())
        raise ValueError(f"must be none or one of {forms}, with numbers")
    named = dict(zip(FORMS[rule], found))
    if named["s"] < 1:
        raise ValueError(f"the factor {named['s']:g} must be at least 1")
    if named.get("original", 1) < 1:
        raise ValueError(f"the original context {named['original']:g} must be at least 1 token")
    if rule == "llama3" and not 0 < named["low"] < named["high"]:
        raise ValueError(f"the factors {named['low']:g} and {named['high']:g} must be positive, the second the larger")
    return Scaling(rule, found)


def frequencies(base: float, width: int, scaling: Scaling = NONE) -> tuple[float, ...]:
    """The angle of each of the width/2 pairs at position 1, in float64."""
    rule, numbers = scaling
    if rule == "ntk":
        base *= numbers[0] ** (width / (width - 2))
    theta = [base ** (-2 * i / width) for i in range(width // 2)]
    if rule == "linear":
        return tuple(angle / numbers[0] for angle in theta)
    if rule == "yarn":
        return tuple(map(_mixed, theta, _ramp(base, width, numbers[1]), [numbers[0]] * len(theta)))
    if rule == "llama3":
        return tuple(_llama3(angle, *numbers) for angle in theta)
    return tuple(theta)


def magnitude(scaling: Scaling) -> float:
    """The factor of cosines and sines."""
    return 1 + math.log(scaling.numbers[0]) / 10 if scaling.rule == "yarn" else 1.0


def _mixed(theta: float, ramp: float, factor: float) -> float:
    return (1 - ramp) * theta + ramp * theta / factor


def _ramp(base: float, width: int, original: float) -> list[float]:
    """How far each pair is scaled: 0 up to the pair that turns TURNS[0] times within the original context, 1 from the
    pair that turns TURNS[1] times on."""
    pair = lambda turns: width * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))
    low, high = max(math.floor(pair(TURNS[0])), 0), min(math.ceil(pair(TURNS[1])), width - 1)
    high += 0.001 if low == high else 0
    return [min(max((i - low) / (high - low), 0.0), 1.0) for i in range(width // 2)]


def _llama3(theta: float, factor: float, low: float, high: float, original: float) -> float:
    turns = original * theta / (2 * math.pi)
    if turns > high:
        return theta
    if turns < low:
        return theta / factor
    smooth = (turns - low) / (high - low)
    return _mixed(theta, 1 - smooth, factor)
