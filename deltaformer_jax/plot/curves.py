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


def smoothed(values: np.ndarray, width: int) -> np.ndarray:
    """A centred moving mean: equally many neighbours on both sides, `width // 2` or fewer near the ends.

    A centred mean does not shift the curve to the right. NaN and infinity are kept in place and enter no mean.
    """
    finite = np.isfinite(values)
    sums = np.cumsum(np.concatenate([[0.0], np.where(finite, values, 0.0)]))
    counts = np.cumsum(np.concatenate([[0], finite]))
    index = np.arange(len(values))
    reach = np.minimum(width // 2, np.minimum(index, index[::-1]))
    start, end = index - reach, index + reach + 1
    means = (sums[end] - sums[start]) / np.maximum(counts[end] - counts[start], 1)
    return np.where(finite, means, values)
