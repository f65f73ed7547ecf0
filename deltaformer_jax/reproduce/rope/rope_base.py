"""The least base of a rotary embedding with which similar tokens score higher than others at all distances up to L.

    B_m(θ) = Σ_{i < d/2} cos(m θ_i),    θ_i = base^(−2i/d)        must be ≥ 0 for every distance 1 ≤ m ≤ L

The bases that satisfy this do not form an interval. The least one is therefore searched among the numbers of two
significant digits in ascending order, not by bisection. Beside it `distances.py` draws the paper's Figures 2, 4 and 5.
Source: Men et al., "Base of RoPE bounds context length", NeurIPS 2024, arXiv 2405.14591.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from deltaformer_jax.config.remarks.rotary_bound import first_negative, frequencies, least_base, sums
from deltaformer_jax.plot.style import COLOURS, explain, plain
from deltaformer_jax.reproduce.experiment import Experiment
from deltaformer_jax.reproduce.pictures import name_rows, new_figure
from deltaformer_jax.reproduce.rope import distances

WIDTH = 128  # d, as in the paper
# Context length -> the paper's least base.
PAPER = {
    "1k": 4.3e3,
    "2k": 1.6e4,
    "4k": 2.7e4,
    "8k": 8.4e4,
    "16k": 3.1e5,
    "32k": 6.4e5,
    "64k": 2.1e6,
    "128k": 7.8e6,
    "256k": 3.6e7,
    "512k": 6.4e7,
    "1M": 5.1e8,
}
# Base -> the first distance at which B is negative. This is arithmetic and the same on every machine.
FIRST_NEGATIVE = {1e4: 1707, 5e5: 18438, 1e6: 27115, 5e6: 82999}
# For frequencies interpolated for 8 times the context: (longest distance, number of distances at which B is negative).
INTERPOLATED = ((15360, 97), (30720, 2554))


def tokens(length: str) -> int:
    """The number of tokens of a length such as "4k", which is 4096."""
    return int(length[:-1]) * {"k": 1024, "M": 1024**2}[length[-1]]


def interpolated_frequencies() -> np.ndarray:
    """θ_i = 1e4^(−2i/128)/8 for i ≥ 44, and (1e4 · 8^(128/88))^(−2i/128) below."""
    return np.where(np.arange(64) >= 44, frequencies(1e4, WIDTH) / 8, frequencies(1e4 * 8 ** (128 / 88), WIDTH))


def cells(quick: bool, sizes: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    lengths = (sizes or {}).get("lengths") or (list(PAPER)[:6] if quick else list(PAPER))
    bounds = [{"label": f"bound for {length}", "kind": "bound", "length": length, "width": WIDTH} for length in lengths]
    checks = [
        {"label": f"first negative for {base:.0e}", "kind": "first negative", "base": base, "width": WIDTH}
        for base in FIRST_NEGATIVE
    ]
    interpolated = {"label": "interpolated frequencies", "kind": "interpolated", "width": WIDTH}
    return [*bounds, *checks, interpolated, *distances.cells(WIDTH)]


def run(settings: dict[str, Any], folder, note, stop) -> dict[str, Any] | None:
    del folder, note
    if settings["kind"] == "first negative":
        base = settings["base"]
        expected = FIRST_NEGATIVE[base]
        return {"expected": expected, "found": first_negative(frequencies(base, WIDTH), 2 * expected)}
    if settings["kind"] == "interpolated":
        theta = interpolated_frequencies()
        counts = [int((sums(theta, 1, longest) < 0).sum()) for longest, _ in INTERPOLATED]
        return {"expected": [count for _, count in INTERPOLATED], "found": counts}
    if settings["kind"] != "bound":
        return distances.run(settings)
    length = settings["length"]
    longest, paper = tokens(length), PAPER[length]
    found = least_base(longest, 1e3, WIDTH, stop=lambda: stop.requested)
    if found is None:
        return None
    return {"paper": paper, "found": found, **distances.lowest_by_interval(frequencies(paper, WIDTH), longest)}


def rows(done: list[dict[str, Any]]) -> list[dict[str, Any]]:
    lines = []
    for record in done:
        settings, result = record["settings"], record["result"]
        if settings["kind"] == "bound":
            line = {
                "the paper's": f"{result['paper']:.1e}",
                "found": f"{result['found']:.1e}",
                "min B": f"{result['least']:.3f} at {result['least_at']}",
                "negative m": result["negative"],
            }
        elif "expected" in result:
            line = {"the paper's": str(result["expected"]), "found": str(result["found"])}
        else:
            line = distances.row(settings, result)
        empty = {"what": settings["label"], "the paper's": "", "found": "", "min B": "", "negative m": ""}
        lines.append(empty | line)
    return lines


def figure(done: list[dict[str, Any]]):
    records = [record for record in done if record["settings"]["kind"] == "bound"]
    names = [f"L = {record['settings']['length']}" for record in records]
    picture = new_figure(15, 10.4)
    (curves, lowest, bases), others = picture.subplots(2, 3, width_ratios=(5, 4, 4))
    distances.draw(others, done)
    _draw_curves(curves, records)
    for place, record in enumerate(records):
        least, negative = record["result"]["least"], record["result"]["negative"]
        colour = COLOURS[1] if negative else COLOURS[0]
        lowest.barh(place, least, color=colour, alpha=0.6, height=0.7)
        said = f"{least:.2f} at m = {record['result']['least_at']:,}".replace("-", "−")
        said += f" ({negative} below 0)" if negative else ""
        lowest.text(max(least, 0) + 0.1, place, said, va="center", fontsize=8)
    lowest.axvline(0, color="black", linewidth=0.8)
    name_rows(lowest, names)
    least = [record["result"]["least"] for record in records]
    lowest.set(xlabel="smallest B for 1 ≤ m ≤ L", xlim=(min([-0.5, *least]) - 0.3, max([0.5, *least]) + 4.5))
    plain(lowest, "Its smallest B, and how many are below 0 (orange)", "x")
    places = range(len(records))
    paper, found = ([record["result"][key] for record in records] for key in ("paper", "found"))
    bases.plot(paper, places, "x", color=COLOURS[1], markersize=8, label="the paper's base")
    bases.plot(found, places, "o", color=COLOURS[0], markersize=9, fillstyle="none", label="our base")
    for place, (theirs, ours) in enumerate(zip(paper, found)):
        said = "the same" if theirs == ours else f"{100 * (ours / theirs - 1):+.0f} %".replace("-", "−")
        bases.text(1.02, place, said, transform=bases.get_yaxis_transform(), va="center", fontsize=8.5)
    name_rows(bases, names)
    bases.set(xlabel="base", xscale="log", xlim=(min([5e3, *found, *paper]) / 2, max([5e3, *found, *paper]) * 2))
    plain(bases, "Least base of two digits for which no B is negative", "x")
    bases.legend(fontsize=8.5, loc="lower left", frameon=False)
    explain(
        picture,
        _finding(records),
        "The paper's claim (arXiv 2405.14591): attention tells a similar token from a random one at distance m only if "
        "B_m = Σ_i cos(m · base^(−2i/d)) ≥ 0. A context of L tokens needs a base for which this holds at every m ≤ L; "
        "the paper gives the least base for each L.\n"
        f"Width d = {WIDTH}, computed, nothing trained. Our base: the first of two digits, going up from 1e3, for "
        "which no B_m is negative; the percentage is its difference from the paper's. "
        "Below: angles and two sums by distance. The upper bound of Eq. 7 has no sign, so that it does not show where "
        "a like token scores below another.",
    )
    return picture


def _draw_curves(axes, records: list[dict[str, Any]]) -> None:
    """The smallest B at any distance up to m, which ends at L above zero or below it."""
    from matplotlib import colormaps

    for place, record in enumerate(records):
        reached, values = np.array(record["result"]["curve"]).T
        colour = colormaps["viridis"](0.8 * place / max(1, len(records) - 1))
        axes.plot(reached, np.minimum.accumulate(values), color=colour, linewidth=1.3)
        at = (reached[-1], values.min())
        axes.plot(*at, "X" if at[1] < 0 else "o", color=colour, markersize=5)
        said = f"{record['settings']['length']}: {record['result']['paper']:.1e}"
        below = dict(xytext=(0, -7), textcoords="offset points", rotation=90, ha="center", va="top")
        axes.annotate(said, at, fontsize=8, color=colour, **below)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set(xlabel="distance m", ylabel="smallest B at any distance up to m", xscale="log", xlim=(1, None))
    axes.set(ylim=(-28, WIDTH / 2 + 1), yticks=range(0, WIDTH // 2 + 1, 16))
    plain(axes, "With the paper's base for each context L, up to L (×: below 0)")


def _finding(records: list[dict[str, Any]]) -> str:
    """How many of the paper's bases keep its own rule, and how far the least bases that do are from them."""
    if not records:
        return "Which bases of a rotary embedding does a context need?"
    kept = [record["settings"]["length"] for record in records if not record["result"]["negative"]]
    most = max(record["result"]["negative"] for record in records)
    apart = max(abs(record["result"]["found"] / record["result"]["paper"] - 1) for record in records)
    suffice = f"Of the paper's least RoPE bases for {len(records)} contexts, {len(kept)} suffice at every distance"
    fail = f", the others fail at up to {most} distances" if most else ""
    return f"{suffice}{fail}; those we find suffice and differ by at most {100 * apart:.0f} %"


EXPERIMENT = Experiment(
    cells=cells,
    run=run,
    rows=rows,
    figure=figure,
    cost="two minutes on one core; --quick: ten seconds, contexts to 32k",
)
