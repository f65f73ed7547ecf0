"""Where in its data a run stands, and the batches from there on."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from deltaformer_jax.config import Config
from deltaformer_jax.data import Corpus, Mixture, TaskData, batches


class Position(NamedTuple):
    """A run that has seen `step` batches. Batches are numbered and taken in order, but never those that it passes over.

    `next_batch` is the number of the next one: step, and one more for each of `passed`, the batches that this run never
    takes. `streak` are the newest ones if they were skipped.
    """

    step: int = 0
    next_batch: int = 0
    passed: tuple[int, ...] = ()
    streak: tuple[int, ...] = ()

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> "Position":
        """Of a checkpoint's record."""
        numbers = {name: tuple(int(number) for number in record[name]) for name in ("passed", "streak")}
        return cls(step=int(record["step"]), next_batch=int(record["next_batch"]), **numbers)

    def as_record(self) -> dict[str, Any]:
        """Plain JSON: the whole position in the data."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in self._asdict().items()}

    def after(self, number: int) -> "Position":
        """The position once batch `number` has been seen."""
        return self._replace(step=self.step + 1, next_batch=number + 1)


def number_batches(
    corpus: Corpus | Mixture | TaskData, config: Config, position: Position
) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """(number, this process's rows of the batch) from `position.next_batch` on, without those passed over."""
    stream = batches(
        corpus,
        "train",
        sequence_length=config.data.sequence_length,
        batch_size=config.data.batch_size,
        seed=config.run.seed,
        start_step=position.next_batch,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    passed = set(position.passed)
    for number, batch in enumerate(stream, position.next_batch):
        if number not in passed:
            yield number, batch
