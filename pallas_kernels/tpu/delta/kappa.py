"""Similarities κ of tiles of scores inside a kernel, and the running softmax sums (online softmax).

Exponentials of softmax are computed as powers of two. The factor of its scores (`Kappa.factor`) therefore includes
log₂ e, and its running maxima and log-sum-exps are in base 2. Tiles are laid out columns × rows, so that numbers per
row are row vectors [1, R].
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np

# The start of a running maximum. It is finite, so that the difference of two starts is 0 and not NaN.
LOWEST = -1e30
LOG2_E = float(np.log2(np.e))


@dataclasses.dataclass(frozen=True)
class Kappa:
    """A similarity: its name, the scale of its scores, and for "round" the number of decimals."""

    name: str
    scale: float
    decimals: int = 2

    @property
    def normalised(self) -> bool:
        return self.name == "softmax"

    @property
    def factor(self) -> float:
        """The factor that products of queries and keys are multiplied by."""
        return self.scale * (LOG2_E if self.normalised else 1.0)

    def weight(self, scores):
        """κ(s). For softmax the numerator 2^s."""
        if self.name == "linear":
            return scores
        if self.name == "relu":
            return jnp.maximum(scores, 0.0)
        if self.name == "exp":
            return jnp.exp(scores)
        if self.name == "softmax":
            return jnp.exp2(scores)
        power = 10.0**self.decimals
        return jnp.round(scores * power) / power

    def sloped(self, scores, weights, x):
        """κ'(s) · x, the derivative with respect to the scaled score. For softmax, the caller accounts for the
        normaliser."""
        if self.name in ("linear", "round"):
            return x
        if self.name == "relu":
            return jnp.where(scores > 0, x, 0.0)
        return weights * x


def keep(visible, x):
    """x where visible, 0 elsewhere. None means that everything is visible."""
    return x if visible is None else jnp.where(visible, x, 0.0)


def both(a, b):
    """The mask a & b. None means that everything is visible."""
    if a is None:
        return b
    return a if b is None else a & b


def nothing_seen(rows: int):
    """The running (maximum [1, R], normaliser [1, R]) before the first tile."""
    return jnp.full((1, rows), LOWEST, jnp.float32), jnp.zeros((1, rows), jnp.float32)


def absorb(kappa: Kappa, running, scores, visible):
    """(weights, shrink, running maximum and normaliser) after one more tile of columns. `shrink` is the factor that the
    old weighted sums must be multiplied by; None means 1."""
    if not kappa.normalised:
        return keep(visible, kappa.weight(keep(visible, scores))), None, running
    highest, total = running
    if visible is not None:
        scores = jnp.where(visible, scores, LOWEST)
    highest_now = jnp.maximum(highest, jnp.max(scores, axis=0, keepdims=True))
    # In a row that has seen nothing, score and maximum are both LOWEST, and the power is 1. So mask again.
    weights = keep(visible, jnp.exp2(scores - highest_now))
    shrink = jnp.exp2(highest - highest_now)
    total = total * shrink + jnp.sum(weights, axis=0, keepdims=True)
    return weights, shrink, (highest_now, total)


def shrunk(sums, shrink):
    return sums if shrink is None else sums * shrink


def inverse_normaliser(kappa: Kappa, running):
    """1/l of each row, [1, R]; 0 for a row that saw nothing; 1 if the similarity is not softmax."""
    total = running[1]
    if not kappa.normalised:
        return jnp.ones_like(total)
    return jnp.where(total > 0, 1.0 / jnp.where(total > 0, total, 1.0), 0.0)


def log_normaliser(running):
    """The log-sum-exp log₂ Σ_j 2^{s_ij} of each row, [1, R]; 0 for a row that saw nothing, whose weights are masked
    anyway."""
    highest, total = running
    return jnp.where(total > 0, highest + jnp.log2(jnp.where(total > 0, total, 1.0)), 0.0)


def weights_again(kappa: Kappa, scores, lse, visible):
    """κ, recomputed from the scores and the rows' log-sum-exps, which broadcast against the scores."""
    scores = keep(visible, scores)
    if kappa.normalised:
        # A hidden score may exceed its row's log-sum-exp, and the power could overflow. So mask before it too.
        scores = keep(visible, scores - lse)
    return keep(visible, kappa.weight(scores))
