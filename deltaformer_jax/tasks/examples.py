"""What a task gives: examples, each a function of the seed, its index and the task's own settings, nothing else."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Examples(NamedTuple):
    """N examples in rows of T tokens.

    tokens int32 [N, T], in [0, task.input_vocabulary); targets int32 [N, T], in [0, task.target_vocabulary), 0 where
    nothing is asked; counted bool [N, T]: where something is, and the loss and the accuracy look; real bool [N, T]:
    False at the padding after a short example, whose tokens are 0. What is counted is real.

    targets[:, t] is what a causal model is to say after tokens[:, : t + 1]: nothing is shifted. The two vocabularies
    are two countings, both from 0; a model with one table for both has as many words as the larger.
    """

    tokens: np.ndarray
    targets: np.ndarray
    counted: np.ndarray
    real: np.ndarray


def check_least(name: str, value: int, least: int) -> None:
    """Raise ValueError naming the argument unless value is an integer >= least."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise ValueError(f"{name}={value!r}: must be an integer")
    if value < least:
        raise ValueError(f"{name}={value}: must be at least {least}")
