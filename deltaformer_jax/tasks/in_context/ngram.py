"""N-grams: words that decide the next one, the same in all rows, so that they are learnt by heart.

Source: Xu et al., "KV Shifting Attention Enhances Language Modeling", arXiv 2411.19574, Figure 3: 3-grams over 200
pairs. The paper does not give its generator; this one is ours.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from deltaformer_jax.tasks.draws import Draws
from deltaformer_jax.tasks.examples import Examples, check_least


@dataclasses.dataclass(frozen=True)
class NGram:
    """A row is one n-gram after another, each n − 1 words and the word that they decide.

    A table of C contexts, which are distinct tuples of n − 1 words, gives each context a word, uniformly. The table
    depends on `table` alone: it is the same for every seed, in training and evaluation. Contexts are drawn uniformly.
    The last word of a context counts, and its target is the context's word. A word alone does not decide it, since
    C contexts share V words.

    Args:
      length: T, at least n − 1.
      order: n, at least 2.
      contexts: C, at most V^(n−1).
      vocabulary: V, at least 2; V^(n−1) at most 2^20.
      table: which table.
    Raises ValueError for arguments that don't fit.
    `task(seed, indices)` -> Examples; both vocabularies have size V. Cost: O(N T + V^(n−1)).
    """

    length: int = 64
    order: int = 3
    contexts: int = 200
    vocabulary: int = 32
    table: int = 0

    def __post_init__(self):
        check_least("order", self.order, 2)
        check_least("length", self.length, self.order - 1)
        check_least("vocabulary", self.vocabulary, 2)
        check_least("contexts", self.contexts, 1)
        most = self.vocabulary ** (self.order - 1)
        if most > 2**20:
            raise ValueError(f"vocabulary={self.vocabulary}: must be at most 2^20 to the power 1/(order − 1)")
        if self.contexts > most:
            raise ValueError(f"contexts={self.contexts}: must be at most vocabulary^(order − 1) = {most}")

    @property
    def input_vocabulary(self) -> int:
        return self.vocabulary

    @property
    def target_vocabulary(self) -> int:
        return self.vocabulary

    def grams(self) -> np.ndarray:
        """int64 [C, n]: the contexts and, last, the word that each decides."""
        draws = Draws(self.table, f"n-grams {self.order} {self.vocabulary}", np.zeros(1, np.int64))
        chosen = draws.choices(self.contexts, self.vocabulary ** (self.order - 1))[0]
        powers = self.vocabulary ** np.arange(self.order - 2, -1, -1)
        words = chosen[:, None] // powers % self.vocabulary
        return np.concatenate([words, draws.integers(self.contexts, self.vocabulary)[0][:, None]], axis=1)

    def __call__(self, seed: int | str, indices: np.ndarray) -> Examples:
        number = -(-self.length // self.order)
        drawn = Draws(seed, "n-gram", indices).integers(number, self.contexts)
        grams = self.grams()
        tokens = grams[drawn].reshape(len(drawn), -1)[:, : self.length]
        counted = np.zeros(tokens.shape, bool)
        counted[:, self.order - 2 :: self.order] = True
        answers = np.repeat(grams[drawn, -1], self.order, axis=1)[:, : self.length]
        targets = np.where(counted, answers, 0)
        return Examples(tokens.astype(np.int32), targets.astype(np.int32), counted, np.ones(tokens.shape, bool))
