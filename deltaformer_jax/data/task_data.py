"""A synthetic task instead of a corpus: `data.path` = "task:NAME,option=value". Examples are drawn when needed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np

from deltaformer_jax.data.tokenizer import TaskVocabulary
from deltaformer_jax.tasks import Examples, make_task
from deltaformer_jax.tasks.spec import PREFIX

EVALUATION_EXAMPLES = 1024
EVALUATION_SEED = "evaluation"  # the seed of the evaluation split, which differs from every seed of training
_LONG = 2**20  # tokens in a row: long enough for any task, to find properties that do not depend on it


def is_task(spec: str) -> bool:
    return spec.startswith(PREFIX)


class TaskData:
    """The data of a task for `batches`: endless for training, EVALUATION_EXAMPLES examples for evaluation.

    Evaluation examples come from another seed, and examples are drawn with replacement. So if a task has few different
    examples (parity of 5 bits has 32), training and evaluation share them.

    Attributes: path (the spec); tokenizer (a TaskVocabulary whose size is the larger of the task's input and target
    vocabularies); hash (of the task and its options). Raises ValueError with a message of one line, as
    `tasks.make_task` does.
    """

    def __init__(self, spec: str):
        self.path = spec
        task = make_task(spec, _LONG)
        self.tokenizer = TaskVocabulary(max(task.input_vocabulary, task.target_vocabulary))
        self.hash = hashlib.sha256(repr(task).encode()).hexdigest()

    def check_length(self, sequence_length: int) -> None:
        """Raise ValueError unless the examples of the task fit into rows of `sequence_length` tokens."""
        make_task(self.path, sequence_length)

    def rows(self, sequence_length: int, seed: int | None) -> TaskRows:
        """The rows of training with `seed`, or of the evaluation split if `seed` is None."""
        return TaskRows(make_task(self.path, sequence_length), seed)


class TaskRows:
    """Rows of a task, with the interface of `Packing`. With seed None the evaluation split, which has `examples` rows.

    `first`: the number of the example in row 0.
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
        """tokens, targets, segment_ids (1, or 0 at padding): int32 [N, T]; loss_mask: bool [N, T], True at targets.

        In the evaluation split, rows past the end are all padding.
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
