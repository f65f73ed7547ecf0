"""The curves of one run or of several, side by side in one picture:

    python -m deltaformer_jax.plot DIR... [--out FILE.png] [--x step|tokens] [--smooth N] [--names NAME,NAME]

Loss (its mean over N logged steps around each, and every logged step faintly), evaluation in bits per byte or, of a
synthetic task, accuracy, norm of the gradient, learning rate and tokens per second, from DIR/metrics.jsonl; a run may
still be going on. Without --out: curves.png in the first DIR. DIRs may be gs:// paths. Bad input: one line, exit code
2.
"""

import io
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from deltaformer_jax.config.argument_parser import ArgumentParser
from deltaformer_jax.config.command_line import one_line_errors


class Curves(NamedTuple):
    """A run's numbers: `values[name]` is (steps, values), float64 [N] both, in the order of the steps."""

    name: str
    values: dict[str, tuple[np.ndarray, np.ndarray]]
    tokens_per_step: int


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


def main(arguments: list[str] | None = None) -> None:
    parser = ArgumentParser(
        prog="python -m deltaformer_jax.plot", description="The curves of runs, side by side in one picture."
    )
    parser.add_argument("workdirs", nargs="+", metavar="DIR", help="runs' folders; may be gs://")
    parser.add_argument("--out", metavar="FILE", help="the picture, .png, .pdf or .svg (default: DIR/curves.png)")
    parser.add_argument("--x", choices=("step", "tokens"), default="step", help="along the bottom (default: step)")
    parser.add_argument("--smooth", type=int, default=10, metavar="N", help="mean of so many losses (default: 10)")
    parser.add_argument("--names", metavar="NAME,NAME", help="of the runs, in the legend (default: the folders')")
    flags = parser.parse_args(arguments)

    with one_line_errors("deltaformer_jax.plot"):
        if flags.smooth < 1:
            raise ValueError(f"--smooth {flags.smooth}: give 1 (no smoothing) or more")
        labels = names(flags.workdirs, flags.names)
        runs = [read_curves(workdir)._replace(name=name) for workdir, name in zip(flags.workdirs, labels)]
        out = epath.Path(flags.out) if flags.out else epath.Path(flags.workdirs[0]) / "curves.png"
        if out.suffix not in (".png", ".pdf", ".svg"):
            raise ValueError(f"--out {out}: end it in .png, .pdf or .svg")
        picture = io.BytesIO()
        figure(runs, flags.x, flags.smooth).savefig(picture, format=out.suffix[1:], dpi=150)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_bytes(picture.getvalue())
        print(out)


def names(workdirs: Sequence[str], given: str | None) -> list[str]:
    """--names's, or the folders' names, with as many of their parents as tell them apart."""
    if given is not None:
        found = given.split(",")
        if len(found) != len(workdirs):
            raise ValueError(f"--names: {len(found)} of them for {len(workdirs)} runs")
        return found
    parts = [[part for part in str(workdir).split("/") if part not in ("", ".")] or ["."] for workdir in workdirs]
    for depth in range(1, max(map(len, parts)) + 1):
        found = ["/".join(part[-depth:]) for part in parts]
        if len(set(found)) == len({tuple(part) for part in parts}):
            break
    return found


def read_curves(workdir: epath.PathLike) -> Curves:
    """A run's metrics. Raises FileNotFoundError or ValueError naming the folder or file."""
    folder = epath.Path(workdir)
    path = folder / "metrics.jsonl"
    if not folder.exists():
        raise FileNotFoundError(f"{folder}: no such folder")
    if not path.exists():
        raise FileNotFoundError(f"{folder}: not the folder of a run (it has no metrics.jsonl)")
    lines = path.read_text().splitlines()
    points: dict[str, list[tuple[float, float]]] = {}
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            step = float(record["step"])
        except (ValueError, KeyError, TypeError):
            if number == len(lines):
                break  # a run is writing it
            raise ValueError(f"{path}, line {number}: not a record of a run") from None
        for name, value in record.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                points.setdefault(name, []).append((step, float(value)))
    if not points:
        raise ValueError(f"{path}: no step has been logged yet")
    values = {name: tuple(np.array(sorted(pairs)).T) for name, pairs in points.items()}
    return Curves(folder.name, values, _tokens_per_step(folder))


def _tokens_per_step(folder: epath.Path) -> int:
    try:
        data = json.loads((folder / "config.json").read_text())["data"]
        return int(data["batch_size"]) * int(data["sequence_length"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def smoothed(values: np.ndarray, width: int) -> np.ndarray:
    """The mean over as many neighbours on the left as on the right, up to `width` in all: the curve lags nowhere.

    NaN and infinity stay where they are and enter no mean.
    """
    finite = np.isfinite(values)
    sums = np.cumsum(np.concatenate([[0.0], np.where(finite, values, 0.0)]))
    counts = np.cumsum(np.concatenate([[0], finite]))
    index = np.arange(len(values))
    reach = np.minimum(width // 2, np.minimum(index, index[::-1]))
    start, end = index - reach, index + reach + 1
    means = (sums[end] - sums[start]) / np.maximum(counts[end] - counts[start], 1)
    return np.where(finite, means, values)


def figure(runs: Sequence[Curves], x: str, width: int) -> Any:
    """A matplotlib Figure with a panel for each of PANELS that some run has values of."""
    from matplotlib.figure import Figure  # with no window system behind it
    from matplotlib.ticker import EngFormatter, LogLocator, ScalarFormatter

    if x == "tokens" and (missing := [run.name for run in runs if not run.tokens_per_step]):
        raise ValueError(f"--x tokens: {missing[0]} has no config.json that says how many tokens a step has")
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
    """What the legend says of a run: how far it is, and its last evaluation or loss."""
    steps = max(int(steps[-1]) for steps, _ in run.values.values())
    if "eval_accuracy" in run.values:
        return f": accuracy {run.values['eval_accuracy'][1][-1]:.4g}, step {steps:,}"
    if "eval_bits_per_byte" in run.values:
        return f": {run.values['eval_bits_per_byte'][1][-1]:.4g} bits per byte, step {steps:,}"
    return f": loss {run.values['loss'][1][-1]:.4g}, step {steps:,}" if "loss" in run.values else f": step {steps:,}"


def _colours(count: int) -> list[Any]:
    """Okabe and Ito's colours, which colour-blind eyes tell apart; of a continuous scale beyond eight runs."""
    table = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442"]
    if count <= len(table):
        return table[:count]
    import matplotlib

    return list(matplotlib.colormaps["viridis"](np.linspace(0, 0.9, count)))


if __name__ == "__main__":
    main()
