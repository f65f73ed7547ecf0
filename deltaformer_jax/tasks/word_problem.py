"""The word problem of a group: tokens are elements; what is their product so far?

Over S5 and A5, which are not solvable, it is complete for NC¹ (Barrington, 1989): beyond what a Transformer of fixed
depth or a linear recurrence with diagonal transitions computes at every length, if TC⁰ ≠ NC¹ (Merrill et al., "The
illusion of state in state-space models", 2024).
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

    Token and target i are the i-th permutation, in lexicographic order of (x(0), x(1), …); in A_n of the even ones.
    Token 0 is the identity. Tokens are uniform among the elements that move at most `moves` things, every position is
    counted. With moves = 2 they are the identity and the swaps, with 3 these and the 3-cycles; in A_n, the 3-cycles.

    Args: length: tokens in a row. group: "S3", "S4", "S5", "A3", "A4" or "A5". moves: 0, for every element, or from 2
      to n (from 3 in A_n, which has no swaps). pauses: empty tokens after each element, the last of which is asked in
      its place: a layer that writes once a token has so many writes more for it. start: the row's first token is no
      element, and nothing is asked there: attention whose weights add up to 1 reads the same from x x as from x
      without it. The words beyond the group's are the empty token's, if there are pauses, then the start's. length,
      less the start, must be a multiple of 1 + pauses. Raises ValueError for what does not fit.
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
            raise ValueError(f"moves={self.moves}: must be from {least} to {most} in {self.group}, or 0 for all of it")
        check_least("pauses", self.pauses, 0)
        if self.length == self.start or (self.length - self.start) % (1 + self.pauses):
            raise ValueError(
                f"length={self.length}: must be a multiple of {1 + self.pauses}, an element and its pauses"
                + ", and one more for the start" * self.start
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
    """int64 [order, n]: the group's permutations in lexicographic order, row x holding x(0), …, x(n − 1)."""
    n = int(group[1])
    every = np.array(list(itertools.permutations(range(n))))
    inversions = sum(every[:, i] > every[:, j] for i in range(n) for j in range(i + 1, n))
    return every if group[0] == "S" else every[inversions % 2 == 0]


@functools.cache
def allowed(group: str, moves: int) -> np.ndarray:
    """int64: the numbers of the elements that move at most `moves` things, 0: of all."""
    every = elements(group)
    moved = np.sum(every != np.arange(every.shape[1]), axis=1)
    return np.flatnonzero(moved <= (moves or every.shape[1]))


@functools.cache
def products(group: str) -> np.ndarray:
    """int64 [order, order]: the element x y in row x, column y."""
    permutations = elements(group)
    digits = permutations.shape[1] ** np.arange(permutations.shape[1])[::-1]
    composed = permutations[:, permutations]  # [x, y, i] = x(y(i))
    return np.searchsorted(permutations @ digits, composed @ digits)
