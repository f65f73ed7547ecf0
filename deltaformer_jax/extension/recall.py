"""How well a model recalls a passage that it has seen m tokens before.

A row is a text in which the P tokens from place a on stand once more from place a + m on, in the place of what was
there. A model that recalls the passage predicts it the second time:

    saved(m) = mean nats of the passage's tokens at a … − mean nats of the same tokens at a + m …

over the last P − START tokens of the passage, since its first ones cannot be told to be a repetition. 0: nothing is
recalled. The texts are of the evaluation split, so that any model of language can be asked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

PASSAGE, START = 32, 8  # tokens
SHORTEST = 64  # tokens: the first distance; each next one is twice as far


class Recall(NamedTuple):
    """Of one distance, means over rows, in nats a token: of the passage at first, and when it comes back."""

    distance: int
    first: float
    again: float

    @property
    def saved(self) -> float:
        return self.first - self.again


def distances(length: int) -> list[int]:
    """SHORTEST, twice, four times … it, and the farthest at which rows of `length` tokens have room."""
    farthest = length - PASSAGE - 1
    if farthest < SHORTEST:
        raise ValueError(f"length {length}: rows need at least {SHORTEST + PASSAGE + 1} tokens")
    found = [SHORTEST]
    while 2 * found[-1] < farthest:
        found.append(2 * found[-1])
    return found if found[-1] == farthest else [*found, farthest]


def recall(
    nats: Callable[[dict[str, np.ndarray]], Any],
    texts: Iterator[np.ndarray],
    length: int,
    rows: int,
    examples: int,
    seed: int = 0,
) -> list[Recall]:
    """The recall at each of `distances(length)`, over `examples` rows each.

    nats: a batch of tokens, targets and segment_ids [rows, length] -> the nats of each target. texts: yields arrays of
    length + 1 tokens of running text, distances · examples of them, rounded up to whole batches.
    """
    asked = [distance for distance in distances(length) for _ in range(examples)]
    asked += asked[-1:] * (-len(asked) % rows)
    draws, found = np.random.default_rng(seed), {distance: [] for distance in asked}
    for first in range(0, len(asked), rows):
        mine = asked[first : first + rows]
        texts_now = np.stack([np.array(next(texts)) for _ in mine])
        places = [int(draws.integers(0, length - PASSAGE - distance)) for distance in mine]
        for text, place, distance in zip(texts_now, places, mine):
            text[place + distance + 1 :][:PASSAGE] = text[place + 1 :][:PASSAGE]
        batch = {"tokens": texts_now[:, :-1], "targets": texts_now[:, 1:]}
        batch["segment_ids"] = np.ones_like(batch["tokens"])
        values = np.asarray(nats(batch), np.float64)
        for row, place, distance in zip(values, places, mine):
            found[distance].append(tuple(_mean(row, start) for start in (place, place + distance)))
    return [Recall(distance, *np.mean(pairs, axis=0).tolist()) for distance, pairs in found.items()]


def _mean(row: np.ndarray, start: int) -> float:
    """The mean nats of the passage at `start`, without its first tokens."""
    return float(row[start + START :][: PASSAGE - START].mean())
