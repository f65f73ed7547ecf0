"""The picture: one panel per number, with one curve per run."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from deltaformer_jax.plot.curves import Curves, smoothed
from deltaformer_jax.plot.style import GREY, explain, legend_entries, line_styles, plain

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
_SMOOTHED = ("loss", "accuracy")
# Evaluation -> (what the title calls it, the best of several).
_EVALUATIONS = {"eval_accuracy": ("evaluation accuracy", max), "eval_bits_per_byte": ("evaluation bits per byte", min)}


def figure(runs: Sequence[Curves], x: str, width: int) -> Any:
    """A matplotlib Figure with a panel for each of PANELS that some run has values of."""
    from matplotlib.figure import Figure  # with no window system behind it
    from matplotlib.ticker import EngFormatter, LogLocator

    if x == "tokens" and (missing := [run.name for run in runs if not run.tokens_per_step]):
        raise ValueError(f"--x tokens: {missing[0]} has no config.json with its batch size; use --x step")
    panels = [(name, title) for name, title in PANELS if any(name in run.values for run in runs)]
    if not panels:
        raise ValueError("no run has logged a loss or an evaluation yet")
    columns = min(len(panels), 3)
    lines = -(-len(panels) // columns)
    drawn = Figure(figsize=(max(7, 5.2 * columns), 3.6 * lines + 1.1 + 0.22 * len(runs)), layout="constrained")
    axes = drawn.subplots(lines, columns, squeeze=False, sharex=True).ravel()
    styles = line_styles(range(len(runs)))
    for panel, (name, title) in zip(axes, panels):
        for number, run in enumerate(runs):
            if name in run.values:
                # Runs often have the same learning rate: the first line is the widest.
                over = 3 * (1 - (number + 1) / len(runs)) if name == "learning_rate" else 0
                _draw(panel, run, name, x, width, {**styles[number], "linewidth": 1.3 + over})
        panel.set_xlabel("tokens" if x == "tokens" else "step")
        panel.set_ylabel(title)
        plain(panel)
        panel.tick_params(labelbottom=True)
        panel.xaxis.set_major_formatter(EngFormatter(sep=""))
        if name in _LOGARITHMIC and any((run.values[name][1] > 0).any() for run in runs if name in run.values):
            panel.set_yscale("log")
            panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            panel.yaxis.set_major_formatter("{x:g}")
            panel.yaxis.set_minor_formatter("")
        elif name == "tokens_per_second":
            panel.yaxis.set_major_formatter(EngFormatter(sep=""))
            panel.set_ylim(bottom=0)
        elif name == "learning_rate":
            panel.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    for panel in axes[len(panels) :]:
        panel.set_axis_off()
    if width > 1 and any(name in _SMOOTHED for name, _ in panels):
        axes[0].plot([], [], color=GREY, linewidth=2.2, label=f"thick: mean of {width} logged steps, at their middle")
        axes[0].plot([], [], color=GREY, linewidth=0.8, alpha=0.5, label="thin: every logged step")
    found = legend_entries(axes)
    labels = sorted(found, key=lambda label: found[label].get_color() == GREY)  # runs first
    handles = [found[label] for label in labels]
    drawn.legend(handles, labels, loc="outside lower left", frameon=False, ncols=1, handlelength=3)
    explain(drawn, _title(runs))
    return drawn


def _draw(panel: Any, run: Curves, name: str, x: str, width: int, style: dict[str, Any]) -> None:
    steps, values = run.values[name]
    places = steps * run.tokens_per_step if x == "tokens" else steps
    named = {**style, "label": f"{run.name}{_last(run)}"}
    if name in _SMOOTHED and width > 1:
        # Alone where there are too few values for a mean.
        faint = 0.3 if len(values) >= width else 0.9
        panel.plot(places, values, color=style["color"], alpha=faint, linewidth=0.8)
        panel.plot(*smoothed(places, values, width), **{**named, "linewidth": 2.2})
    elif name in _EVALUATIONS:
        panel.plot(places, values, marker="o", markersize=3.5, **named)
    else:
        panel.plot(places, values, **named)
    if len(lost := places[~np.isfinite(values)]):
        label, at = "NaN or infinite", dict(transform=panel.get_xaxis_transform(), clip_on=False)
        panel.plot(lost, np.full(len(lost), 0.02), "x", color=GREY, label=label, **at)
        panel.plot(lost, np.full(len(lost), 0.02), "x", color=style["color"], **at)


def _title(runs: Sequence[Curves]) -> str:
    """A sentence: how far one run is, or which of several is ahead in their last evaluations."""
    if len(runs) == 1:
        return f"{runs[0].name}{_last(runs[0])}"
    for name, (said, better) in _EVALUATIONS.items():
        last = [(run.values[name][1][-1], run.values[name][0][-1], run.name) for run in runs if name in run.values]
        last = [one for one in last if np.isfinite(one[0])]
        if len(last) > 1:
            value, step, best = better(last)
            most = "highest" if better is max else "lowest"
            apart = "" if len({step for _, step, _ in last}) == 1 else "; their last steps differ"
            return f"Of {len(last)} runs {best} has the {most} {said}: {value:.4g} at step {int(step):,}{apart}"
    return f"{len(runs)} runs, not two of them with the same kind of evaluation yet"


def _last(run: Curves) -> str:
    """The end of a run's label in the legend: its last evaluation or loss, and its last step."""
    steps = max(int(steps[-1]) for steps, _ in run.values.values())
    if "eval_accuracy" in run.values:
        return f": accuracy {run.values['eval_accuracy'][1][-1]:.4g}, step {steps:,}"
    if "eval_bits_per_byte" in run.values:
        return f": {run.values['eval_bits_per_byte'][1][-1]:.4g} bits per byte, step {steps:,}"
    return f": loss {run.values['loss'][1][-1]:.4g}, step {steps:,}" if "loss" in run.values else f": step {steps:,}"
