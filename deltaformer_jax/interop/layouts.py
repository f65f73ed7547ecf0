"""How an array of a file and a parameter of ours hold the same numbers. Each layout goes both ways, bit for bit.

A linear map of PyTorch is [out, in]; ours is [*in, *out], with the heads as a dimension of their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

Shape = tuple[int, ...]


class Layout(NamedTuple):
    """theirs(ours' shape): the shape in the file, all of it. to_ours(array, ours' shape). to_theirs(our array)."""

    theirs: Callable[[Shape], Shape]
    to_ours: Callable[[np.ndarray, Shape], np.ndarray]
    to_theirs: Callable[[np.ndarray], np.ndarray]


def _linear(inputs: int) -> Layout:
    def theirs(shape):
        return math.prod(shape[inputs:]), math.prod(shape[:inputs])

    def to_theirs(array):
        return array.reshape(theirs(array.shape)[::-1]).T

    return Layout(theirs, lambda array, shape: array.T.reshape(shape), to_theirs)


# x [d] -> [H, K]: theirs [H·K, d].
LINEAR = _linear(1)
# [H, K] -> x [d]: theirs [d, H·K].
FROM_HEADS = _linear(2)
# Theirs [H·K, 1, W], whose last tap is the current token's; ours [W, H, K], whose first one is.
CONVOLUTION = Layout(
    lambda shape: (math.prod(shape[1:]), 1, shape[0]),
    lambda array, shape: array[:, 0, ::-1].T.reshape(shape),
    lambda array: array.reshape(array.shape[0], -1).T[:, None, ::-1],
)
# A vector, in ours perhaps [H, K].
VECTOR = Layout(lambda shape: (math.prod(shape),), lambda array, shape: array.reshape(shape), lambda x: x.reshape(-1))
