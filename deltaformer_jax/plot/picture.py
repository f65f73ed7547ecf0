"""The picture: one panel per number, with one curve per run."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from deltaformer_jax.plot.curves import Curves, smoothed

PANELS = (
    ("loss", "training loss (nats per token)"),
    ("eval_bits_per_byte", "evaluation (bits per byte)"),
    ("accuracy", "training accuracy"),
    ("eval_accuracy", "evaluation (accuracy)"),
    ("grad_norm", "norm of the gradient"),
    ("learning_rate", "learning rate"),
    ("tokens_per_second", "tokens per second"),
)
_LOGARITHMIC = ("grad_norm",)


def figure(runs: Sequence[Curves], x: str, width: int) -> Any:
    """A matplotlib Figure with one panel for each entry of PANELS for which a run has values.

    `x`: "step" or "tokens". `width`: how many logged steps the training loss is averaged over.
    """
    from matplotlib.figure import Figure  # unlike pyplot, it needs no display
    from matplotlib.ticker import EngFormatter, LogLocator, ScalarFormatter

    if x == "tokens" and (missing := [run.name for run in runs if not run.tokens_per_step]):
        raise ValueError(f"--x tokens: {missing[0]} has no config.json with its batch size; use --x step")
    panels = [(name, title) for name, title in PANELS if any(name in run.values for run in runs)]
    if not panels:
        raise ValueError("no run has logged a loss or an evaluation yet")
    columns = min(len(panels), 3)
    lines = -(-len(panels) // columns)
    drawn = Figure(figsize=(5.2 * columns, 3.6 * lines + 0.3 + 0.22 * len(runs)), layout="constrained")
    axes = drawn.subplots(lines, columns, squeeze=False, sharex=True).ravel()
    colours = _colours(len(runs))
    for panel, (name, title) in zip(axes, panels):
        for run, colour in zip(runs, colours):
            if name in run.values:
                _draw(panel, run, name, x, width, colour)
        panel.set_xlabel("tokens" if x == "tokens" else "step")
        panel.set_ylabel(title)
        panel.grid(alpha=0.25, linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(labelbottom=True)
        panel.xaxis.set_major_formatter(EngFormatter(sep=""))
        if name in _LOGARITHMIC and any((run.values[name][1] > 0).any() for run in runs if name in run.values):
            panel.set_yscale("log")
            panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            panel.yaxis.set_major_formatter(ScalarFormatter())
            panel.yaxis.set_minor_formatter("")
        elif name == "tokens_per_second":
            panel.yaxis.set_major_formatter(EngFormatter(sep=""))
            panel.set_ylim(bottom=0)
        elif name == "learning_rate":
            panel.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    for panel in axes[len(panels) :]:
        panel.set_axis_off()
    handles, labels = [], []
    for handle, label in (pair for panel in axes for pair in zip(*panel.get_legend_handles_labels())):
        if label not in labels:
            handles.append(handle)
            labels.append(label)
    drawn.legend(handles, labels, loc="outside upper left", frameon=False, ncols=1)
    return drawn


def _draw(panel: Any, run: Curves, name: str, x: str, width: int, colour: Any) -> None:
    steps, values = run.values[name]
    places = steps * run.tokens_per_step if x == "tokens" else steps
    label = f"{run.name}{_last(run)}"
    if name == "loss" and width > 1:
        panel.plot(places, values, color=colour, alpha=0.25, linewidth=0.8)
        panel.plot(places, smoothed(values, width), color=colour, linewidth=1.6, label=label)
    elif name in ("eval_bits_per_byte", "eval_accuracy"):
        panel.plot(places, values, color=colour, linewidth=1.4, marker="o", markersize=3.5, label=label)
    else:
        panel.plot(places, values, color=colour, linewidth=1.2, label=label)


def _last(run: Curves) -> str:
    """The end of a run's label in the legend: its last evaluation or loss, and its last step."""
    steps = max(int(steps[-1]) for steps, _ in run.values.values())
    if "eval_accuracy" in run.values:
        return f": accuracy {run.values['eval_accuracy'][1][-1]:.4g}, step {steps:,}"
    if "eval_bits_per_byte" in run.values:
        return f": {run.values['eval_bits_per_byte'][1][-1]:.4g} bits per byte, step {steps:,}"
    return f": loss {run.values['loss'][1][-1]:.4g}, step {steps:,}" if "loss" in run.values else f": step {steps:,}"


def _colours(count: int) -> list[Any]:
    """Okabe and Ito's eight colours, distinguishable by colour-blind readers; more runs get a continuous scale."""
    table = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442"]
    if count <= len(table):
        return table[:count]
    import matplotlib

    return list(matplotlib.colormaps["viridis"](np.linspace(0, 0.9, count)))
