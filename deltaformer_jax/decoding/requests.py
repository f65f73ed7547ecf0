"""What is asked of a generation, row by row: its arguments as they are checked, and where a text ends."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Mapping, Sequence
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
            text = self._text.push(token) if not ends or token in self._text.ends else self._text.end()
            self.finish = self._text.finish
        if self.finish is None and token in self._stop_tokens:
            self.finish = "stop"
        if self.finish is None and self._count == self.max_tokens:
            if self._text is not None:
                text += self._text.end()
                self.finish = self._text.finish
            self.finish = self.finish or "length"
        return Piece(self.row, token, logprob, text, self.finish)


def check_sampling(tokens: Any, temperature: Any, top_k: Any, top_p: Any, seed: Any) -> None:
    """Raise ValueError or TypeError, naming the argument, if one of a generation is out of range or of another kind."""
    whole("tokens", tokens, 1)
    whole("top_k", top_k, 0, "0 (all tokens) or more")
    whole("seed", seed, 0, _SEEDS, below=2**32)
    if not 0 <= number("temperature", temperature, _TEMPERATURE) < float("inf"):
        raise ValueError(f"temperature = {temperature}: give {_TEMPERATURE}")
    if not 0 < number("top_p", top_p, _TOP_P) <= 1:
        raise ValueError(f"top_p = {top_p}: give {_TOP_P}")


def layer_switches(name: str, layers: Any, model: Any) -> np.ndarray | None:
    """bool [num_layers], True for these layers; None if none is given. Raises as `whole`, and for one given twice."""
    count = model.periods * len(model.blocks)
    layers = [
        whole(name, layer, 0, f"layers from 0 to {count - 1}", below=count) for layer in items(name, layers, "a list")
    ]
    if len(set(layers)) < len(layers):
        raise ValueError(f"{name} = {layers}: give each layer once")
    return np.isin(np.arange(count), layers) if layers else None


_SEEDS = "0 to 2^32 - 1"
_TEMPERATURE = "0 (always the likeliest token) or more"
_TOP_P = "a probability above 0, at most 1 (all tokens)"


def whole(name: str, value: Any, least: int, give: str = "", below: int | None = None) -> int:
    """`value` as a whole number of at least `least`. Raises TypeError or ValueError that say what to `give`."""
    give = give or f"{least} or more"
    try:
        found = operator.index(None if isinstance(value, bool) else value)
    except TypeError:
        raise TypeError(f"{name} = {value!r:.60}: give a whole number, {give}") from None
    if found < least or (below is not None and found >= below):
        raise ValueError(f"{name} = {found}: give {give}")
    return found


def number(name: str, value: Any, give: str) -> float:
    """`value` as a number. Raises TypeError that says what to `give`."""
    try:
        return float(None if isinstance(value, bool | str | bytes) else value)
    except TypeError:
        raise TypeError(f"{name} = {value!r:.60}: give a number, {give}") from None


def items(name: str, value: Any, give: str) -> list[Any]:
    """The items of a list, an array or another iterable, not of one text. Raises TypeError that says what to `give`."""
    if isinstance(value, str | bytes):
        raise TypeError(f"{name} is one text, {value[:40]!r}: give {give}, [{value[:40]!r}]")
    if isinstance(value, Mapping):  # its items are its keys
        raise TypeError(f"{name} is a {type(value).__name__}, {value!r:.60}: give {give}")
    try:
        return list(value)
    except TypeError:
        raise TypeError(f"{name} = {value!r:.60}: give {give}") from None


def check_prompt(prompt: Any, row: int, vocabulary: int) -> np.ndarray:
    """Prompt `row` as checked int64 ids. In a narrow dtype, comparing them with `vocabulary` would overflow.

    Raises ValueError for an empty prompt or an id outside the vocabulary, TypeError for ids that are not integers.
    """
    try:
        ids = np.asarray(prompt)
    except ValueError:  # lists of several lengths
        raise TypeError(f"prompts[{row}] = {prompt!r:.60}: give a list of integers") from None
    if not ids.size:
        raise ValueError("prompt: has no token; begin it with the document separator")
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
        what = f"{ids.dtype}{list(ids.shape)}" if ids.ndim else f"{prompt!r:.60}"
        raise TypeError(f"prompts[{row}] must be a list of integers; it is {what}")
    ids = ids.astype(np.int64)
    outside = ids[(ids < 0) | (ids >= vocabulary)]
    if outside.size:
        raise ValueError(f"prompts[{row}] has the id {outside[0]}: ids must be from 0 to {vocabulary - 1}")
    return ids


def vocabulary_of(model: Any) -> int:
    """The model's number of tokens. Raises TypeError for what is no LanguageModel."""
    size = getattr(getattr(model, "embedding", None), "vocab_size", None)
    if size is None:
        raise TypeError(f"model is a {type(model).__name__}: give a LanguageModel")
    return size


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
    prompts = items("prompts", prompts, "a list of prompts")
    stop = items("stop", stop, "a list of texts, or leave it out")
    if wrong := [text for text in stop if not isinstance(text, str)]:
        raise TypeError(f"stop has {wrong[0]!r:.60}: give texts; ids of tokens belong into stop_tokens")
    if tokenizer is not None and not isinstance(tokenizer, Tokenizer):
        raise TypeError(
            f"tokenizer = {tokenizer!r:.60}: give one of deltaformer_jax.data, as load_tokenizer(FILE) does"
        )
    if stop and tokenizer is None:
        raise ValueError(f"stop = {stop}: strings need the tokenizer; give tokenizer=, or stop_tokens")
    ends = frozenset(
        whole(f"stop_tokens[{i}]", token, 0, f"an id from 0 to {vocabulary - 1}", below=vocabulary)
        for i, token in enumerate(items("stop_tokens", stop_tokens, "a list of ids, or leave it out"))
    )
    limits = _per_row("max_tokens", max_tokens, len(prompts), 1, "1 or more")
    shared = np.ndim(seed) == 0
    seeds = _per_row("seed", seed, len(prompts), 0, _SEEDS, below=2**32)
    requests = []
    for row, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            if tokenizer is None:
                raise ValueError(f"prompts[{row}] is text: give tokenizer=, or token ids")
            prompt = tokenizer.encode_prompt(prompt)
        ids = check_prompt(prompt, row, vocabulary)
        request = Request(row, ids, limits[row], seeds[row], row if shared else 0)
        requests.append(request.ends_at(tokenizer, stop, ends))
    return requests


def _per_row(name: str, value: Any, rows: int, least: int, give: str, below: int | None = None) -> list[int]:
    if np.ndim(value) == 0:
        return [whole(name, value, least, give, below)] * rows
    if len(value) != rows:
        raise ValueError(f"{name} has {len(value)} numbers for {rows} prompts: give one number, or one per prompt")
    return [whole(f"{name}[{row}]", one, least, give, below) for row, one in enumerate(value)]
