"""Tasks named by a string, as in data.path: "task:NAME" or "task:NAME,option=value,option=value"."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

from deltaformer_jax.host.spelling import did_you_mean
from deltaformer_jax.tasks.formal_languages import (
    DuplicateString,
    ModularArithmetic,
    OddsFirst,
    Parity,
    ReverseString,
    StackManipulation,
)
from deltaformer_jax.tasks.in_context.distant_recall import DistantRecall
from deltaformer_jax.tasks.in_context.hop_k import HopK
from deltaformer_jax.tasks.in_context.induction import Induction
from deltaformer_jax.tasks.in_context.ngram import NGram
from deltaformer_jax.tasks.mqar import MQAR
from deltaformer_jax.tasks.swap import SwapTracking
from deltaformer_jax.tasks.word_problem import WordProblem

PREFIX = "task:"
# The tasks whose examples are rows of tokens, on which a language model can be trained.
TOKEN_TASKS = {
    "swap": SwapTracking,
    "mqar": MQAR,
    "word_problem": WordProblem,
    "modular_arithmetic": ModularArithmetic,
    "parity": Parity,
    "reverse_string": ReverseString,
    "duplicate_string": DuplicateString,
    "odds_first": OddsFirst,
    "stack_manipulation": StackManipulation,
    "induction": Induction,
    "hop_k": HopK,
    "ngram": NGram,
    "distant_recall": DistantRecall,
}


def read_spec(spec: str) -> tuple[str, dict[str, Any]]:
    """(NAME, {option: value}) of "task:NAME,option=value,...". An option is a field of the task other than length.

    Raises ValueError for an unknown name or option, naming the nearest one, and for a value of the wrong type.
    """
    name, *parts = [part.strip() for part in spec.removeprefix(PREFIX).split(",")]
    if name not in TOKEN_TASKS:
        raise ValueError(f"{spec!r}: no task {name!r}{_hint(name, TOKEN_TASKS)}")
    types = typing.get_type_hints(TOKEN_TASKS[name])
    fields = [field.name for field in dataclasses.fields(TOKEN_TASKS[name]) if field.name != "length"]
    options = {}
    for part in parts:
        option, equals, value = part.partition("=")
        if option == "length":
            raise ValueError(f"{spec!r}: length is data.sequence_length; set that field instead")
        if option not in fields:
            raise ValueError(f"{spec!r}: {name} has no option {option!r}{_hint(option, fields)}")
        if not equals or not value:
            raise ValueError(f"{spec!r}: option {option} has no value; write {option}=VALUE")
        if option in options:
            raise ValueError(f"{spec!r}: option {option} is given twice")
        options[option] = _value(spec, option, types[option], value)
    return name, options


def _value(spec: str, option: str, kind: type, text: str) -> Any:
    if kind is bool:
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
        raise ValueError(f"{spec!r}: {option}={text}: must be true or false")
    try:
        return kind(text)
    except ValueError:
        what = {int: "a whole number", float: "a number"}[kind]
        raise ValueError(f"{spec!r}: {option}={text}: must be {what}") from None


def make_task(spec: str, length: int) -> Any:
    """The task named by `spec`, in rows of `length` tokens.

    Raises ValueError as `read_spec` does, and for options that don't fit.
    """
    name, options = read_spec(spec)
    try:
        return TOKEN_TASKS[name](length=length, **options)
    except ValueError as error:
        text = str(error)
        if text.startswith("length="):
            text = text.replace("length=", "data.sequence_length=", 1)
        raise ValueError(f"{spec!r}: {text}") from None


def _hint(name: str, known: typing.Iterable[str]) -> str:
    return did_you_mean(name, known, f"; there are: {', '.join(known)}")
