"""Packing: documents are laid end to end and cut into rows of `sequence_length`.

A document of n tokens t gives n + 1 pairs of input and target: inputs [eot, t1 .. tn], targets [t1 .. tn, eot]. So each
token is predicted exactly once, and nothing crosses from one document into another. An epoch lays the pairs of all
documents end to end, in an order given by (seed, epoch). Only the last row of an epoch has padding. Making row r needs
only the cumulative lengths and the text of that row.
"""

from __future__ import annotations

import functools
import hashlib
import threading

import numpy as np

from deltaformer_jax.data.corpus import Split

_ROUNDS = 6


class Packing:
    """Rows of an endless sequence of epochs (with a seed), or of one pass in the order of the corpus (seed None).

    `rows_per_epoch` = ceil((tokens + documents) / sequence_length), the same for every epoch. With a seed, row r is in
    epoch r // rows_per_epoch, in which both the documents and the rows are permuted. Memory: 16 bytes per document for
    each of the two newest epochs. Thread-safe.
    """

    def __init__(self, split: Split, sequence_length: int, seed: int | str | None):
        self.split = split
        self.sequence_length = sequence_length
        self.seed = seed
        self.pairs = split.tokens + split.documents
        self.rows_per_epoch = -(-self.pairs // sequence_length)
        self._lock = threading.Lock()
        self._kept = functools.lru_cache(maxsize=2)(self._lay_out)

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        with self._lock:  # else several threads would lay out a new epoch at once, each with its own memory
            return self._kept(epoch)

    def _lay_out(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(documents in the order of the epoch, cumulative number of pairs up to each), each int64 [documents]."""
        order = np.arange(self.split.documents, dtype=np.int64)
        if self.seed is not None:
            order = permuted(order, self.split.documents, f"{self.seed} {epoch} documents")
        return order, np.cumsum(self.split.lengths[order] + 1, dtype=np.int64)

    def rows(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """tokens, targets, segment_ids: int32 [len(indices), sequence_length] of the rows `indices` (int64).

        Segment ids number the documents of a row from 1. 0 is padding, whose tokens and targets are 0. Without a seed,
        rows past the end are all padding.
        """
        shape = (len(indices), self.sequence_length)
        out = {name: np.zeros(shape, np.int32) for name in ("tokens", "targets", "segment_ids")}
        epochs, rows = np.divmod(np.asarray(indices, np.int64), self.rows_per_epoch)
        for epoch in np.unique(epochs):
            if self.seed is None and epoch > 0:
                continue
            (places,) = np.nonzero(epochs == epoch)
            chosen = rows[places]
            if self.seed is not None:
                chosen = permuted(chosen, self.rows_per_epoch, f"{self.seed} {epoch} rows")
            for place, row in zip(places, chosen):
                self._fill(int(epoch), int(row), *(array[place] for array in out.values()))
        return out

    def _fill(self, epoch: int, row: int, tokens: np.ndarray, targets: np.ndarray, segment_ids: np.ndarray) -> None:
        order, ends = self._epoch(epoch)
        start = row * self.sequence_length
        stop = min(start + self.sequence_length, self.pairs)
        first = int(np.searchsorted(ends, start, side="right"))
        last = int(np.searchsorted(ends, stop, side="left"))
        filled = 0
        for segment, place in enumerate(range(first, last + 1), start=1):
            document = int(order[place])
            length = int(self.split.lengths[document])
            begin = int(ends[place]) - length - 1
            a, b = max(start - begin, 0), min(stop - begin, length + 1)  # this row's pairs of the document: a .. b - 1
            text = self.split.read(document, max(a - 1, 0), min(b, length))
            # In the document's sequence [eot, t1 .. tn, eot] inputs are elements a .. b - 1 and targets a + 1 .. b.
            sequence = np.full(b - a + 1, self.split.eot, np.int32)
            skip = 1 if a == 0 else 0
            sequence[skip : skip + len(text)] = text
            here = slice(filled, filled + b - a)
            tokens[here], targets[here], segment_ids[here] = sequence[:-1], sequence[1:], segment
            filled += b - a


def permuted(indices: np.ndarray, size: int, key: str) -> np.ndarray:
    """P(indices), P a permutation of [0, size) chosen by `key`: int64 [N] -> int64 [N]. Cost: O(N) for any size.

    A Feistel network on the smallest sufficient number of bits, applied again to values outside [0, size). It is
    implemented here in 64-bit integers, so that no new release of a library can change the order of data in a run.
    """
    half = max((size - 1).bit_length(), 2) // 2
    other = max((size - 1).bit_length(), 2) - half
    widths = (np.uint64(half), np.uint64(other))
    masks = tuple((np.uint64(1) << width) - np.uint64(1) for width in widths)
    keys = np.frombuffer(hashlib.blake2b(key.encode(), digest_size=8 * _ROUNDS).digest(), "<u8").astype(np.uint64)

    def network(x: np.ndarray) -> np.ndarray:
        parts = [x >> widths[1], x & masks[1]]
        for i, round_key in enumerate(keys):
            parts[i % 2] = parts[i % 2] ^ (_mix(parts[1 - i % 2] + round_key) & masks[i % 2])
        return (parts[0] << widths[1]) | parts[1]

    x = np.asarray(indices).astype(np.uint64)
    outside = np.arange(len(x))
    while len(outside):
        x[outside] = network(x[outside])
        outside = outside[x[outside] >= np.uint64(size)]
    return x.astype(np.int64)


def _mix(z: np.ndarray) -> np.ndarray:
    """The finalising steps of splitmix64 (Steele, Lea, Flood 2014): each output bit depends on every input bit."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
