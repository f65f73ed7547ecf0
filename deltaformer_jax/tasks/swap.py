"""Tracking swaps: each token swaps the elements at two positions; the target is the element at the first position.

Source: Xu et al., DeltaFormer (NeurIPS 2025), section 4.1, Figures 2 to 4.
"""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np

from deltaformer_jax.tasks.draws import Draws
from deltaformer_jax.tasks.examples import Examples, check_least


@dataclasses.dataclass(frozen=True)
class SwapTracking:
    """σ_0 = identity, σ_t = σ_{t−1} ∘ (a_t b_t), target_t = σ_t(1): the element at the first of n positions.

    The token of the swap (a, b), a < b, is the index of the pair in the order (0, 1), (0, 2), …, (n−2, n−1). Tokens are
    uniform, and every position is counted.

    Args: length: swaps per row, at least 1. elements: n, at least 2. Raises ValueError for less.
    `task(seed, indices)` -> Examples. Cost: O(length) steps over all rows at once.
    """

    length: int = 16
    elements: int = 5

    def __post_init__(self):
        check_least("length", self.length, 1)
        check_least("elements", self.elements, 2)

    @property
    def input_vocabulary(self) -> int:
        return self.elements * (self.elements - 1) // 2

    @property
    def target_vocabulary(self) -> int:
        return self.elements

    def __call__(self, seed: int | str, indices: np.ndarray) -> Examples:
        tokens = Draws(seed, "swap tracking", indices).integers(self.length, self.input_vocabulary)
        pairs = np.array(list(itertools.combinations(range(self.elements), 2)))
        rows = np.arange(len(tokens))
        at = np.tile(np.arange(self.elements), (len(tokens), 1))
        targets = np.empty_like(tokens)
        for t in range(self.length):
            a, b = pairs[tokens[:, t]].T
            at[rows, a], at[rows, b] = at[rows, b], at[rows, a]
            targets[:, t] = at[:, 0]
        every = np.ones(tokens.shape, bool)
        return Examples(tokens.astype(np.int32), targets.astype(np.int32), every, every.copy())
