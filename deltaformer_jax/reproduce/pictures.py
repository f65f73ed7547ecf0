"""Plots that several experiments share: accuracy against steps, and bars of the last accuracies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from deltaformer_jax.plot.style import GREY, legend_entries, line_styles, plain, reference


def new_figure(width: float = 11, height: float = 4.5) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def values_of(done: Sequence[dict[str, Any]], key: str) -> list[Any]:
    """The different values of settings[key], in the order in which they come."""
    return list(dict.fromkeys(record["settings"][key] for record in done))


def listed(names: Sequence[Any], last: str = "and") -> str:
    """ "a", "a and b", "a, b and c"."""
    names = [str(name) for name in names]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} {last} {names[-1]}"


def spread(count: int, width: float) -> np.ndarray:
    """Offsets from −width/2 to width/2, which keep marks of the same place from hiding each other."""
    return np.linspace(-width / 2, width / 2, count) if count > 1 else np.zeros(1)


def best_first(done: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    """Family -> the last accuracies of its runs; the family with the best run of all first."""
    scores: dict[str, list[float]] = {}
    for record in done:
        scores.setdefault(record["settings"]["family"], []).append(record["result"]["accuracy"])
    return dict(sorted(scores.items(), key=lambda item: -max(item[1])))


def figure_legend(picture: Any, *panels: Any) -> None:
    """A legend of `panels`, of all if none is given: right of the whole picture, each label once, bars before lines."""
    found = legend_entries(panels or picture.axes)
    found = dict(sorted(found.items(), key=lambda item: hasattr(item[1], "get_marker")))  # which lines have
    picture.legend(
        found.values(),
        found.keys(),
        loc="outside right center",
        fontsize=8.5,
        frameon=False,
        handlelength=2.8,
    )


def accuracy_figure(
    done: list[dict[str, Any]],
    drawn: list[dict[str, Any]],
    references: dict[str, float],
    target: float,
    titles: tuple[str, str],
    paper: dict[str, float] | None = None,
) -> Any:
    """A bar for the last accuracies of each family of runs, best first, and the curves of the runs in `drawn`."""
    picture = new_figure(13, 5)
    bars, curves = picture.subplots(1, 2, width_ratios=(4, 5))
    scores = best_first(done)
    styles = line_styles(values_of(done, "family"), [name for name in scores if name.startswith("Transformer")])
    accuracy_bars(bars, scores, styles, references, paper)
    accuracy_curves(curves, drawn, styles, list(scores), {**references, f"solved: {target:g}": target})
    room = 18 if references else 8  # for their names
    plain(bars, titles[0], "x", room)
    plain(curves, titles[1], room=room)
    figure_legend(picture, curves, bars)
    return picture


def name_rows(axes: Any, names: Sequence[str]) -> None:
    """Names on the left of rows 0, 1, … from the top; with few rows space is left below them."""
    axes.set_yticks(range(len(names)), names, fontsize=8.5)
    axes.set_ylim(max(len(names), 4) - 0.4, -0.6)


def accuracy_bars(
    axes: Any,
    scores: dict[str, list[float]],
    styles: dict[str, dict[str, Any]],
    references: dict[str, float] | None = None,
    paper: dict[str, float] | None = None,
) -> None:
    """A bar up to the best score of each name, a circle for each score, and the paper's number as a stroke."""
    paper = paper or {}
    for place, (name, runs) in enumerate(scores.items()):
        axes.barh(place, max(runs), color=styles[name]["color"], alpha=0.5, height=0.75)
        places = place + spread(len(runs), 0.55)
        label = None if place else "a run"
        axes.plot(runs, places, "o", color=GREY, markersize=3.5, fillstyle="none", label=label)
        said = f"{max(runs):.3f}"
        if name in paper:
            label = None if place else "the paper's number"
            axes.plot([paper[name]] * 2, [place - 0.42, place + 0.42], color="black", linewidth=2.5, label=label)
            said += f" (paper {paper[name]:.3f})"
        axes.text(1.02, place, said, va="center", fontsize=8.5, transform=axes.get_yaxis_transform())
    for text, value in (references or {}).items():
        reference(axes, value, text, upright=True)
    name_rows(axes, list(scores))
    axes.set(xlabel="last evaluation accuracy; bar and number: the best run", xlim=(0, 1.01))


def accuracy_curves(
    axes: Any,
    done: list[dict[str, Any]],
    styles: dict[str, dict[str, Any]],
    order: Sequence[str],
    references: dict[str, float],
) -> None:
    """Accuracy against step, one line a cell, one style and one entry of the legend for each family.

    Where training ended early because the last length was solved, the line ends in a dot.
    """
    for name in order:
        here = [record for record in done if record["settings"]["family"] == name]
        for number, record in enumerate(here):
            steps, _, accuracies, _ = zip(*record["result"]["curve"])
            label = None if number else name
            axes.plot(steps, accuracies, label=label, **styles[name])
    ends = [r["result"]["curve"][-1] for r in done if r["result"]["solved_at"][-1] is not None]
    if ends:
        steps, _, accuracies, _ = zip(*ends)
        axes.plot(steps, accuracies, "o", color=GREY, markersize=5, label="solved, training ends")
    for text, value in references.items():
        reference(axes, value, text)
    lowest = [point[2] for record in done for point in record["result"]["curve"]]
    bottom = 0.9 * min([1, *lowest, *references.values()])
    axes.set(xlabel="training step", ylabel="evaluation accuracy", ylim=(bottom, 1.03), xlim=(0, None))
