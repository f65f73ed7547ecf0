"""Plots that several experiments share: accuracy against steps, and bars of the last accuracies."""

from __future__ import annotations

from typing import Any

COLOURS = [f"C{i}" for i in range(10)]


def colours_of(done: list[dict[str, Any]], key: str) -> dict[str, str]:
    """A colour for each value of settings[key], in order of first appearance."""
    names = dict.fromkeys(record["settings"][key] for record in done)
    return {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}


def accuracy_curves(axes: Any, done: list[dict[str, Any]], key: str, chance: float | None = None) -> None:
    """Plot accuracy against step: one line per cell, one colour and one legend entry per value of settings[key].

    `chance`: the accuracy of guessing, drawn as a dashed line.
    """
    colours, named = colours_of(done, key), set()
    for record in done:
        name = record["settings"][key]
        steps, _, accuracies, _ = zip(*record["result"]["curve"])
        axes.plot(
            steps, accuracies, color=colours[name], linewidth=1.2, alpha=0.8, label=None if name in named else name
        )
        named.add(name)
    axes.axhline(0.99, color="grey", linewidth=0.8, linestyle=":")
    if chance is not None:
        axes.axhline(chance, color="grey", linewidth=0.8, linestyle="--", label="guessing")
    axes.set(xlabel="step", ylabel="accuracy on separately drawn examples", ylim=(0, 1.03))
    axes.legend(fontsize=7, loc="lower right")


def accuracy_bars(
    axes: Any, done: list[dict[str, Any]], key: str, paper: dict[str, float] | None = None, score=None
) -> None:
    """Plot, per value of settings[key]: a bar up to the best score, a dot per cell, and the paper's number in red.

    `score(record)`: by default the last accuracy.
    """
    score = score or (lambda record: record["result"]["accuracy"])
    colours = colours_of(done, key)
    for place, (name, colour) in enumerate(colours.items()):
        scores = [score(record) for record in done if record["settings"][key] == name]
        axes.barh(place, max(scores), color=colour, alpha=0.55)
        axes.plot(scores, [place] * len(scores), ".", color="black", markersize=4)
        axes.text(1.02, place, f"{max(scores):.3f}", va="center", fontsize=8)
        if paper and name in paper:
            axes.plot([paper[name]] * 2, [place - 0.4, place + 0.4], color="red", linewidth=2)
    if paper:
        axes.plot([], [], color="red", linewidth=2, label="the paper's")
        axes.legend(fontsize=7, loc="lower left")
    axes.set_yticks(range(len(colours)), list(colours), fontsize=8)
    axes.invert_yaxis()
    axes.set(xlabel="last accuracy (bar: the best, dots: each run)", xlim=(0, 1.12))


def new_figure(width: float = 11, height: float = 4.5) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")
