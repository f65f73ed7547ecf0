"""A synthetic task in the place of a corpus: `data.path` "task:NAME,option=value", drawn as it is asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np

from deltaformer_jax.data.tokenizer import TaskVocabulary
from deltaformer_jax.tasks import Examples, make_task
from deltaformer_jax.tasks.spec import PREFIX

EVALUATION_EXAMPLES = 1024
EVALUATION_SEED = "evaluation"  # the seed of the evaluation split, which no run's training has
_LONG = 2**20  # tokens in a row: room for any task, to ask what does not depend on it


def is_task(spec: str) -> bool:
    return spec.startswith(PREFIX)


class TaskData:
    """What `batches` draws from: training is endless, evaluation is EVALUATION_EXAMPLES drawn apart from it.

    Rows are drawn with replacement: of a task with few examples of a length (parity of 5 bits: 32) both see the same.

    Attributes: path (the spec); tokenizer (a TaskVocabulary: ids are numbers, the larger of the task's two vocabularies
    many); hash (of the task and its options). ValueError, for one line, as for `tasks.make_task`.
    """

    def __init__(self, spec: str):
        self.path = spec
        task = make_task(spec, _LONG)
        self.tokenizer = TaskVocabulary(max(task.input_vocabulary, task.target_vocabulary))
        self.hash = hashlib.sha256(repr(task).encode()).hexdigest()

    def check_length(self, sequence_length: int) -> None:
        """Raise ValueError unless the task fits rows of that many tokens."""
        make_task(self.path, sequence_length)

    def rows(self, sequence_length: int, seed: int | None) -> TaskRows:
        """The rows of training under `seed`, or, None, of the evaluation split."""
        return TaskRows(make_task(self.path, sequence_length), seed)


class TaskRows:
    """Rows of a task, as `Packing`'s of a split: seed None is the evaluation split, which has `examples` rows.

    `first`: the example that is row 0.
    """

    def __init__(
        self,
        task: Callable[[int | str, np.ndarray], Examples],
        seed: int | None,
        *,
        first: int = 0,
        examples: int = EVALUATION_EXAMPLES,
    ):
        self._task, self._first = task, first
        self._seed = EVALUATION_SEED if seed is None else seed
        self._ends = seed is None
        self.rows_per_epoch = examples

    def rows(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """tokens, targets, segment_ids (1, 0 at padding): int32 [N, T]; loss_mask: bool [N, T], what is asked for.

        Of the evaluation split rows past the end are all padding.
        """
        indices = np.asarray(indices, np.int64)
        examples = self._task(self._seed, self._first + indices)
        here = (indices < self.rows_per_epoch)[:, None] if self._ends else np.ones((len(indices), 1), bool)
        return {
            "tokens": np.where(here, examples.tokens, 0),
            "targets": np.where(here, examples.targets, 0),
            "segment_ids": (here & examples.real).astype(np.int32),
            "loss_mask": here & examples.counted,
        }
