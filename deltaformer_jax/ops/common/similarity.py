"""Similarities κ(x, y) between a query x and a key y, as functions of the scaled score s = scale · x·y.

    linear   κ = s
    relu     κ = max(s, 0)
    exp      κ = e^s
    softmax  κ = e^s / Σ e^s, the sum over the keys that the row sees
    round    κ = s rounded to `decimals` decimals, with the derivative of s (straight-through)

Of reads alone, with p the softmax of the row and m ≤ 0 ≤ M its least and largest score, or 0:

    self_adjust        κ = p (s − m) / (M − m),      m = min(min s, 0), M = max(max s, 0)
    self_adjust_basic  κ = p s

Source: Xu et al., DeltaFormer (NeurIPS 2025), section 3 and experiments 4.1; the associative-memory view in
Zhong et al., arXiv 2505.19488. Self-adjust: "Self-Adjust Softmax", arXiv 2502.18277.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from deltaformer_jax.host.spelling import did_you_mean

# The start of a row's running maximum, before the row has seen a key. The value is finite, so that the difference of
# two starts is 0 and not NaN.
LOWEST = -1e30


@dataclasses.dataclass(frozen=True)
class Linear:
    """κ = s: the delta rule of linear attention."""

    normalised = False

    def weight(self, scores):
        return scores

    def slope(self, scores, weights):
        return jnp.ones_like(scores)


@dataclasses.dataclass(frozen=True)
class Relu:
    """κ = max(s, 0), with derivative 0 at s = 0."""

    normalised = False

    def weight(self, scores):
        return jax.nn.relu(scores)

    def slope(self, scores, weights):
        return (scores > 0).astype(scores.dtype)


@dataclasses.dataclass(frozen=True)
class Exp:
    """κ = e^s, unnormalised. e^s overflows for large s (about 88 in float32): bound the norms of queries and keys."""

    normalised = False

    def weight(self, scores):
        return jnp.exp(scores)

    def slope(self, scores, weights):
        return weights


@dataclasses.dataclass(frozen=True)
class Softmax:
    """κ = e^s / Σ e^s. `weight` is the numerator only; the caller of `weight` divides by the row's sum."""

    normalised = True

    def weight(self, scores):
        return jnp.exp(scores)

    def slope(self, scores, weights):
        return weights


@dataclasses.dataclass(frozen=True)
class Round:
    """κ = s rounded half to even to `decimals` decimals; its derivative is taken to be 1."""

    decimals: int = 2
    normalised = False

    def __post_init__(self):
        if not isinstance(self.decimals, int) or isinstance(self.decimals, bool) or self.decimals < 0:
            raise ValueError(f"Round(decimals={self.decimals!r}): decimals must be an integer of at least 0")

    def weight(self, scores):
        return _round_straight_through(self.decimals, scores)

    def slope(self, scores, weights):
        return jnp.ones_like(scores)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _round_straight_through(decimals, scores):
    # A custom derivative, because the usual s + stop_gradient(round(s) - s) has a rounding error in its value.
    return jnp.round(scores, decimals)


@_round_straight_through.defjvp
def _round_jvp(decimals, primals, tangents):
    return jnp.round(primals[0], decimals), tangents[0]


@dataclasses.dataclass(frozen=True)
class SelfAdjust:
    """κ = p (s − m) / (M − m), with p the softmax of the row, m = min(min s, 0) and M = max(max s, 0).

    Not `normalised`: κ = p s. A row does not sum to 1. Unlike softmax, it changes when a constant is added to its
    scores.

    The extremes are those of the scores that the row sees. Their derivatives go to the score that is the extreme, of
    several equal ones to the first; an extreme of 0 has none. A row whose M − m is 0, or too small a number to divide
    by, is plain softmax. With the normalised weights, which lie in [0, 1], a row sums to at most 1.

    It is a similarity of reads, not of DeltaFormer's write. Basic weights may exceed 1 in size, and u would then grow
    without bound. Normalised ones would keep it bounded, but the write has no fast form with them here.
    """

    normalised: bool = True

    def __post_init__(self):
        if not isinstance(self.normalised, bool):
            raise ValueError(f"SelfAdjust(normalised={self.normalised!r}): normalised must be True or False")

    def adjusted(self, weights, scores, visible):
        """κ of a row that is given in parts: lists of the softmax's weights, of scores and of bools, all [..., N_i]."""
        if not self.normalised:
            return [p * x for p, x in zip(weights, scores)]
        low, high = _extreme(scores, visible, -1.0), _extreme(scores, visible, 1.0)
        span = high - low
        wide = span >= jnp.finfo(span.dtype).tiny
        span = jnp.where(wide, span, 1.0)
        return [p * jnp.where(wide, (x - low) / span, 1.0) for p, x in zip(weights, scores)]


def _extreme(scores, visible, sign):
    """The largest score of each row, or 0 if none is above it: [..., 1]. `sign` −1: the least score, or 0."""
    best = None
    for seen, x in zip(visible, scores):
        x = sign * jnp.where(seen & (sign * x > 0), x, 0.0)
        if x.shape[-1] == 0:
            continue
        found = jnp.take_along_axis(x, jnp.argmax(x, axis=-1, keepdims=True), axis=-1)
        best = found if best is None else jnp.where(found > best, found, best)
    return sign * best


@dataclasses.dataclass(frozen=True)
class Own:
    """A user's similarity: κ = f(s), elementwise. f is the given function, or the `weight` method of the given object.

    The derivative is the object's `slope(scores, weights)`. If it has none, JAX differentiates f. If the object holds
    arrays, `given` is only its tree structure inside compiled programs (`without_arrays`).
    """

    given: Any
    normalised = False

    def weight(self, scores):
        return self.given.weight(scores) if hasattr(self.given, "weight") else self.given(scores)

    def slope(self, scores, weights):
        if hasattr(self.given, "slope"):
            return self.given.slope(scores, weights)
        return jax.jvp(self.weight, (scores,), (jnp.ones_like(scores),))[1]


# Those of them that the kernels have.
WRITES = {"linear": Linear(), "relu": Relu(), "exp": Exp(), "softmax": Softmax(), "round": Round()}
# The built-in similarities.
NAMED = WRITES | {"self_adjust": SelfAdjust(), "self_adjust_basic": SelfAdjust(normalised=False)}
Similarity = Linear | Relu | Exp | Softmax | Round | SelfAdjust | Own


def as_similarity(similarity: Any, argument: str) -> Similarity:
    """The argument as a `Similarity`: looks up a name, returns a `Similarity` as it is, wraps anything else in `Own`.

    A similarity of your own is a function of scores, or an object with a method weight(scores). It must be hashable,
    as functions and frozen dataclasses are, and it must not change. An object that holds arrays must be registered as a
    pytree (`jax.tree_util.Partial`, `jax.tree_util.register_dataclass`). Its arrays are then arguments of the compiled
    program and may change.

    The similarity is a static argument of the compiled program. The program is reused only if the similarity is equal
    to an earlier one. A lambda written inside the call is a new object at each call, so each call compiles anew.

    Raises ValueError for anything else. The message names `argument`.
    """
    if isinstance(similarity, Similarity):
        return similarity
    if isinstance(similarity, str) and similarity in NAMED:
        return NAMED[similarity]
    if not isinstance(similarity, str | type) and (callable(similarity) or hasattr(similarity, "weight")):
        if getattr(similarity, "normalised", False):
            raise ValueError(
                f"{argument}={similarity!r} is normalised: 'softmax' is the only normalised similarity; set "
                "normalised to False"
            )
        own = Own(similarity)
        try:
            hash(without_arrays(own)[0])
        except TypeError:
            raise ValueError(
                f"{argument}={similarity!r} is not hashable: give a function or a frozen dataclass; register an "
                "object that holds arrays as a pytree"
            ) from None
        return own
    raise ValueError(
        f"{argument}={similarity!r} is not a similarity: give one of {sorted(NAMED)}, Round(decimals), a function of "
        f"scores or an object with weight(scores){did_you_mean(similarity, NAMED)}"
    )


def as_write_similarity(similarity: Any, argument: str) -> Similarity:
    """`as_similarity` of a similarity of DeltaFormer's write, or of another place that has no `SelfAdjust`."""
    found = as_similarity(similarity, argument)
    if isinstance(found, SelfAdjust):
        raise ValueError(
            f"{argument}={similarity!r}: self-adjusted softmax is a similarity of reads only; give one of "
            f"{sorted(WRITES)} or a similarity of your own"
        )
    return found


def without_arrays(similarity: Similarity) -> tuple[Similarity, tuple]:
    """(similarity, arrays): a hashable similarity for use as a static argument, and the arrays taken out of it.

    Only a user's object that is registered as a pytree has arrays.
    """
    if not isinstance(similarity, Own):
        return similarity, ()
    arrays, structure = jax.tree.flatten(similarity.given)
    if jax.tree_util.treedef_is_leaf(structure):
        return similarity, ()
    return Own(structure), tuple(arrays)


def with_arrays(similarity: Similarity, arrays: tuple) -> Similarity:
    """The inverse of `without_arrays`."""
    if isinstance(similarity, Own) and isinstance(similarity.given, jax.tree_util.PyTreeDef):
        return Own(jax.tree.unflatten(similarity.given, arrays))
    return similarity


@jax.custom_jvp
def without_gradient(arrays):
    """`arrays`, the similarities' arrays, unchanged. Differentiating them raises an error instead of returning 0.

    For an implementation whose backward pass does not compute their gradient.
    """
    return arrays


@without_gradient.defjvp
def _no_gradient(primals, tangents):
    raise NotImplementedError(
        "implementation='chunked' has no gradient for the arrays that a similarity holds: use 'parallel' or "
        "'recurrent', or put jax.lax.stop_gradient around them"
    )


def row_weights(similarity: Similarity, scores, visible):
    """κ of whole rows: `scores` [..., N], `visible` [..., N] bools -> weights [..., N], 0 where not visible.

    Softmax rows are normalised over the visible scores; a row that sees nothing is all 0. The function can be
    differentiated any number of times. Neither values nor gradients are NaN if the hidden scores are finite.
    """
    return row_weights_of_parts(similarity, [scores], [visible])[0]


def row_weights_of_parts(similarity: Similarity, scores, visible) -> list[jax.Array]:
    """`row_weights` of rows that are given in parts: lists of scores [..., N_i] and of bools that broadcast to them."""
    visible = [jnp.broadcast_to(seen, x.shape) for seen, x in zip(visible, scores)]
    scores = [jnp.where(seen, x, 0.0) for seen, x in zip(visible, scores)]
    if isinstance(similarity, SelfAdjust):
        return similarity.adjusted(row_weights_of_parts(Softmax(), scores, visible), scores, visible)
    if not similarity.normalised:
        return [jnp.where(seen, similarity.weight(x), 0.0) for seen, x in zip(visible, scores)]
    highest = [jnp.max(x, axis=-1, keepdims=True, where=seen, initial=LOWEST) for seen, x in zip(visible, scores)]
    highest = functools.reduce(jnp.maximum, highest)
    highest = jax.lax.stop_gradient(jnp.where(highest > LOWEST, highest, 0.0))
    # Mask before exp as well as after: a hidden score above the maximum would overflow.
    weights = [jnp.where(seen, jnp.exp(jnp.where(seen, x - highest, 0.0)), 0.0) for seen, x in zip(visible, scores)]
    total = sum(jnp.sum(x, axis=-1, keepdims=True) for x in weights)
    return [x / jnp.where(total > 0, total, 1.0) for x in weights]
