"""A run's position in its data, and the batches from there on."""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh, NamedSharding

from deltaformer_jax.config import Config
from deltaformer_jax.data import Corpus, Mixture, TaskData, batches
from deltaformer_jax.sharding.mesh import batch_sharding
from deltaformer_jax.sharding.rows import local_rows, to_devices


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


class Feed:
    """The batches of a run from any position on, and their way to the devices.

    beside: name -> (its text, its rows), what a batch has beside the rows of data.sequence_length: a dict of arrays
    under that name. Of several processes each reads the rows that its devices hold.
    """

    def __init__(
        self,
        config: Config,
        corpus: Corpus | Mixture | TaskData,
        mesh: Mesh,
        beside: dict[str, tuple] | None = None,
    ):
        self._seed, self._sharding = config.run.seed, batch_sharding(mesh)
        part = functools.partial(_Part, sharding=self._sharding)
        self._main = part(corpus, config.data.sequence_length, config.data.batch_size)
        self._beside = {name: part(text, rows.length, rows.number) for name, (text, rows) in (beside or {}).items()}

    def stream(self, position: Position) -> Iterator[tuple[int, dict[str, Any]]]:
        """(number, this process's rows of that batch) from `position.next_batch` on, without those in `passed`."""
        parts = [self._main, *self._beside.values()]
        streams = [part.stream(self._seed + i, position.next_batch) for i, part in enumerate(parts)]
        passed = set(position.passed)
        for number, (batch, *others) in enumerate(zip(*streams), position.next_batch):
            if number not in passed:
                yield number, {**batch, **dict(zip(self._beside, others))}

    def to_devices(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Global arrays of a batch of `stream`."""
        main = {name: rows for name, rows in batch.items() if name not in self._beside}
        others = {name: to_devices(batch[name], self._sharding, part.rows) for name, part in self._beside.items()}
        return {**to_devices(main, self._sharding, self._main.rows), **others}


class _Part:
    """Rows of one length in each batch: `batch_size` rows of `length` tokens of a corpus."""

    def __init__(self, corpus: Corpus | Mixture | TaskData, length: int, batch_size: int, sharding: NamedSharding):
        self.corpus, self.length, self.batch_size = corpus, length, batch_size
        self.rows = local_rows(sharding, batch_size, length)

    def stream(self, seed: int, start: int) -> Iterator[dict[str, np.ndarray]]:
        return batches(
            self.corpus,
            "train",
            sequence_length=self.length,
            batch_size=self.batch_size,
            seed=seed,
            start_step=start,
            rows=None if self.rows is None else self.rows.numbers,
        )
