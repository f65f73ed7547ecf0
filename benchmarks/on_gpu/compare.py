"""Values and gradients of a call, and how far two ways to compute them lie apart."""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np


def with_gradients(call: Callable) -> Callable:
    """(arrays, segments, cotangents) -> {name: array}: the outputs of call(arrays, segments), a dict, and the gradients
    of the arrays, "dquery" for "query". `cotangents` has the names of the outputs."""

    def both(arrays, segments, cotangents):
        outputs, pull = jax.vjp(lambda arrays: call(arrays, segments), arrays)
        (gradients,) = pull({name: cotangents[name].astype(x.dtype) for name, x in outputs.items()})
        return outputs | {f"d{name}": x for name, x in gradients.items()}

    return both


def differences(found: dict, expected: dict) -> dict[str, float]:
    """The largest difference of each array, relative to the largest number of the expected one."""
    wide = lambda x: np.asarray(x, np.float64)
    apart = lambda a, b: float(np.max(np.abs(a - b)) / max(np.max(np.abs(b)), 1e-3))
    return {name: apart(wide(found[name]), wide(x)) for name, x in expected.items()}


def block_differences(found: dict, expected: dict, time: int, rows: int = 64) -> dict[str, float]:
    """‖found − expected‖ / ‖expected‖ of each block of `rows` tokens of a batch row; the largest of each array.

    Late tokens of a long context average over many values, so that their numbers are small: a difference relative to
    the array's largest number would not show that they are wrong. An array [B, time, ...] has blocks; any other is one
    block per batch row. A block whose norm is less than a thousandth of the median counts with that.
    """
    apart = {}
    for name, x in expected.items():
        a, b = (np.asarray(array, np.float32).reshape(*x.shape[:2], -1) for array in (found[name], x))
        begins = range(0, time, rows) if x.shape[1] == time else [0]
        norm = lambda x, begins=begins: np.sqrt(np.add.reduceat(np.sum(np.square(x), axis=2), begins, axis=1))
        error, size = norm(a - b), norm(b)
        apart[name] = float(np.max(error / np.maximum(size, max(1e-3 * np.median(size), 1e-30))))
    return apart


def worst(apart: dict[str, float]) -> tuple[str, float]:
    """The name and the size of the largest difference. NaN is the largest."""
    return max(apart.items(), key=lambda item: (not item[1] < float("inf"), item[1]))
