"""The examples that a task generates. Each depends only on the seed, its index and the task's settings."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Examples(NamedTuple):
    """N examples in rows of T tokens.

    * tokens int32 [N, T], in [0, task.input_vocabulary).
    * targets int32 [N, T], in [0, task.target_vocabulary); 0 where nothing is asked.
    * counted bool [N, T]: where a target is asked for; loss and accuracy are computed there. Counted positions are
      real.
    * real bool [N, T]: False at the padding after a short example, where tokens are 0.

    targets[:, t] is the target of a causal model after tokens[:, : t + 1]; it is not shifted. Input and target ids are
    separate vocabularies, both counted from 0. A model with one table for both needs the size of the larger.
    """

    tokens: np.ndarray
    targets: np.ndarray
    counted: np.ndarray
    real: np.ndarray


def check_least(name: str, value: int, least: int) -> None:
    """Raise ValueError, naming the argument, unless `value` is an integer of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise ValueError(f"{name}={value!r}: must be an integer")
    if value < least:
        raise ValueError(f"{name}={value}: must be at least {least}")
