"""κ of tiles of scores inside a kernel, and softmax sums that grow tile by tile.

Softmax's exponentials are powers of two: log₂ e is in the factor of its scores (`Kappa.factor`), and so in its running
maxima and log-sum-exps. Tiles are columns × rows, so that what belongs to a row is a row vector [1, R].
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np

# Where a row has seen nothing yet its running maximum starts here: finite, so that a difference of two is 0.
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
        """What products of queries and keys are multiplied by."""
        return self.scale * (LOG2_E if self.normalised else 1.0)

    def weight(self, scores):
        """κ of scores; for softmax the numerator."""
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
        """κ'(s) x, the derivative by the scaled score; softmax's own, without its normaliser's part."""
        if self.name in ("linear", "round"):
            return x
        if self.name == "relu":
            return jnp.where(scores > 0, x, 0.0)
        return weights * x


def keep(visible, x):
    """x where visible, 0 elsewhere; None means visible everywhere."""
    return x if visible is None else jnp.where(visible, x, 0.0)


def both(a, b):
    """a and b, where None means everything."""
    if a is None:
        return b
    return a if b is None else a & b


def nothing_seen(rows: int):
    """(maximum [1, R], normaliser [1, R]) of rows that have seen nothing."""
    return jnp.full((1, rows), LOWEST, jnp.float32), jnp.zeros((1, rows), jnp.float32)


def absorb(kappa: Kappa, running, scores, visible):
    """(The weights of one more tile of columns, what the sums weighted so far shrink by (None: nothing), maximum and
    normaliser with the tile in them)."""
    if not kappa.normalised:
        return keep(visible, kappa.weight(keep(visible, scores))), None, running
    highest, total = running
    if visible is not None:
        scores = jnp.where(visible, scores, LOWEST)
    highest_now = jnp.maximum(highest, jnp.max(scores, axis=0, keepdims=True))
    # In a row that has seen nothing both are LOWEST and the power is 1: mask again.
    weights = keep(visible, jnp.exp2(scores - highest_now))
    shrink = jnp.exp2(highest - highest_now)
    total = total * shrink + jnp.sum(weights, axis=0, keepdims=True)
    return weights, shrink, (highest_now, total)


def shrunk(sums, shrink):
    return sums if shrink is None else sums * shrink


def inverse_normaliser(kappa: Kappa, running):
    """1/l of each row [1, R], 0 for a row that saw nothing; 1 without a normaliser."""
    total = running[1]
    if not kappa.normalised:
        return jnp.ones_like(total)
    return jnp.where(total > 0, 1.0 / jnp.where(total > 0, total, 1.0), 0.0)


def log_normaliser(running):
    """log₂ Σ_j 2^{s_ij} [1, R]; 0 in rows that saw nothing, where nothing multiplies it."""
    highest, total = running
    return jnp.where(total > 0, highest + jnp.log2(jnp.where(total > 0, total, 1.0)), 0.0)


def weights_again(kappa: Kappa, scores, lse, visible):
    """κ recomputed from scores and log-sum-exps that broadcast against them."""
    scores = keep(visible, scores)
    if kappa.normalised:
        # A hidden score may lie above its row's log-sum-exp: mask before the power too, or it overflows.
        scores = keep(visible, scores - lse)
    return keep(visible, kappa.weight(scores))
