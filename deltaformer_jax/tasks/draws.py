"""Counter-based random numbers: a function of (seed, purpose, example, place), so any example can be generated alone.

The generator hashes a counter with splitmix64 (Steele, Lea, Flood, 2014) instead of updating a state. It is implemented
here, in 64-bit integers, so that a new release of a library can't change the data that a run trains on.
"""

from __future__ import annotations

import hashlib

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class Draws:
    """The random numbers of the examples `indices` (int [N]) for `seed` (an int or a string) and `purpose`.

    Each method call gives new numbers, so the order of the calls matters. Row i depends on indices[i] only.
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
        """int64 [N, count], uniform in [0, high). `high` is a number or [N, count], at most 2^31.

        Probabilities deviate from 1/high by a relative error of at most high/2^32.
        """
        return ((self.bits(count) >> np.uint64(32)) * np.asarray(high, np.uint64) >> np.uint64(32)).astype(np.int64)

    def uniforms(self, count: int) -> np.ndarray:
        """float64 [N, count], uniform in (0, 1)."""
        return ((self.bits(count) >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53

    def choices(self, count: int, high: int) -> np.ndarray:
        """int64 [N, count]: in each row distinct numbers of [0, high), uniform among all ordered selections."""
        return smallest(self.bits(high), count)

    def weighted_choices(self, count: int, weights: np.ndarray) -> np.ndarray:
        """int64 [N, count]: draws from [0, len(weights)) without replacement, each with probability ∝ its weight among
        the numbers that are left.

        The order of exponential waiting times with these rates has that distribution (Efraimidis and Spirakis, 2006).
        """
        return smallest(-np.log(self.uniforms(len(weights))) / weights, count)


def smallest(numbers: np.ndarray, count: int) -> np.ndarray:
    """int64 [N, count]: the indices of each row's `count` smallest numbers, in ascending order of the numbers.

    Cost per row: linear in its length, and a sort of `count` numbers.
    """
    if count < numbers.shape[1]:
        places = np.argpartition(numbers, count - 1, axis=1)[:, :count]
    else:
        places = np.broadcast_to(np.arange(numbers.shape[1]), numbers.shape)
    order = np.argsort(np.take_along_axis(numbers, places, axis=1), axis=1, kind="stable")
    return np.take_along_axis(places, order, axis=1)


def _mix(z: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64: each output bit depends on every input bit."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
