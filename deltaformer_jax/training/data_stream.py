"""The batches a run takes, each with its number: in order, but never those that it passes over."""

from collections.abc import Collection, Iterator

import jax
import numpy as np

from deltaformer_jax.config import Config
from deltaformer_jax.data import Corpus, Mixture, TaskData, batches


def number_batches(
    corpus: Corpus | Mixture | TaskData, config: Config, start: int, passed: Collection[int]
) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """(number, this process's rows of the batch) from batch `start` on, without those in `passed`."""
    stream = batches(
        corpus,
        "train",
        sequence_length=config.data.sequence_length,
        batch_size=config.data.batch_size,
        seed=config.run.seed,
        start_step=start,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    passed = set(passed)
    for number, batch in enumerate(stream, start):
        if number not in passed:
            yield number, batch
