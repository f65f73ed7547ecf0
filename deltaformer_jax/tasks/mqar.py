"""Multi-query associative recall (MQAR): pairs of keys and values, then each key again, which asks for its value.

Source: Arora et al., "Zoology: measuring and improving recall in efficient language models", 2023, and its public code.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from deltaformer_jax.tasks.draws import Draws
from deltaformer_jax.tasks.examples import Examples, check_least


@dataclasses.dataclass(frozen=True)
class MQAR:
    """A row is k_1 v_1 k_2 v_2 … k_D v_D, followed by each key k_i once more, at place 2D + 2 g_i, with target v_i.

    Keys are drawn from [1, V/2) and values from [V/2, V), without repeats within a row. The gaps g_i are drawn without
    replacement from [0, (T − 2D)/2) with probabilities ∝ (g + 1)^(a−1). The other places after the pairs hold uniform
    tokens of [0, V), or 0. Only the repeated keys are counted.

    Args:
      length: T, even and at least 4 D.
      pairs: D.
      vocabulary: V, both of whose halves are larger than D.
      power: a, above 0. Small values make most gaps short and a few very long.
      random_filler: whether the other places hold random tokens; False: 0.
    Raises ValueError for arguments that don't fit.
    The usual sizes (T, D) are (64, 4), (128, 8), (256, 16) and (512, 64), with V = 8192.
    `task(seed, indices)` -> Examples; both vocabularies have size V. Cost: O(N (V + T)).
    """

    length: int = 64
    pairs: int = 4
    vocabulary: int = 8192
    power: float = 0.01
    random_filler: bool = True

    def __post_init__(self):
        check_least("pairs", self.pairs, 1)
        if self.length % 2 or self.length < 4 * self.pairs:
            raise ValueError(
                f"length={self.length}: must be even and at least 4 pairs = {4 * self.pairs}, the pairs and "
                "room to ask for each"
            )
        if self.vocabulary // 2 - 1 < self.pairs:
            raise ValueError(
                f"vocabulary={self.vocabulary}: must be at least 2 pairs + 2 = {2 * self.pairs + 2}, half of it keys"
            )
        if not 0 < self.power < float("inf"):
            raise ValueError(f"power={self.power}: must be above 0")

    @property
    def input_vocabulary(self) -> int:
        return self.vocabulary

    @property
    def target_vocabulary(self) -> int:
        return self.vocabulary

    def __call__(self, seed: int | str, indices: np.ndarray) -> Examples:
        draws = Draws(seed, "mqar", indices)
        half, context = self.vocabulary // 2, 2 * self.pairs
        room = (self.length - context) // 2
        keys = 1 + draws.choices(self.pairs, half - 1)
        values = half + draws.choices(self.pairs, self.vocabulary - half)
        gaps = draws.weighted_choices(self.pairs, np.arange(1.0, room + 1) ** (self.power - 1))
        filler = draws.integers(self.length, self.vocabulary)
        tokens = filler if self.random_filler else np.zeros_like(filler)
        tokens[:, 0:context:2], tokens[:, 1:context:2] = keys, values
        targets, counted = np.zeros_like(tokens), np.zeros(tokens.shape, bool)
        places = context + 2 * gaps
        for array, content in ((tokens, keys), (targets, values), (counted, True)):
            np.put_along_axis(array, places, content, axis=1)
        return Examples(tokens.astype(np.int32), targets.astype(np.int32), counted, np.ones(tokens.shape, bool))
