"""Which tokens a token of an attention mixer sees, and how many:

    i ≤ t  and  (t − i < window  or  i < initial_tokens  or  token i is a separator)

i and t are counted in their document. Source: Chen et al., SepLLM, arXiv 2412.12094, with a first tokens, n window.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from deltaformer_jax.config.checks import check_argument

# Fields that say what is seen behind a window.
BEHIND = ("initial_tokens", "separator_tokens")


def check_visible(window: int | None, initial_tokens: int, separator_tokens: tuple[int, ...]) -> tuple[int, ...]:
    """The ids as a tuple of ints. Raises ValueError naming an argument that is wrong, or that needs a window."""
    if window is not None:
        check_argument("window", window)
    check_argument("initial_tokens", initial_tokens)
    separator_tokens = tuple(int(id) for id in separator_tokens)
    if window is None:
        for name, value in zip(BEHIND, (initial_tokens, separator_tokens)):
            if value:
                raise ValueError(f"{name}={value!r} needs a window: without one every token sees all before it")
    return separator_tokens


def check_keep(separator_tokens: tuple[int, ...], keep: jax.Array | None) -> None:
    """Raise ValueError unless `keep` is there exactly where a mixer has separators."""
    if bool(separator_tokens) != (keep is not None):
        given = "was given none" if keep is None else "has no separator_tokens"
        raise ValueError(
            f"keep: bool [batch, length], True at separators, goes with separator_tokens; the mixer {given}"
        )


def where_it_matters(values: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """`values` of a mixer's fields without those of BEHIND that are the model's, not its `own`, and that mean nothing,
    as this layer has no window."""
    if values.get("window"):
        return values
    return {name: value for name, value in values.items() if name not in BEHIND or name in own}


def separators_of(mixers: list[Any], tokens: jax.Array) -> list[jax.Array | None]:
    """For each mixer its `keep`: bool [B, T], True at its separators; None for a mixer without any."""
    of_ids: dict[tuple[int, ...], jax.Array] = {}

    def keep(ids):
        if ids and ids not in of_ids:
            of_ids[ids] = is_one_of(tokens, ids)
        return of_ids[ids] if ids else None

    return [keep(getattr(mixer, "separator_tokens", ())) for mixer in mixers]


def is_one_of(tokens: jax.Array, ids: tuple[int, ...]) -> jax.Array:
    """bool [B, T]: whether a token, of any integer type, is one of `ids`."""
    return jnp.any(tokens.astype(jnp.int32)[..., None] == jnp.asarray(ids, jnp.int32)[None, None], axis=-1)


def tokens_last(mixer: Any) -> bool:
    """Whether some tokens stay visible behind the mixer's window."""
    return mixer.initial_tokens > 0 or bool(mixer.separator_tokens)


def mean_tokens_seen(length: int, window: int | None, initial_tokens: int = 0) -> float:
    """The mean number of tokens that a token sees: length/2, or W − W²/(2 length) with a window W < length, and of the
    first tokens those behind it. Separators are not counted, as their number depends on the text.

    It is the area of the causal triangle, or of the band that the window leaves of it, divided by `length`.
    """
    if window is None or window >= length:
        return length / 2
    rows = length - window  # those that see a first token behind their window
    first = min(initial_tokens, rows)
    return window - window**2 / (2 * length) + (first * rows - first * (first - 1) / 2) / length
