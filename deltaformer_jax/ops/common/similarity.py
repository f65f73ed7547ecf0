"""κ(x, y): how strongly a query x matches a key y, as a function of the scaled score s = scale · x·y.

    linear   κ = s
    relu     κ = max(s, 0)
    exp      κ = e^s
    softmax  κ = e^s / Σ e^s, the sum over the row's own range
    round    κ = s rounded to `decimals` decimals, with the derivative of s (straight-through)

Source: Xu et al., DeltaFormer (NeurIPS 2025), section 3 and experiments 4.1; the associative-memory view in
Zhong et al., arXiv 2505.19488.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
from typing import Any

import jax
import jax.numpy as jnp

# Where a row has seen nothing yet its running maximum starts here. Finite, so that a difference of two such
# starts is 0 and not NaN.
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
    """κ = e^s, unnormalised. Overflows where s does: bound the keys' norms."""

    normalised = False

    def weight(self, scores):
        return jnp.exp(scores)

    def slope(self, scores, weights):
        return weights


@dataclasses.dataclass(frozen=True)
class Softmax:
    """κ = e^s / Σ e^s. `weight` is the numerator; whoever owns the row divides by its sum."""

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
            raise ValueError(f"Round(decimals={self.decimals!r}): give an integer, 0 or more")

    def weight(self, scores):
        return _round_straight_through(self.decimals, scores)

    def slope(self, scores, weights):
        return jnp.ones_like(scores)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _round_straight_through(decimals, scores):
    # s + stop_gradient(round(s) - s) would have the same derivative, but is off by a rounding error.
    return jnp.round(scores, decimals)


@_round_straight_through.defjvp
def _round_jvp(decimals, primals, tangents):
    return jnp.round(primals[0], decimals), tangents[0]


@dataclasses.dataclass(frozen=True)
class Own:
    """κ = f(s) of each score by itself, f a function of yours or the `weight` of an object of yours.

    Its derivative is the object's `slope(scores, weights)`, or JAX's where it has none. Inside compiled programs
    `given` is the structure of an object that holds arrays (`without_arrays`).
    """

    given: Any
    normalised = False

    def weight(self, scores):
        return self.given.weight(scores) if hasattr(self.given, "weight") else self.given(scores)

    def slope(self, scores, weights):
        if hasattr(self.given, "slope"):
            return self.given.slope(scores, weights)
        return jax.jvp(self.weight, (scores,), (jnp.ones_like(scores),))[1]


# What this package has, its kernels too.
NAMED = {"linear": Linear(), "relu": Relu(), "exp": Exp(), "softmax": Softmax(), "round": Round()}
Similarity = Linear | Relu | Exp | Softmax | Round | Own


def as_similarity(similarity: Any, argument: str) -> Similarity:
    """The similarity of that name, the object itself, or `Own` of a function or an object of yours.

    Programs are compiled for a similarity and kept as long as it is equal to the one before: a lambda written where the
    op is called is another one at each call and is compiled each time. What is yours is a function or a hashable
    object, as a frozen dataclass, which must not change. An object that holds arrays is registered as a pytree
    (`jax.tree_util.Partial`, `jax.tree_util.register_dataclass`): its arrays are arguments, and they may change.
    Raises ValueError naming `argument`.
    """
    if isinstance(similarity, Similarity):
        return similarity
    if isinstance(similarity, str) and similarity in NAMED:
        return NAMED[similarity]
    if not isinstance(similarity, str | type) and (callable(similarity) or hasattr(similarity, "weight")):
        if getattr(similarity, "normalised", False):
            raise ValueError(f"{argument}={similarity!r} is normalised: of such there is 'softmax' alone")
        own = Own(similarity)
        try:
            hash(without_arrays(own)[0])
        except TypeError:
            raise ValueError(
                f"{argument}={similarity!r} is not hashable: give a function or a frozen dataclass, or register an "
                "object that holds arrays as a pytree"
            ) from None
        return own
    near = difflib.get_close_matches(str(similarity), NAMED, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(
        f"{argument}={similarity!r} is no similarity: give one of {sorted(NAMED)}, Round(decimals), a function of "
        f"scores or an object with weight(scores).{hint}"
    )


def without_arrays(similarity: Similarity) -> tuple[Similarity, tuple]:
    """What is known while tracing, hashable, and the arrays of an object of yours that JAX knows as a pytree."""
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
    """`arrays`, the similarities' of a form that has no gradient for them: asking for one is an error, not 0."""
    return arrays


@without_gradient.defjvp
def _no_gradient(primals, tangents):
    raise NotImplementedError(
        "implementation='chunked' has no gradient for the arrays that a similarity holds: use 'parallel' or "
        "'recurrent', or put jax.lax.stop_gradient around them"
    )


def row_weights(similarity: Similarity, scores, visible):
    """κ of whole rows: `scores` [..., N] where `visible` (same shape), 0 elsewhere and in rows that see nothing.

    Differentiable as often as one likes, and free of NaN whatever stands in the hidden scores' places as long as
    that is finite. Rows are normalised over what they see where the similarity asks for it.
    """
    scores = jnp.where(visible, scores, 0.0)
    if not similarity.normalised:
        return jnp.where(visible, similarity.weight(scores), 0.0)
    highest = jnp.max(scores, axis=-1, keepdims=True, where=visible, initial=LOWEST)
    highest = jax.lax.stop_gradient(jnp.where(highest > LOWEST, highest, 0.0))
    # Mask before exp as well as after: a hidden score above the maximum would overflow.
    weights = jnp.where(visible, jnp.exp(jnp.where(visible, scores - highest, 0.0)), 0.0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    return weights / jnp.where(total > 0, total, 1.0)
