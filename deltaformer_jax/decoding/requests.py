"""What is asked of a generation, row by row: its arguments as they are checked, and where a text ends."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from deltaformer_jax.data import Tokenizer
from deltaformer_jax.decoding.text_stream import TextStream


@dataclasses.dataclass(frozen=True)
class Piece:
    """What is new of one text.

    Attributes:
      row: which prompt it continues, from 0.
      token: the id that was drawn.
      logprob: its log-probability in nats, log_softmax of the model's logits, before temperature, top_k and top_p; None
        unless it was asked for.
      text: the new text that is final, in whole characters; "" without a tokenizer, and while a character or a possible
        stop string is incomplete.
      finish: None while the text goes on; "end_of_text" after the tokenizer's end-of-text, "stop" after a stop string
        or a stop token, "length" after `max_tokens`.
    """

    row: int
    token: int
    logprob: float | None
    text: str
    finish: str | None


@dataclasses.dataclass
class Completion:
    """A finished text: `tokens` are all that were drawn, also the one that ended it; `text` ends before a stop string.

    `logprobs` has one number per token, or is None; `finish` is that of the last `Piece`.
    """

    tokens: list[int] = dataclasses.field(default_factory=list)
    text: str = ""
    logprobs: list[float] | None = None
    finish: str | None = None

    def add(self, piece: Piece) -> None:
        self.tokens.append(piece.token)
        self.text += piece.text
        self.finish = piece.finish
        if piece.logprob is not None:
            self.logprobs = [*(self.logprobs or ()), piece.logprob]


class Request:
    """One prompt on its way: its ids, its own seed, and the text so far.

    `stream` is the number that tells apart the rows that share a seed.
    """

    def __init__(self, row: int, ids: np.ndarray, max_tokens: int, seed: int, stream: int):
        self.row, self.ids, self.max_tokens, self.seed, self.stream = row, ids, max_tokens, seed, stream
        self.asked = 0  # tokens that the device was told to draw
        self.finish: str | None = None
        self._count = 0
        self._text: TextStream | None = None
        self._stop_tokens: frozenset[int] = frozenset()

    def ends_at(self, tokenizer: Tokenizer | None, stop: Sequence[str], stop_tokens: frozenset[int]) -> Request:
        self._text = None if tokenizer is None else TextStream(tokenizer, stop)
        self._stop_tokens = stop_tokens
        return self

    def push(self, token: int, logprob: float | None) -> Piece:
        """The token that was drawn next. Sets `finish`."""
        self._count += 1
        text = ""
        if self._text is not None:
            ends = token in self._stop_tokens  # such a token is no part of the text
            text = self._text.push(token) if not ends or token == self._text.eot else self._text.end()
            self.finish = self._text.finish
        if self.finish is None and token in self._stop_tokens:
            self.finish = "stop"
        if self.finish is None and self._count == self.max_tokens:
            if self._text is not None:
                text += self._text.end()
                self.finish = self._text.finish
            self.finish = self.finish or "length"
        return Piece(self.row, token, logprob, text, self.finish)


def check_sampling(tokens: int, temperature: float, top_k: int, top_p: float, seed: int) -> None:
    """Raise ValueError, naming the argument, if an argument of a generation is out of range."""
    if tokens < 1:
        raise ValueError(f"tokens = {tokens}: give 1 or more")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature = {temperature}: give 0 (always the likeliest token) or more")
    if top_k < 0:
        raise ValueError(f"top_k = {top_k}: give 0 (all tokens) or more")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p = {top_p}: give a probability above 0, at most 1 (all tokens)")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed = {seed}: give 0 to 2^32 - 1")


def check_prompt(prompt: Any, number: int, vocabulary: int) -> np.ndarray:
    """Prompt `number` as checked int64 ids. In a narrow dtype, comparing them with `vocabulary` would overflow.

    Raises ValueError for an empty prompt or an id outside the vocabulary, TypeError for ids that are not integers.
    """
    ids = np.asarray(prompt)
    if not ids.size:
        raise ValueError("prompt: has no token; begin it with the document separator")
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
        raise TypeError(f"prompts[{number}] must be a list of integers; it is {ids.dtype}{list(ids.shape)}")
    ids = ids.astype(np.int64)
    outside = ids[(ids < 0) | (ids >= vocabulary)]
    if outside.size:
        raise ValueError(f"prompts[{number}] has the id {outside[0]}: ids must be from 0 to {vocabulary - 1}")
    return ids


def make_requests(
    prompts: Sequence[Sequence[int] | str],
    vocabulary: int,
    *,
    max_tokens: int | Sequence[int],
    seed: int | Sequence[int],
    tokenizer: Tokenizer | None,
    stop: Sequence[str],
    stop_tokens: Sequence[int],
) -> list[Request]:
    """The requests of `decoding.stream`, checked; its docstring says what the arguments mean and what they raise."""
    if isinstance(prompts, str):
        raise TypeError(f"prompts is one text, {prompts[:40]!r}: give a list of prompts, [{prompts[:40]!r}]")
    if isinstance(stop, str):
        raise TypeError(f"stop is one text, {stop!r}: give a list, [{stop!r}]")
    if stop and tokenizer is None:
        raise ValueError(f"stop = {list(stop)}: strings need the tokenizer; give tokenizer=, or stop_tokens")
    for token in stop_tokens:
        if not 0 <= token < vocabulary:
            raise ValueError(f"stop_tokens has the id {token}: ids must be from 0 to {vocabulary - 1}")
    limits = _per_row("max_tokens", max_tokens, len(prompts))
    shared = np.ndim(seed) == 0
    seeds = _per_row("seed", seed, len(prompts))
    requests = []
    for row, prompt in enumerate(prompts):
        if limits[row] < 1:
            raise ValueError(f"max_tokens = {limits[row]}: give 1 or more")
        if not 0 <= seeds[row] < 2**32:
            raise ValueError(f"seed = {seeds[row]}: give 0 to 2^32 - 1")
        if isinstance(prompt, str):
            if tokenizer is None:
                raise ValueError(f"prompts[{row}] is text: give tokenizer=, or token ids")
            prompt = tokenizer.encode_prompt(prompt)
        ids = check_prompt(prompt, row, vocabulary)
        request = Request(row, ids, limits[row], seeds[row], row if shared else 0)
        requests.append(request.ends_at(tokenizer, stop, frozenset(map(int, stop_tokens))))
    return requests


def _per_row(name, value, rows):
    if np.ndim(value) == 0:
        return [int(value)] * rows
    if len(value) != rows:
        raise ValueError(f"{name} has {len(value)} numbers for {rows} prompts: give one number, or one per prompt")
    return [int(x) for x in value]
