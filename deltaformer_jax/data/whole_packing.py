"""Packing of conversations: each row holds whole ones, so that no answer loses the question before it.

A conversation of n tokens takes n + 1 places of a row, as a document does in `Packing`. Best fit, longest first: each
goes into the fullest row that still has room for it. One that takes more places than a row has is cut into rows, and
what is in a later row does not see the earlier ones; its last part is placed as a short conversation is. The
assignment to rows is the same in every epoch: conversations in one row do not see each other, so only the order of the
rows matters, and that is new in each epoch.
"""

from __future__ import annotations

import bisect

import numpy as np

from deltaformer_jax.data.corpus import Split
from deltaformer_jax.data.packing import permuted


class WholePacking:
    """Rows of conversations, with the interface of `Packing`.

    `rows_per_epoch`: how many rows best fit needs, at least (tokens + documents) / sequence_length. Memory: 40 bytes
    per part of a conversation. Cost: about two microseconds per conversation, once. Thread-safe.
    """

    def __init__(self, split: Split, sequence_length: int, seed: int | str | None):
        self.split = split
        self.sequence_length = sequence_length
        self.seed = seed
        # Part i is pairs _begins[i] .. _begins[i] + _sizes[i] - 1 of document _documents[i].
        pairs = split.lengths + 1
        counts = -(-pairs // sequence_length)
        self._documents = np.repeat(np.arange(split.documents, dtype=np.int64), counts)
        first = np.cumsum(counts) - counts
        self._begins = (np.arange(len(self._documents)) - first[self._documents]) * sequence_length
        self._sizes = np.minimum(pairs[self._documents] - self._begins, sequence_length)
        row_of = _best_fit(self._sizes, sequence_length)
        self.rows_per_epoch = int(row_of.max(initial=-1)) + 1
        self._order = np.argsort(row_of, kind="stable")  # parts by row, and in a row as in the corpus
        self._starts = np.searchsorted(row_of[self._order], np.arange(self.rows_per_epoch + 1))

    def rows(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """As `Packing.rows`, and loss_mask: bool, True where the target is a token that bears loss.

        The end-of-text after a conversation bears none. The end of a row is padding.
        """
        shape = (len(indices), self.sequence_length)
        out = {name: np.zeros(shape, np.int32) for name in ("tokens", "targets", "segment_ids")}
        out["loss_mask"] = np.zeros(shape, bool)
        epochs, rows = np.divmod(np.asarray(indices, np.int64), self.rows_per_epoch)
        for place, (epoch, row) in enumerate(zip(epochs.tolist(), rows.tolist())):
            if self.seed is None:
                if epoch == 0:
                    self._fill(row, *(array[place] for array in out.values()))
                continue
            row = int(permuted(np.array([row]), self.rows_per_epoch, f"{self.seed} {epoch} rows")[0])
            self._fill(row, *(array[place] for array in out.values()))
        return out

    def _fill(
        self, row: int, tokens: np.ndarray, targets: np.ndarray, segment_ids: np.ndarray, loss_mask: np.ndarray
    ) -> None:
        filled = 0
        for segment, part in enumerate(self._order[self._starts[row] : self._starts[row + 1]], start=1):
            document, a, size = int(self._documents[part]), int(self._begins[part]), int(self._sizes[part])
            length = int(self.split.lengths[document])
            # Pair k has token k of the document as its target, and end-of-text for k = length.
            text, mask = self.split.read_with_mask(document, max(a - 1, 0), min(a + size, length))
            skip = 1 if a == 0 else 0
            sequence = np.full(size + 1, self.split.eot, np.int32)
            sequence[skip : skip + len(text)] = text
            counted = np.zeros(size + 1, bool)
            counted[skip : skip + len(text)] = mask
            here = slice(filled, filled + size)
            tokens[here], targets[here], segment_ids[here] = sequence[:-1], sequence[1:], segment
            loss_mask[here] = counted[1:]
            filled += size


def _best_fit(sizes: np.ndarray, capacity: int) -> np.ndarray:
    """The row of each part, int64: best fit decreasing, for sizes of 1 .. capacity. Equal sizes keep their order."""
    row_of = np.zeros(len(sizes), np.int64)
    with_room: dict[int, list[int]] = {}  # room -> the rows that have it
    rooms: list[int] = []  # its keys, sorted
    count = 0
    for part in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[part])
        at = bisect.bisect_left(rooms, size)
        if at < len(rooms):
            room = rooms[at]
            row = with_room[room].pop()
            if not with_room[room]:
                del with_room[room], rooms[at]
        else:
            room, row, count = capacity, count, count + 1
        row_of[part] = row
        if left := room - size:
            if left not in with_room:
                with_room[left] = []
                bisect.insort(rooms, left)
            with_room[left].append(row)
    return row_of
