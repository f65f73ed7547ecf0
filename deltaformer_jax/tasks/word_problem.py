"""The word problem of a permutation group: tokens are group elements; the target is their product so far.

For S5 and A5, which are not solvable, the problem is complete for NC¹ (Barrington, 1989). If TC⁰ ≠ NC¹, neither a
Transformer of fixed depth nor a linear recurrence with diagonal transitions can then solve it at every length (Merrill
et al., "The illusion of state in state-space models", 2024).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools

import numpy as np

from deltaformer_jax.tasks.draws import Draws
from deltaformer_jax.tasks.examples import Examples, check_least

GROUPS = ("S3", "S4", "S5", "A3", "A4", "A5")


@dataclasses.dataclass(frozen=True)
class WordProblem:
    """target_t = x_1 x_2 ⋯ x_t, where (x y)(i) = x(y(i)).

    Token or target id i means the i-th permutation in the lexicographic order of (x(0), x(1), …), in A_n among the even
    permutations. Id 0 is the identity. Tokens are drawn uniformly from the elements that move at most `moves` points.
    Every position is counted, except as said under `pauses` and `start`.

    Args:
      length: tokens per row. Without the start token it must be a multiple of 1 + pauses.
      group: "S3", "S4", "S5", "A3", "A4" or "A5".
      moves: 0 for all elements, or from 2 to n (in A_n from 3, since it has no swaps). With 2 the tokens are the
        identity and the swaps; with 3 also the 3-cycles. In A_n, 3 means the identity and the 3-cycles.
      pauses: the number of empty tokens after each element. The target is then asked at the last of them, not at the
        element. A layer that writes once per token can thus write 1 + pauses times per element.
      start: whether a row begins with a start token, at which nothing is asked. Attention whose weights add up to 1
        cannot tell x from x x without it.
    The ids after the group's are the empty token's, if there are pauses, then the start token's. Raises ValueError for
    arguments that don't fit.
    `task(seed, indices)` -> Examples. Cost: O(length) steps over all rows at once.
    """

    length: int = 32
    group: str = "S5"
    moves: int = 0
    pauses: int = 0
    start: bool = False

    def __post_init__(self):
        check_least("length", self.length, 1)
        if self.group not in GROUPS:
            raise ValueError(f"group={self.group!r}: must be one of {', '.join(GROUPS)}")
        least, most = 2 if self.group[0] == "S" else 3, int(self.group[1])
        if self.moves and not least <= self.moves <= most:
            raise ValueError(
                f"moves={self.moves}: must be from {least} to {most} in {self.group}, or 0 for all elements"
            )
        check_least("pauses", self.pauses, 0)
        if self.length == self.start or (self.length - self.start) % (1 + self.pauses):
            raise ValueError(
                f"length={self.length}: must be a multiple of {1 + self.pauses}, an element and its pauses"
                + ", and one more for the start token" * self.start
            )

    @property
    def input_vocabulary(self) -> int:
        return len(elements(self.group)) + (self.pauses > 0) + self.start

    @property
    def target_vocabulary(self) -> int:
        return len(elements(self.group))

    def __call__(self, seed: int | str, indices: np.ndarray) -> Examples:
        drawn, each = allowed(self.group, self.moves), 1 + self.pauses
        draws = Draws(seed, f"word problem {self.group}", indices)
        factors = drawn[draws.integers((self.length - self.start) // each, len(drawn))]
        table = products(self.group)
        tokens = np.full((len(factors), self.length), len(table))
        tokens[:, : self.start] = self.input_vocabulary - 1
        tokens[:, self.start :: each] = factors
        targets, counted = np.zeros_like(tokens), np.zeros(tokens.shape, bool)
        product = np.zeros(len(tokens), np.int64)
        for place in range(factors.shape[1]):
            product = table[product, factors[:, place]]
            targets[:, self.start + place * each + self.pauses] = product
        counted[:, self.start + self.pauses :: each] = True
        return Examples(tokens.astype(np.int32), targets.astype(np.int32), counted, np.ones(tokens.shape, bool))


@functools.cache
def elements(group: str) -> np.ndarray:
    """int64 [order, n]: the group's permutations in lexicographic order; row x holds x(0), …, x(n − 1)."""
    n = int(group[1])
    every = np.array(list(itertools.permutations(range(n))))
    inversions = sum(every[:, i] > every[:, j] for i in range(n) for j in range(i + 1, n))
    return every if group[0] == "S" else every[inversions % 2 == 0]


@functools.cache
def allowed(group: str, moves: int) -> np.ndarray:
    """int64: the ids of the elements that move at most `moves` points; moves = 0: of all elements."""
    every = elements(group)
    moved = np.sum(every != np.arange(every.shape[1]), axis=1)
    return np.flatnonzero(moved <= (moves or every.shape[1]))


@functools.cache
def products(group: str) -> np.ndarray:
    """int64 [order, order]: the multiplication table; row x, column y holds the id of x y."""
    permutations = elements(group)
    digits = permutations.shape[1] ** np.arange(permutations.shape[1])[::-1]
    composed = permutations[:, permutations]  # [x, y, i] = x(y(i))
    return np.searchsorted(permutations @ digits, composed @ digits)
