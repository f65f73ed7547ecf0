"""A task as a grain source, with random access to single examples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np


class TaskSource:
    """source[i] is example i of a task: a dict of its arrays without the batch axis, `{"tokens": [T], ...}`.

        grain.MapDataset.source(TaskSource(MQAR(), seed=0, examples=100_000)).shuffle(seed=1).batch(64)

    Args:
      task: any task of this package; task(seed, indices) returns a NamedTuple of arrays.
      seed: an int or a string. Examples of different seeds are independent.
      examples: the number of examples.
    Raises ValueError if `examples` is below 1, IndexError for an index out of range. Cost: reading single examples is
    slower than generating a batch with task(seed, indices).
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

    def __repr__(self) -> str:  # grain stores this text with an iterator's state
        return f"TaskSource({self._task!r}, seed={self._seed!r}, examples={self._examples})"
