"""The heat map of long-context accuracy: a panel per task, lengths to the right, depths downwards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from deltaformer_jax.plot.style import GREY, explain


def heat_map(records: Sequence[dict[str, Any]], name: str, trained: int | None = None) -> Any:
    """A matplotlib Figure of `accuracy`'s records. `trained`: the tokens per row in training, drawn as a line."""
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(record["task"] for record in records))
    tables = [_table([record for record in records if record["task"] == task]) for task in tasks]
    rows = [len(depths) for _, depths, _ in tables]
    columns = max(len(lengths) for lengths, _, _ in tables)
    drawn = Figure(
        figsize=(max(6.4, 1.9 + 0.78 * columns), 1.5 + sum(0.42 * r + 0.95 for r in rows)), layout="constrained"
    )
    panels = drawn.subplots(len(tasks), 1, squeeze=False, height_ratios=[r + 0.8 for r in rows])[:, 0]
    for panel, task, (lengths, depths, values) in zip(panels, tasks, tables):
        image = panel.imshow(values, vmin=0, vmax=1, cmap="YlGnBu", aspect="auto")
        for (row, column), value in np.ndenumerate(values):
            if np.isfinite(value):
                dark = "white" if value > 0.55 else "#222222"
                panel.text(column, row, f"{100 * value:.0f}", ha="center", va="center", color=dark, fontsize=9)
        panel.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
        if depths == [None]:
            panel.set_yticks([])
        else:
            panel.set_yticks(range(len(depths)), [f"{100 * depth:.0f} %" for depth in depths])
            panel.set_ylabel("depth of the needle")
        panel.set_title(task.replace("_", " "), loc="left", fontsize=10)
        panel.set_xticks(np.arange(len(lengths) + 1) - 0.5, minor=True)
        panel.set_yticks(np.arange(len(depths) + 1) - 0.5, minor=True)
        panel.grid(which="minor", color="white", linewidth=2)
        panel.tick_params(which="both", length=0)
        for spine in panel.spines.values():
            spine.set_visible(False)
        if trained is not None and lengths[0] <= trained < lengths[-1]:
            place = sum(length <= trained for length in lengths) - 0.5
            panel.axvline(place, color="#D55E00", linewidth=1.6, linestyle="--")
            panel.text(place, -0.62, " longer than in training", color="#D55E00", fontsize=8, va="bottom", ha="left")
    panels[-1].set_xlabel("tokens of the text with its answer")
    bar = drawn.colorbar(image, ax=panels, shrink=min(1, 3 / sum(rows) + 0.4), pad=0.02)
    bar.set_label("answers found", color=GREY)
    bar.ax.set_yticks([0, 0.5, 1], ["0 %", "50 %", "100 %"])
    bar.outline.set_visible(False)
    explain(drawn, _title(name, records, tasks))
    return drawn


def _table(records):
    lengths = sorted({record["length"] for record in records})
    depths = sorted({record["depth"] for record in records}, key=lambda depth: -1 if depth is None else depth)
    values = np.full((len(depths), len(lengths)), np.nan)
    for record in records:
        values[depths.index(record["depth"]), lengths.index(record["length"])] = record["accuracy"]
    return lengths, depths, values


def _title(name, records, tasks) -> str:
    longest = max(record["length"] for record in records)
    means = []
    for task in tasks:
        last = [record["accuracy"] for record in records if record["task"] == task and record["length"] == longest]
        if last:
            means.append(f"{100 * sum(last) / len(last):.0f} % of {task.replace('_', ' ')}")
    return f"At {longest:,} tokens {name} finds {', '.join(means)}"
