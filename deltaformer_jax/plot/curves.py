"""Reading and smoothing the numbers of runs for a plot."""

import json
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from etils import epath

from deltaformer_jax.config.lines import lines


class Curves(NamedTuple):
    """A run's numbers: `values[name]` is (steps, values), both float64 [N], sorted by step.

    `tokens_per_step` is 0 if the run's config.json can't be read.
    """

    name: str
    values: dict[str, tuple[np.ndarray, np.ndarray]]
    tokens_per_step: int


def names(workdirs: Sequence[str], given: str | None) -> list[str]:
    """The runs' names: those of --names (`given`), or the folders' names, with enough parent folders to differ."""
    if given is not None:
        found = given.split(",")
        if len(found) != len(workdirs):
            raise ValueError(f"--names: {len(found)} names for {len(workdirs)} runs; give one per run")
        return found
    parts = [[part for part in str(workdir).split("/") if part not in ("", ".")] or ["."] for workdir in workdirs]
    for depth in range(1, max(map(len, parts)) + 1):
        found = ["/".join(part[-depth:]) for part in parts]
        if len(set(found)) == len({tuple(part) for part in parts}):
            break
    return found


def read_curves(workdir: epath.PathLike) -> Curves:
    """Read a run's metrics.jsonl. Raises FileNotFoundError or ValueError, naming the folder or file."""
    folder = epath.Path(workdir)
    path = folder / "metrics.jsonl"
    if not folder.exists():
        raise FileNotFoundError(f"{folder}: no such folder")
    if not path.exists():
        raise FileNotFoundError(f"{folder}: not the folder of a run (it has no metrics.jsonl)")
    records = lines(path.read_text())
    points: dict[str, list[tuple[float, float]]] = {}
    for number, line in enumerate(records, 1):
        try:
            record = json.loads(line)
            step = float(record["step"])
        except (ValueError, KeyError, TypeError):
            if number == len(records):
                break  # the run is writing this line
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


def smoothed(steps: np.ndarray, values: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """The mean of every `width` values that follow each other, at the mean of their steps: (steps, means).

    There are width − 1 fewer means than values, none at all of fewer than `width` values: no mean is over less, so the
    curve has no hook at its ends, and it lags nowhere. NaN and infinity enter no mean; nor does their step.
    """
    if len(values) < width:
        return np.empty(0), np.empty(0)
    finite = np.isfinite(values)
    windows = lambda numbers: np.lib.stride_tricks.sliding_window_view(np.where(finite, numbers, 0.0), width).sum(-1)
    counts = windows(np.ones(len(values)))
    counts = np.where(counts == 0, np.nan, counts)  # a window without a number has no mean
    return windows(steps) / counts, windows(values) / counts
