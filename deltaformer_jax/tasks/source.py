"""A task as a grain source: random access to its examples, one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np


class TaskSource:
    """Example i of a task under `seed`: a dict of its arrays without the axis of rows, `{"tokens": [T], ...}`.

        grain.MapDataset.source(TaskSource(MQAR(), seed=0, examples=100_000)).shuffle(seed=1).batch(64)

    Args: task: any of this package, called as task(seed, indices) and returning a NamedTuple of arrays. seed: an int or
      a text; examples of unlike seeds have nothing to do with each other. examples: how many there are.
    Raises ValueError for examples below 1, IndexError for an index outside. Cost: one example at a time is slower than
    a batch at a time, which is task(seed, indices) itself.
    """

    def __init__(self, task: Callable[[int | str, np.ndarray], Any], seed: int | str, examples: int):
        if examples < 1:
            raise ValueError(f"examples={examples}: must be at least 1")
        self._task, self._seed, self._examples = task, seed, examples

    def __len__(self) -> int:
        return self._examples

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        index = range(self._examples)[index]
        example = self._task(self._seed, np.array([index], np.int64))
        return {name: array[0] for name, array in example._asdict().items()}

    def __repr__(self) -> str:  # grain keeps it with an iterator's state
        return f"TaskSource({self._task!r}, seed={self._seed!r}, examples={self._examples})"
