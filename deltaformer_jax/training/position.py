"""A run's position in its data, and the batches from there on."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from deltaformer_jax.config import Config
from deltaformer_jax.data import Corpus, Mixture, TaskData, batches


class Position(NamedTuple):
    """The position of a run that has seen `step` batches. Batches are numbered and taken in order.

    passed      the numbers of batches that this run never takes, since it went back because of them
    next_batch  the number of the next batch: step, plus one for each number in `passed` that lies before it
    streak      the numbers of the newest batches if their updates were skipped, else ()
    """

    step: int = 0
    next_batch: int = 0
    passed: tuple[int, ...] = ()
    streak: tuple[int, ...] = ()

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> "Position":
        """The position in the record of a checkpoint."""
        numbers = {name: tuple(int(number) for number in record[name]) for name in ("passed", "streak")}
        return cls(step=int(record["step"]), next_batch=int(record["next_batch"]), **numbers)

    def as_record(self) -> dict[str, Any]:
        """The whole position as plain JSON."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in self._asdict().items()}

    def after(self, number: int) -> "Position":
        """The position once batch `number` has been seen."""
        return self._replace(step=self.step + 1, next_batch=number + 1)


def number_batches(
    corpus: Corpus | Mixture | TaskData, config: Config, position: Position, rows: np.ndarray | None = None
) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """(number, the `rows` of that batch) from `position.next_batch` on, without the numbers in `passed`."""
    stream = batches(
        corpus,
        "train",
        sequence_length=config.data.sequence_length,
        batch_size=config.data.batch_size,
        seed=config.run.seed,
        start_step=position.next_batch,
        rows=rows,
    )
    passed = set(position.passed)
    for number, batch in enumerate(stream, position.next_batch):
        if number not in passed:
            yield number, batch
