"""A model with its tokenizer, asked in text: the three questions of lm-evaluation-harness, without importing it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from deltaformer_jax.data import Tokenizer
from deltaformer_jax.decoding import stream
from deltaformer_jax.evaluate.harness.score import score
from deltaformer_jax.evaluate.harness.windows import encode_pair, last_window, rolling_windows
from deltaformer_jax.model import LanguageModel

MOST_TOKENS = 256  # of an answer whose task names no number, as in the harness
_MOST_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # the first one counts


class Answers:
    """Log-likelihoods and texts of a model.

    Args:
      model, tokenizer: of one run.
      length: the most tokens that the model reads at once. Longer contexts lose their beginning, as in the harness.
      batch_size: rows of a batch.
      separator: begin every context with the tokenizer's prefix: end-of-text, as every document in training, or what
        the own tokenizer of an imported model puts there, as the harness's class for transformers does. False leaves it
        out, which that class does with add_bos_token=False, and for a tokenizer that puts nothing there.
      advance: called with the number of answers that a batch has brought.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        *,
        length: int,
        batch_size: int = 8,
        separator: bool = True,
        advance: Callable[[int], None] = lambda count: None,
    ):
        if length < 1:
            raise ValueError(f"length = {length}: give 1 token or more")
        self.model, self.tokenizer, self.length, self.batch_size = model, tokenizer, length, batch_size
        self._prefix, self._first = list(tokenizer.prefix.ids) if separator else [], tokenizer.prefix.first
        self._advance = advance

    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """For each (context, continuation): (log p(continuation | context) in nats, whether it is the greedy one)."""
        windows = [
            last_window(
                *encode_pair(context, continuation, self.tokenizer.encode_text, self._prefix, self._first),
                self.length,
            )
            for context, continuation in pairs
        ]
        return score(self.model, windows, batch_size=self.batch_size, advance=self._advance)

    def loglikelihood_rolling(self, texts: Sequence[str]) -> list[float]:
        """For each text: log p(text) in nats, every token given as much before it as its window holds."""
        windows, owner = [], []
        # The harness scores what a tokenizer puts before a text as a part of it, after one more beginning.
        before = self._prefix if self.tokenizer.prefix.elsewhere else []
        for i, text in enumerate(texts):
            ids = [*before, *self.tokenizer.encode_text(text)]
            for window in rolling_windows(ids, self._first, self.length):
                windows.append(window)
                owner.append(i)
        totals = [0.0] * len(texts)
        for i, (logprob, _) in zip(owner, score(self.model, windows, batch_size=self.batch_size)):
            totals[i] += logprob
        self._advance(len(texts))
        return totals

    def generate_until(self, requests: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
        """For each (context, options): the text that follows, up to the first of the options' stop strings.

        Options are the harness's: `until` (a string or a list), `max_gen_toks` or another of its names, `do_sample`,
        `temperature`, `top_p`, `top_k`; without `do_sample` the likeliest token is always taken. Other options raise
        ValueError. The context's beginning is left out until the answer has room in `length` tokens.
        """
        answers = [""] * len(requests)
        groups: dict[tuple, list[int]] = {}
        for i, (_, options) in enumerate(requests):
            groups.setdefault(tuple(_options(options).items()), []).append(i)
        for options, places in groups.items():
            how = dict(options)
            room = self.length - how["max_tokens"]
            if room < 1:
                raise ValueError(
                    f"max_gen_toks = {how['max_tokens']}: the model reads {self.length} tokens, which leaves no room "
                    "for the context; give a larger --sequence_length"
                )
            prompts = [self._context(requests[i][0])[-room:] for i in places]
            pieces = stream(self.model, prompts, tokenizer=self.tokenizer, batch_size=self.batch_size, **how)
            for piece in pieces:
                answers[places[piece.row]] += piece.text
                if piece.finish:
                    self._advance(1)
        if self.tokenizer.prefix.space:  # such a tokenizer decodes a text without the space before it
            answers = [answer.removeprefix(" ") for answer in answers]
        return answers

    def _context(self, text: str) -> list[int]:
        return [*self._prefix, *self.tokenizer.encode_text(text)] or [self._first]


def _options(given: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `stream`, from options of the harness."""
    given = dict(given)
    until = given.pop("until", None) or []
    until = [until] if isinstance(until, str) else until
    most = [given.pop(name) for name in _MOST_NAMES if name in given]
    sample = given.pop("do_sample", given.get("temperature", 0.0) > 0)
    how = {
        "stop": tuple(text for text in until if text),
        "max_tokens": int(most[0]) if most else MOST_TOKENS,
        "temperature": float(given.pop("temperature", 1.0)) if sample else 0.0,
        "top_k": int(given.pop("top_k", 0)),
        "top_p": float(given.pop("top_p", 1.0)),
    }
    if given:
        raise ValueError(f"generation options {sorted(given)}: not known here; take them out of the task's YAML")
    return how
