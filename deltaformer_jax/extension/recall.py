"""How well a model recalls a passage that it has seen m tokens before.

A passage of P tokens of one text is put into another, at place a + m, and into a copy of that at place a too. A model
that recalls predicts it better in the second:

    saved(m) = mean nats of the passage at a + m, not seen before − mean nats of it there, seen at a

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
    """Of one distance, means over passages in nats a token: not seen before, and seen `distance` tokens before."""

    distance: int
    unseen: float
    seen: float

    @property
    def saved(self) -> float:
        return self.unseen - self.seen


def distances(length: int) -> list[int]:
    """SHORTEST, twice, four times … it, and the farthest at which rows of `length` tokens have room.

    Raises ValueError for rows that are too short.
    """
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
    """The recall at each of `distances(length)`, over `examples` passages each.

    nats: a batch of tokens, targets and segment_ids [rows, length] -> the nats of each target; rows is even. texts:
    yields arrays of length + 1 tokens of running text, two for each passage.
    """
    at_once = rows // 2
    asked = [distance for distance in distances(length) for _ in range(examples)]
    asked += asked[-1:] * (-len(asked) % at_once)
    draws, found = np.random.default_rng(seed), {distance: [] for distance in asked}
    for first in range(0, len(asked), at_once):
        mine = asked[first : first + at_once]
        places = [int(draws.integers(0, length - PASSAGE - distance)) for distance in mine]
        pairs = [_pair(next(texts), next(texts), place, distance) for place, distance in zip(places, mine)]
        both = np.concatenate(pairs)
        batch = {"tokens": both[:, :-1], "targets": both[:, 1:], "segment_ids": np.ones_like(both[:, 1:])}
        values = np.asarray(nats(batch), np.float64).reshape(at_once, 2, length)
        for pair, place, distance in zip(values, places, mine):
            start = place + distance + START
            found[distance].append(pair[:, start : start + PASSAGE - START].mean(axis=1))
    return [Recall(distance, *np.mean(pairs, axis=0).tolist()) for distance, pairs in found.items()]


def _pair(text: np.ndarray, other: np.ndarray, place: int, distance: int) -> np.ndarray:
    """[2, length + 1]: `text` with a passage of `other` as its targets from place + distance on, and from place too."""
    pair = np.stack([text, text])
    passage = other[1 : 1 + PASSAGE]
    pair[:, place + distance + 1 :][:, :PASSAGE] = passage
    pair[1, place + 1 :][:PASSAGE] = passage
    return pair
