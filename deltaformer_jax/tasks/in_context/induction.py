"""Induction: a word that has been seen before asks for the word that followed it.

Source: Xu et al., "KV Shifting Attention Enhances Language Modeling", arXiv 2411.19574, appendix D.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from deltaformer_jax.tasks.draws import Draws
from deltaformer_jax.tasks.examples import Examples, check_least

GENERATORS = ("paper", "strict")
SCORES = ("first", "all")


@dataclasses.dataclass(frozen=True)
class Induction:
    """A row of T tokens over n words of its own. The word w asks for s(w), the successor that was recorded for it.

    A word is drawn uniformly from the row's n words, and again if it equals the token before it. If s(w) is not
    recorded, w is appended. If it is, this place is noted, and w and s(w) are appended; s(w) is the target. A row
    without a noted place is begun again. What follows T tokens is cut.

    * generator="paper": a word that has no successor becomes the successor of the token before it, if that has none. So
      s(w) is the first word after w that had no successor then. Where w has first been followed by another word, the
      rule "copy what followed w" is wrong: with n = T = 32 at 5 % of the noted places for the first occurrence, at 13 %
      for the last.
    * generator="strict": the first token after w is its successor, whatever it is. A place is noted only if every
      earlier w has been followed by s(w); otherwise w is appended alone. Copying from any occurrence is right
      everywhere. This generator is not the paper's.

    With either generator the first noted place is the first repetition in the row, and there copying is always right.

    Args:
      length: T, at least 3.
      vocabulary: V. The paper draws from the ids 11 to 7999; as it uses the others for nothing, V = 7989 is its size.
      words: n, from 2 to the smaller of T and V; 0 takes that.
      generator: "paper" or "strict".
      score: "first" counts the first noted place of a row, as in the paper; "all" counts every noted place.
    Raises ValueError for arguments that don't fit. The paper's rows have T = 512.
    `task(seed, indices)` -> Examples; both vocabularies have size V. Cost: O(T) steps over all rows at once.
    """

    length: int = 64
    vocabulary: int = 512
    words: int = 0
    generator: str = "paper"
    score: str = "first"

    def __post_init__(self):
        check_least("length", self.length, 3)
        check_least("vocabulary", self.vocabulary, 2)
        check_least("words", self.words, 0)
        most = min(self.length, self.vocabulary)
        if self.words == 1 or self.words > most:
            raise ValueError(
                f"words={self.words}: must be from 2 to {most}, the smaller of the length and the vocabulary, or 0 to "
                "take that"
            )
        for name, allowed in (("generator", GENERATORS), ("score", SCORES)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}: must be {' or '.join(map(repr, allowed))}")

    @property
    def input_vocabulary(self) -> int:
        return self.vocabulary

    @property
    def target_vocabulary(self) -> int:
        return self.vocabulary

    def __call__(self, seed: int | str, indices: np.ndarray) -> Examples:
        draws = Draws(seed, "induction", indices)
        n, length = self.words or min(self.length, self.vocabulary), self.length
        words = draws.choices(n, self.vocabulary)
        count = len(words)
        # Two more columns: the second token of a cut pair, and what finished rows write.
        tokens, targets = np.zeros((count, length + 2), np.int64), np.zeros((count, length + 2), np.int64)
        noted = np.zeros((count, length + 2), bool)
        successor, differs = np.full((count, n), -1), np.zeros((count, n), bool)
        place, last = np.zeros(count, np.int64), np.full(count, -1)
        while len(rows := np.flatnonzero(place < length)):
            drawn = draws.integers(1, n)[rows, 0]  # a row's draws don't depend on which other rows are unfinished
            fits = drawn != last[rows]
            rows, drawn = rows[fits], drawn[fits]
            before, known = last[rows], successor[rows, drawn] >= 0
            after = before >= 0
            open_ = after & (successor[rows, before] < 0)
            if self.generator == "paper":
                open_ &= ~known
            else:
                differs[rows, before] |= after & ~open_ & (successor[rows, before] != drawn)
                known &= ~differs[rows, drawn]
            successor[rows[open_], before[open_]] = drawn[open_]
            tokens[rows, place[rows]] = drawn
            last[rows] = drawn
            place[rows] += 1
            pairs, answer = rows[known], successor[rows[known], drawn[known]]
            noted[pairs, place[pairs] - 1] = True
            targets[pairs, place[pairs] - 1] = answer
            tokens[pairs, place[pairs]] = answer
            last[pairs] = answer
            place[pairs] += 1
            again = rows[(place[rows] >= length) & ~noted[rows, :length].any(axis=1)]
            place[again], last[again], successor[again], differs[again] = 0, -1, -1, False
        counted = noted[:, :length]
        if self.score == "first":
            counted = counted & (np.cumsum(counted, axis=1) == 1)
        named = lambda places: np.take_along_axis(words, places[:, :length], axis=1).astype(np.int32)
        return Examples(named(tokens), np.where(counted, named(targets), 0), counted, np.ones(counted.shape, bool))
