"""Random numbers that are a function of (seed, what they are for, example, place): any example can be drawn alone.

A counter is hashed where other generators go from state to state (splitmix64: Steele, Lea, Flood, 2014). Written here,
in 64-bit integers, so that no new release of a library changes what a run trains on.
"""

from __future__ import annotations

import hashlib

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class Draws:
    """The numbers of examples `indices` (ints [N], any) under `seed` (an int or a text) and `purpose`.

    Every call draws anew, so the order of the calls is part of what is drawn; row i depends on indices[i] alone.
    """

    def __init__(self, seed: int | str, purpose: str, indices: np.ndarray):
        digest = hashlib.blake2b(f"{purpose} {seed}".encode(), digest_size=8).digest()
        key = np.frombuffer(digest, "<u8").astype(np.uint64)
        self._examples = _mix(key + np.asarray(indices, np.int64).astype(np.uint64) * _GOLDEN)
        self._calls = 0

    def bits(self, count: int) -> np.ndarray:
        """uint64 [N, count], uniform."""
        self._calls += 1
        stream = _mix(self._examples ^ _mix(np.full(1, self._calls, np.uint64)))
        return _mix(stream[:, None] + np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN)

    def integers(self, count: int, high: int | np.ndarray) -> np.ndarray:
        """int64 [N, count], uniform in [0, high), which is a number or [N, count], at most 2^31. Off by high/2^32."""
        return ((self.bits(count) >> np.uint64(32)) * np.asarray(high, np.uint64) >> np.uint64(32)).astype(np.int64)

    def uniforms(self, count: int) -> np.ndarray:
        """float64 [N, count], uniform in (0, 1)."""
        return ((self.bits(count) >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53

    def choices(self, count: int, high: int) -> np.ndarray:
        """int64 [N, count], distinct in each row, uniform among the ordered selections of `count` of [0, high)."""
        return smallest(self.bits(high), count)

    def weighted_choices(self, count: int, weights: np.ndarray) -> np.ndarray:
        """int64 [N, count] of [0, len(weights)), one after another, never twice, each with p ∝ what is left of weights.

        As the order of exponential waiting times with these rates (Efraimidis and Spirakis, 2006).
        """
        return smallest(-np.log(self.uniforms(len(weights))) / weights, count)


def smallest(numbers: np.ndarray, count: int) -> np.ndarray:
    """int64 [N, count]: the places of each row's `count` smallest numbers, in rising order. O(row) and a short sort."""
    if count < numbers.shape[1]:
        places = np.argpartition(numbers, count - 1, axis=1)[:, :count]
    else:
        places = np.broadcast_to(np.arange(numbers.shape[1]), numbers.shape)
    order = np.argsort(np.take_along_axis(numbers, places, axis=1), axis=1, kind="stable")
    return np.take_along_axis(places, order, axis=1)


def _mix(z: np.ndarray) -> np.ndarray:
    """The finalising steps of splitmix64: each output bit depends on every input bit."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
