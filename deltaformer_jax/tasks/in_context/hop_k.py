"""Hops: the token after the last earlier occurrence of this one, asked for k times in a row.

Source: Xu et al., "KV Shifting Attention Enhances Language Modeling", arXiv 2411.19574, Figure 9 and appendix H, after
a task of Sanford et al. The rows and their first token are ours.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from deltaformer_jax.tasks.draws import Draws
from deltaformer_jax.tasks.examples import Examples, check_least


@dataclasses.dataclass(frozen=True)
class HopK:
    """f(i) = 1 + the last place before i that holds x_i, and the target at i is x at f(f(… f(i))), k times f.

    x is uniform over V symbols. A row begins with a token V + k − 1 that says k; no f reads it. k is uniform in
    [least, hops]. A place counts if all k hops exist. With k = 1 this is induction from the last occurrence.

    Args:
      length: tokens of a row, the first one included; so that a place counts, at least hops + 3.
      hops: the most k, at least 1.
      least: the least k, from 1 to hops; 0 takes hops, so that all rows have k = hops.
      symbols: V, at least 2.
    Raises ValueError for arguments that don't fit. A row without a place that counts is drawn again, so that with many
    symbols and hops in a short row generating takes long.
    `task(seed, indices)` -> Examples. Cost: O(T) steps and O(hops) over all rows at once.
    """

    length: int = 64
    hops: int = 4
    least: int = 0
    symbols: int = 4

    def __post_init__(self):
        check_least("hops", self.hops, 1)
        check_least("symbols", self.symbols, 2)
        check_least("least", self.least, 0)
        check_least("length", self.length, self.hops + 3)
        if self.least > self.hops:
            raise ValueError(f"least={self.least}: must be at most hops = {self.hops}, or 0 to take that")

    @property
    def input_vocabulary(self) -> int:
        return self.symbols + self.hops

    @property
    def target_vocabulary(self) -> int:
        return self.symbols

    def __call__(self, seed: int | str, indices: np.ndarray) -> Examples:
        draws = Draws(seed, "hop k", indices)
        least, length = self.least or self.hops, self.length
        hops = least + draws.integers(1, self.hops - least + 1)
        x = draws.integers(length - 1, self.symbols)
        places = _after(x, hops, self.hops)
        while len(empty := np.flatnonzero((places < 0).all(axis=1))):
            x[empty] = draws.integers(length - 1, self.symbols)[empty]
            places[empty] = _after(x[empty], hops[empty], self.hops)
        counted = np.concatenate([np.zeros((len(x), 1), bool), places >= 0], axis=1)
        reached = np.take_along_axis(x, np.maximum(places, 0), axis=1)
        targets = np.concatenate([np.zeros((len(x), 1), np.int64), np.where(places >= 0, reached, 0)], axis=1)
        tokens = np.concatenate([self.symbols + hops - 1, x], axis=1)
        return Examples(tokens.astype(np.int32), targets.astype(np.int32), counted, np.ones(tokens.shape, bool))


def _after(x: np.ndarray, hops: np.ndarray, most: int) -> np.ndarray:
    """int64 [N, T]: where the hops [N, 1] from each place of x [N, T] end, −1 if one of them does not exist."""
    rows, time = np.arange(len(x)), x.shape[1]
    last, hop = np.full((len(x), x.max() + 1), -2), np.empty_like(x)
    for i in range(time):
        hop[:, i] = last[rows, x[:, i]] + 1
        last[rows, x[:, i]] = i
    places = np.tile(np.arange(time), (len(x), 1))
    for number in range(most):
        next_ = np.where(places < 0, -1, np.take_along_axis(hop, np.maximum(places, 0), axis=1))
        places = np.where(number < hops, next_, places)
    return places
