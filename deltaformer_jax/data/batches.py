"""Batches for training and evaluation. Batch n is a function of n and the settings alone."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from deltaformer_jax.data.corpus import Corpus, Split
from deltaformer_jax.data.mixture import MixedPacking, Mixture, packing_of
from deltaformer_jax.data.packing import Packing
from deltaformer_jax.data.task_data import TaskData, TaskRows
from deltaformer_jax.data.whole_packing import WholePacking

THREADS, REMOTE_THREADS = 2, 16
_ENDLESS = 2**48  # batches: grain asks for a length, and no run is that long


def batches(
    corpus: Corpus | Mixture | TaskData,
    split: str,
    *,
    sequence_length: int,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    rows: np.ndarray | None = None,
    num_threads: int | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Batch n, for n = start_step, start_step + 1, ...: the packed rows n b .. (n + 1) b - 1, b = batch_size.

    A batch is a dict of int32 arrays [batch_size / process_count, sequence_length]: tokens, targets, segment_ids (0 is
    padding; every other position has a target). Of P processes, process p holds rows p b / P .. (p + 1) b / P - 1 of
    the global batch, or those with the numbers `rows`, an int array, where a mesh asks for others (`sharding.rows`).
    The global batch is a function of (corpus, sequence_length, batch_size, seed, n) alone, so n is the whole position
    of a run in its data.

    split "train"  endless; documents and rows are shuffled again in each epoch; a batch may span two epochs
    split "eval"   one pass in order, without the seed; the last batch is filled up with rows of padding
    a Mixture      "train": rows of its corpora by weight; "eval": one pass over all of them
    conversations  one more array, bool: loss_mask, True where the target is a token of an answer (`WholePacking`)
    a TaskData     the examples n b .. (n + 1) b - 1, and loss_mask, the positions with a target

    `num_threads` threads read ahead; None: THREADS, or REMOTE_THREADS of an object store, which takes its time for each
    range that is read. An argument out of range or an empty split raises ValueError at the call.
    """
    if num_threads is None:
        num_threads = REMOTE_THREADS if not isinstance(corpus, TaskData) and corpus.remote else THREADS
    _check(sequence_length, batch_size, seed, start_step, process_index, process_count, num_threads)
    if rows is not None and process_count > 1:
        raise ValueError(f"rows and process_count {process_count}: give one of them; both say which rows are held")
    if rows is None:
        part = batch_size // process_count
        rows = np.arange(process_index * part, (process_index + 1) * part)
    elif not (len(rows) and 0 <= min(rows) <= max(rows) < batch_size):
        raise ValueError(f"rows {rows}: must be numbers in [0, batch_size), batch_size {batch_size}, and at least one")
    packed = _packing(corpus, split, sequence_length, seed if split == "train" else None)
    count = _ENDLESS if split == "train" else -(-packed.rows_per_epoch // batch_size)
    # Imported here, since grain imports jax, which the rest of this package does not need.
    import grain

    source = _Batches(packed, batch_size, start_step, max(count - start_step, 0), np.asarray(rows, np.int64))
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=2 * num_threads)
    return iter(grain.MapDataset.source(source).to_iter_dataset(options))


def count_batches(corpus: Corpus | Mixture | TaskData, split: str, *, sequence_length: int, batch_size: int) -> int:
    """Batches in one pass over a split: ceil(rows / batch_size), rows = ceil((tokens + documents) / sequence_length).

    Conversations need more rows, since they are packed whole. For a TaskData the number of evaluation batches, whatever
    the split, since its training data are endless. Raises ValueError as `batches` does.
    """
    _check(sequence_length, batch_size)
    return -(-_packing(corpus, split, sequence_length, None).rows_per_epoch // batch_size)


class _Batches:
    """The data source for grain: element i is this process's part of batch start + i."""

    def __init__(
        self,
        packed: Packing | WholePacking | MixedPacking | TaskRows,
        batch_size: int,
        start: int,
        count: int,
        mine: np.ndarray,
    ):
        self._packed = packed
        self._batch_size = batch_size
        self._start = start
        self._count = count
        self._mine = mine

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        return self._packed.rows((self._start + i) * self._batch_size + self._mine)


def _packing(
    corpus: Corpus | Mixture | TaskData, split: str, sequence_length: int, seed: int | None
) -> Packing | WholePacking | MixedPacking | TaskRows:
    if isinstance(corpus, TaskData):
        return corpus.rows(sequence_length, seed)
    if isinstance(corpus, Corpus):
        return packing_of(check_split(corpus, split), sequence_length, seed)
    if split == "train":
        return MixedPacking([check_split(one, split) for one in corpus.corpora], corpus.weights, sequence_length, seed)
    # Evaluation uses the corpora that have evaluation documents, whichever these are.
    splits = [one.split(split) for one in corpus.corpora if one.split(split).documents]
    if not splits:
        check_split(corpus.corpora[0], split)
    return MixedPacking(splits, [1.0] * len(splits), sequence_length, seed)


def check_split(corpus: Corpus, split: str) -> Split:
    """The split. Raises ValueError if it has no documents."""
    chosen = corpus.split(split)
    if chosen.documents == 0:
        raise ValueError(
            f"the {split} split of {corpus.path} has no documents: prepare it from more documents, "
            "or with another --eval_fraction"
        )
    return chosen


def _check(
    sequence_length: int,
    batch_size: int,
    seed: int = 0,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int = 0,
) -> None:
    if sequence_length < 1:
        raise ValueError(f"sequence_length is {sequence_length}; it must be at least 1 token")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1 sequence")
    if seed < 0:
        raise ValueError(f"seed is {seed}; it must not be negative")
    if start_step < 0:
        raise ValueError(f"start_step is {start_step}; it must not be negative")
    if process_count < 1 or batch_size % process_count:
        raise ValueError(f"batch_size {batch_size} must be a multiple of process_count {process_count}")
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index {process_index} must be in [0, process_count), process_count {process_count}")
    if num_threads < 0:
        raise ValueError(f"num_threads is {num_threads}; it must not be negative (0: no reading ahead)")
