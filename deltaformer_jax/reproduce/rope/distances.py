"""What a base does at each distance m: the angles it turns by, and two sums that say how scores fall with m.

    angles that pair i has turned by within L tokens: the arc from 0 to min(L θ_i, 2π)              Figure 2
    Σ_{1 ≤ n ≤ d/2} |Σ_{l<n} e^{i m θ_l}|, an upper bound of a score up to a factor                 Figure 4, Eq. 7
    B_m = Σ_{l < d/2} cos(m θ_l)                                                                    Figure 5

with θ_i = base^(−2i/d). An angle that a pair of features has not turned by in training is new to the model. Source: Men
et al., "Base of RoPE bounds context length", NeurIPS 2024, arXiv 2405.14591; the bound is that of RoFormer, arXiv
2104.09864, section 3.4.3.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from deltaformer_jax.config.remarks.rotary_bound import blocks, frequencies
from deltaformer_jax.plot.style import COLOURS, plain

TRAINED, LONGER = 4096, 32768
# The ways of the paper's Figure 2 from TRAINED to LONGER tokens: label -> (base in training, base at LONGER).
WAYS = {
    "the base kept": (1e4, 1e4),
    "a small base": (500.0, 500.0),
    "the base enlarged": (1e4, 1e4 * (LONGER / TRAINED) ** (128 / 126)),  # the slowest pair then turns no further
}
BASES = (1e2, 1e3, 1e4, 1e5, 1e6)
PLACES = 400  # of a curve


def turned(theta: np.ndarray, length: int) -> np.ndarray:
    """min(L θ_i, 2π): how far around each pair of features has turned at some distance m ≤ L."""
    return np.minimum(length * theta, 2 * np.pi)


def score_bounds(theta: np.ndarray, distances: np.ndarray) -> np.ndarray:
    """Σ_{1 ≤ n ≤ d/2} |Σ_{l<n} e^{i m θ_l}| for each distance m; at m = 0 it is d/2 (d/2 + 1) / 2."""
    return np.abs(np.cumsum(np.exp(1j * distances[:, None] * theta), axis=1)).sum(axis=1)


def lowest_by_interval(theta: np.ndarray, longest: int) -> dict[str, Any]:
    """The curve [[m, lowest B_m up to the next m]] in at most PLACES intervals, and what is negative in it.

    The lowest value of an interval is kept since single points would miss the few negative values.
    """
    starts = np.unique(np.geomspace(1, longest, PLACES).astype(int))
    lowest = np.full(len(starts), np.inf)
    negative, first, least, at = 0, None, np.inf, 0
    for begin, values in blocks(theta, longest):
        distances = np.arange(begin, begin + len(values))
        np.minimum.at(lowest, np.searchsorted(starts, distances, side="right") - 1, values)
        below = distances[values < 0]
        negative += len(below)
        first = int(below[0]) if first is None and len(below) else first
        if values.min() < least:
            least, at = float(values.min()), int(distances[values.argmin()])
    curve = [[int(m), round(float(b), 4)] for m, b in zip(starts, lowest)]
    return {"least": least, "least_at": at, "negative": negative, "first_negative": first, "curve": curve}


def cells(width: int) -> list[dict[str, Any]]:
    angles = [
        {
            "label": f"angles, {way}",
            "kind": "angles",
            "way": way,
            "bases": list(bases),
            "lengths": [TRAINED, LONGER],
            "width": width,
        }
        for way, bases in WAYS.items()
    ]
    return angles + [
        {
            "label": f"base {base:.0e} by distance",
            "kind": "by distance",
            "base": base,
            "longest": LONGER,
            "width": width,
        }
        for base in BASES
    ]


def run(settings: dict[str, Any]) -> dict[str, Any]:
    width = settings["width"]
    if settings["kind"] == "angles":
        pairs = zip(settings["bases"], settings["lengths"])
        seen, needed = (turned(frequencies(base, width), length) for base, length in pairs)
        new = np.maximum(needed - seen, 0)
        new[new < 1e-9] = 0  # the enlarged base gives the slowest pair the same angle but for rounding
        return {
            "seen": seen.round(6).tolist(),
            "needed": needed.round(6).tolist(),
            "pairs_with_new_angles": int((new > 0).sum()),
            "most_new": round(float(new.max()), 6),
            "slowest_pair": [round(float(seen[-1]), 6), round(float(needed[-1]), 6)],
        }
    theta = frequencies(settings["base"], width)
    distances = np.unique(np.geomspace(1, settings["longest"], PLACES).astype(int))
    bounds = score_bounds(theta, distances)
    share = bounds / score_bounds(theta, np.zeros(1))[0]
    return {
        **lowest_by_interval(theta, settings["longest"]),
        "bounds": [[int(m), round(float(value), 3)] for m, value in zip(distances, bounds)],
        "bound_halved_from": int(distances[np.argmax(share < 0.5)]),
        "share_at_the_end": round(float(share[-PLACES // 10 :].mean()), 4),
    }


def row(settings: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    """The line of a cell in the table of `reproduce rope_base`."""
    if settings["kind"] == "angles":
        found = f"new angles: {result['pairs_with_new_angles']} pairs, up to {result['most_new']:.2f} rad"
        return {"what": settings["label"], "found": found}
    return {
        "what": settings["label"],
        "found": f"Eq. 7 halved from {result['bound_halved_from']}; B < 0 from {result['first_negative'] or '–'}",
        "min B": f"{result['least']:.3f} at {result['least_at']}",
        "negative m": result["negative"],
    }


def draw(panels: Any, done: list[dict[str, Any]]) -> None:
    """Figures 2, 4 and 5 on three axes, of what is done."""
    from matplotlib import colormaps

    angles, bounds, sums = panels
    _draw_angles(angles, [record for record in done if record["settings"]["kind"] == "angles"])
    by_base = [record for record in done if record["settings"]["kind"] == "by distance"]
    for place, record in enumerate(by_base):
        result, colour = record["result"], colormaps["viridis"](0.9 * place / max(1, len(by_base) - 1))
        name = f"base {record['settings']['base']:.0e}".replace("e+0", "e")
        bounds.plot(*np.array(result["bounds"]).T, color=colour, linewidth=1.1, label=name)
        sums.plot(*np.array(result["curve"][:-1]).T, color=colour, linewidth=1.1)  # the last interval is one distance
        if first := result["first_negative"]:
            sums.plot(first, 0, "X", color=colour, markersize=9, markeredgecolor="black", zorder=4)
    distance = dict(xlabel="distance m", xscale="log", xlim=(1, None))
    bounds.set(**distance, ylabel="Σₙ |Σ_{l<n} exp(i m θ_l)|")
    plain(bounds, "Upper bound of a score by distance (Eq. 7, Figure 4)")
    sums.axhline(0, color="black", linewidth=0.8)
    sums.set(**distance, ylabel="lowest B in each of 400 intervals")
    plain(sums, "B by distance (Figure 5); ×: the first below 0")
    if by_base:
        bounds.legend(fontsize=8.5, loc="upper right", frameon=False)


def _draw_angles(axes: Any, records: list[dict[str, Any]]) -> None:
    places, drawn = COLOURS[1:], set()
    said = lambda base: f"{base:.2g}".replace("e+0", "e") if base >= 1e4 else f"{base:g}"
    for place, record in enumerate(records):
        (trained, asked), result = record["settings"]["bases"], record["result"]
        short, long = (f"{length // 1024}k" for length in record["settings"]["lengths"])
        pairs = np.arange(len(result["seen"]))
        style = dict(color=places[place], linestyle=("--", ":", "-.")[place % 3], linewidth=1.7)
        if result["seen"] == result["needed"]:
            label = f"seen at {short} and needed at {long}: base {said(trained)}"
            axes.plot(pairs, result["seen"], label=label, **style)
            continue
        if trained not in drawn:
            drawn.add(trained)
            axes.plot(pairs, result["seen"], color=COLOURS[0], linewidth=2.2, label=f"seen at {short}: {said(trained)}")
        axes.plot(pairs, result["needed"], label=f"needed at {long}: base {said(asked)}", **style)
        axes.fill_between(pairs, result["seen"], result["needed"], color=places[place], alpha=0.15, linewidth=0)
    axes.set(xlabel="pair of features i, from fast to slow", ylabel="turned by, of a whole turn", ylim=(0, 7))
    axes.set_yticks(np.arange(5) * np.pi / 2, ["0", "π/2", "π", "3π/2", "2π"])
    plain(axes, "Angles that pairs turn by (Figure 2); shaded: not seen in training")
    if records:
        axes.legend(fontsize=8.5, loc="lower left", frameon=False)
