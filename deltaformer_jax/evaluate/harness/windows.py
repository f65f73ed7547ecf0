"""Which tokens of a text the model reads, and which of them it is scored on: lists of ids, no arrays.

The rules are those of lm-evaluation-harness 0.4.13 (`api/model.py`, `utils.py`, `models/huggingface.py`), so that a
score here is the score that it gives to the same weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple


class Window(NamedTuple):
    """`tokens` are read; the model is scored on the last `scored` of them, each given the tokens before it."""

    tokens: list[int]
    scored: int


def encode_pair(
    context: str, continuation: str, encode: Callable[[str], list[int]], prefix: list[int], first: int
) -> tuple[list[int], list[int]]:
    """(ids of the context, ids of the continuation), which together are the ids of the whole text.

    Spaces at the context's end go to the continuation, since tokenizers join them with the word after them. `prefix`
    comes before the ids of a context. An empty context is `first` alone.

    Raises ValueError if nothing is left of the continuation to be scored.
    """
    if context == "":
        before, after = [first], encode(continuation)
    else:
        spaces = len(context) - len(context.rstrip())
        if spaces:
            context, continuation = context[:-spaces], context[-spaces:] + continuation
        before = [*prefix, *encode(context)]
        after = [*prefix, *encode(context + continuation)][len(before) :]
        before = before or [first]  # a context of spaces alone
    if not after:
        raise ValueError(f"the continuation {continuation!r} has no token after its context: nothing can be scored")
    return before, after


def last_window(before: list[int], after: list[int], length: int) -> Window:
    """The continuation `after` with as much of the context `before` as a model of `length` tokens reads.

    The last token is predicted and not read, so that `length` + 1 tokens take part. A continuation of more than
    `length` tokens raises ValueError: its first tokens would have no context, and some would not be scored.
    """
    if len(after) > length:
        raise ValueError(
            f"a continuation has {len(after)} tokens, the model reads {length}: give a larger --sequence_length"
        )
    return Window([*before, *after][-(length + 1) :], len(after))


def rolling_windows(tokens: list[int], first: int, length: int) -> Iterator[Window]:
    """Windows in which each of `tokens` is predicted once, the first after the token `first`, for a whole text's score.

    Each window reads at most `length` tokens. The last is moved to the left, so that it has a full context: it scores
    only the tokens that are left.
    """
    done = min(length, len(tokens))
    if tokens:
        yield Window([first, *tokens[:done]], done)
    while done < len(tokens):
        new = min(length, len(tokens) - done)
        done += new
        yield Window(tokens[done - length - 1 : done], new)
