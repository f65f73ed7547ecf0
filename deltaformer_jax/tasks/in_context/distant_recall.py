"""Recall at a distance: pairs of a key and its value among filler words; at the end some keys ask for their values.

After the retrieval tests of Men et al., "Base of RoPE bounds context length", NeurIPS 2024, arXiv 2405.14591, which ask
large language models; the rows are ours.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from deltaformer_jax.tasks.draws import Draws
from deltaformer_jax.tasks.examples import Examples, check_least


@dataclasses.dataclass(frozen=True)
class DistantRecall:
    """A row is T − 2Q tokens of filler words, in which P pairs k_i v_i stand, and then Q of the pairs once more.

    Each pair stands at an even place, all places equally likely. Keys and values are drawn without repeats within a
    row. The pairs at the end are distinct, and there each key is asked for its value; the value follows. The distance m
    of a question is the place of the key at the end minus its place in the pair, an even number. A question counts if
    nearest ≤ m ≤ farthest. A row without one is drawn again.

    Args:
      length: T, even.
      pairs: P, at most (T − 2Q)/2.
      queries: Q, at most P.
      keys, values, fillers: the number of words of each kind, of keys and values at least P. The ids begin with the
        keys; the values follow, and then the fillers.
      nearest, farthest: of the distances that count; farthest 0: T. Where few do, generating takes long.
    Raises ValueError for arguments that don't fit.
    `task(seed, indices)` -> Examples; both vocabularies have all words. Cost: O(N (T + keys + values)).
    """

    length: int = 512
    pairs: int = 16
    queries: int = 8
    keys: int = 32
    values: int = 32
    fillers: int = 32
    nearest: int = 1
    farthest: int = 0

    def __post_init__(self):
        for name in ("pairs", "queries", "fillers", "nearest"):
            check_least(name, getattr(self, name), 1)
        for name in ("keys", "values"):
            check_least(name, getattr(self, name), self.pairs)
        check_least("farthest", self.farthest, 0)
        if self.queries > self.pairs:
            raise ValueError(f"queries={self.queries}: must be at most pairs = {self.pairs}")
        least = 2 * (self.pairs + self.queries)
        if self.length % 2 or self.length < least:
            raise ValueError(f"length={self.length}: must be even and at least 2 (pairs + queries) = {least}")
        most = self.farthest or self.length
        # The even numbers from 2 to T − 2 are the distances that occur.
        if not any(self.nearest <= m <= most for m in range(2, self.length, 2)):
            raise ValueError(
                f"farthest={self.farthest}: no distance from nearest = {self.nearest} to it occurs; the even numbers "
                f"from 2 to {self.length - 2} do"
            )

    @property
    def input_vocabulary(self) -> int:
        return self.keys + self.values + self.fillers

    @property
    def target_vocabulary(self) -> int:
        return self.input_vocabulary

    def __call__(self, seed: int | str, indices: np.ndarray) -> Examples:
        draws = Draws(seed, "distant recall", indices)
        words = self.keys + self.values
        tokens = words + draws.integers(self.length, self.fillers)
        keys = draws.choices(self.pairs, self.keys)
        values = self.keys + draws.choices(self.pairs, self.values)
        begin = self.length - 2 * self.queries
        asked = np.arange(begin, self.length, 2)
        places, distances = np.zeros_like(keys), np.zeros((len(keys), self.queries), np.int64)
        counts = lambda m: (m >= self.nearest) & (m <= (self.farthest or self.length))
        again = np.arange(len(keys))
        while len(again):
            places[again] = 2 * draws.choices(self.pairs, begin // 2)[again]
            distances[again] = asked - places[again, : self.queries]
            again = again[~counts(distances[again]).any(axis=1)]
        for at, content in ((places, keys), (places + 1, values)):
            np.put_along_axis(tokens, at, content, axis=1)
        # The places are in random order, so that the first Q pairs are any Q of them.
        tokens[:, begin::2], tokens[:, begin + 1 :: 2] = keys[:, : self.queries], values[:, : self.queries]
        counted, targets = np.zeros(tokens.shape, bool), np.zeros_like(tokens)
        counted[:, begin::2] = counts(distances)
        targets[:, begin::2] = np.where(counted[:, begin::2], values[:, : self.queries], 0)
        return Examples(tokens.astype(np.int32), targets.astype(np.int32), counted, np.ones(tokens.shape, bool))
