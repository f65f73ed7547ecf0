"""Continuous batching: a fixed number of rows decodes together, and a row whose text ends takes the next prompt.

Two compiled functions do the work, and both donate the caches. `_admit` reads new prompts into some rows, `_advance`
draws one token in every row. They are dispatched without waiting: the host reads a call's tokens while the device makes
the next one. So a text that ends by a stop costs one token that is thrown away; one that ends by its length costs none.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from deltaformer_jax.data import Tokenizer
from deltaformer_jax.decoding.choose import choose, power_of_two
from deltaformer_jax.decoding.chosen.eviction import read_and_evict
from deltaformer_jax.decoding.chosen.layers import Slots, empty_cache, resolved, seen_after, without_unseen
from deltaformer_jax.decoding.chosen.rules import Evicted, Streaming
from deltaformer_jax.decoding.chosen.streaming import compacted, entries, marked, read_in_pieces
from deltaformer_jax.decoding.memory import check_memory
from deltaformer_jax.decoding.requests import (
    Completion,
    Piece,
    Request,
    check_sampling,
    items,
    layer_switches,
    make_requests,
    vocabulary_of,
    whole,
)
from deltaformer_jax.model import LanguageModel

EVICTION = 2**31  # sets a row's draws of an eviction apart from those of its tokens
PROMPT_TOKENS = 8192  # of one call of `_admit`, padding included; a longer prompt is read alone


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """What the device keeps of S rows: the caches; the newest token, int32 [S]; of each row's text the seed and stream,
    uint32 [S], and the number of tokens drawn, int32 [S]. A row that is free goes on drawing, and nobody reads it."""

    cache: Any
    token: jax.Array
    seed: jax.Array
    stream: jax.Array
    drawn: jax.Array


@dataclasses.dataclass(frozen=True)
class How:
    """How prompts are read and tokens are chosen.

    `temperature` and `top_p` are arrays, so that new values don't compile a new program. `skipped`: the layers that
    only fill their caches while prompts are read, bool [num_layers]; None: none. `chosen`: which entries the caches
    keep; None: all.
    """

    temperature: jax.Array
    top_p: jax.Array | None
    top_k: int
    logprobs: bool
    skipped: np.ndarray | None = None
    chosen: Streaming | Evicted | None = None


def _keys(seed, stream, drawn):
    """A row's key for its next draw. It depends on nothing but the row's own seed, stream and number of tokens."""

    def one(seed, stream, drawn):
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), drawn), stream)

    return jax.vmap(one)(seed, stream, drawn)


def _draw(logits, keys, temperature, top_p, top_k, logprobs):
    """(the tokens int32 [B], their log-probabilities float32 [B], or None)."""
    token = choose(logits, keys, temperature, top_k, top_p)
    if not logprobs:
        return token, None
    chosen = jnp.take_along_axis(logits, token[:, None], axis=1)[:, 0]
    return token, chosen - jax.nn.logsumexp(logits, axis=1)


@partial(jax.jit, static_argnames=("graphdef", "rows", "slots", "chosen"))
def _empty(graphdef, params, rows: int, slots: Slots, chosen) -> Rows:
    cache = empty_cache(nnx.merge(graphdef, params), rows, slots, chosen)
    zeros = jnp.zeros(rows, jnp.int32)
    return Rows(cache, zeros, zeros.astype(jnp.uint32), zeros.astype(jnp.uint32), zeros)


@partial(jax.jit, static_argnames=("graphdef", "slots", "chosen", "top_k", "logprobs"), donate_argnames="state")
def _admit(
    graphdef,
    params,
    state,
    prompts,
    skipped,
    temperature,
    top_p,
    *,
    slots: Slots,
    chosen: Streaming | Evicted | None,
    top_k: int,
    logprobs: bool,
):
    """Read prompts into rows, and draw the first token of each: (the rows, tokens, log-probabilities or None).

    `prompts`: tokens and segment ids [n, width], row, seed, stream [n], and kept [2, n], of an eviction. A row outside
    the rows is dropped.
    """
    tokens, real, row, seed, stream, kept = prompts
    model = nnx.merge(graphdef, params)
    skip = {} if skipped is None else {"skipped": skipped}
    keys = _keys(seed, stream, jnp.zeros_like(row))
    if isinstance(chosen, Evicted):
        own = jax.vmap(jax.random.fold_in, (0, None))(keys, EVICTION)
        newest, cache = read_and_evict(model, tokens, real, slots, chosen, kept, own, **skip)
    elif isinstance(chosen, Streaming):
        cache = empty_cache(model, tokens.shape[0], slots, chosen)
        newest, cache = read_in_pieces(model, tokens, real, cache, chosen, **skip)
    else:
        drops = slots.behind < slots.text  # what layers with a window do not see after the prompt
        wide = dataclasses.replace(slots, behind=tokens.shape[1]) if drops else slots
        cache = empty_cache(model, tokens.shape[0], wide, None)
        hidden, cache = model.hidden(tokens, segment_ids=real, cache=cache, **skip)
        cache = without_unseen(model, cache, slots.behind) if drops else cache
        last = jnp.sum(real, axis=1) - 1
        newest = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
    logits = model.logits(newest[:, None])[:, 0]
    token, logprob = _draw(logits, keys, temperature, top_p, top_k, logprobs)
    # Arrays of a cache lead with an axis over the layers; arrays of the rows don't.
    put = lambda old, new: old.at[:, row].set(new, mode="drop")
    state = Rows(
        jax.tree.map(put, state.cache, cache),
        state.token.at[row].set(token, mode="drop"),
        state.seed.at[row].set(seed, mode="drop"),
        state.stream.at[row].set(stream, mode="drop"),
        state.drawn.at[row].set(1, mode="drop"),
    )
    return state, token, logprob


@partial(jax.jit, static_argnames=("graphdef", "chosen", "top_k", "logprobs"), donate_argnames="state")
def _advance(graphdef, params, state, temperature, top_p, *, chosen, top_k: int, logprobs: bool):
    """Draw one token in every row: (the rows, tokens int32 [S], log-probabilities float32 [S] or None)."""
    model = nnx.merge(graphdef, params)
    logits, cache = model(state.token[:, None], cache=state.cache)
    if isinstance(chosen, Streaming):
        cache = marked(model, cache, state.token[:, None], None, chosen)
    keys = _keys(state.seed, state.stream, state.drawn)
    token, logprob = _draw(logits[:, 0], keys, temperature, top_p, top_k, logprobs)
    return Rows(cache, token, state.seed, state.stream, state.drawn + 1), token, logprob


@partial(jax.jit, static_argnames=("graphdef", "chosen"), donate_argnames="state")
def _compact(graphdef, params, state, *, chosen: Streaming):
    """Make room in the rows that are full: (the rows, their numbers of entries, int32 [S])."""
    model = nnx.merge(graphdef, params)
    state = dataclasses.replace(state, cache=compacted(model, state.cache, chosen))
    return state, entries(model, state.cache)


_entries = jax.jit(entries)


def generate(model: LanguageModel, prompts: Sequence[Sequence[int] | str], **options) -> list[Completion]:
    """Continue every prompt: one `Completion` per prompt, in their order. `options` are those of `stream`.

    texts = generate(model, ["def ", "class "], max_tokens=50, tokenizer=tokenizer, stop=["\\n\\n"], seed=[1, 2])
    """
    prompts = items("prompts", prompts, "a list of prompts")
    completions = [Completion() for _ in prompts]
    for piece in stream(model, prompts, **options):
        completions[piece.row].add(piece)
    return completions


def stream(
    model: LanguageModel,
    prompts: Sequence[Sequence[int] | str],
    *,
    max_tokens: int | Sequence[int],
    tokenizer: Tokenizer | None = None,
    stop: Sequence[str] = (),
    stop_tokens: Sequence[int] = (),
    temperature: float = 0.8,
    top_k: int = 40,
    top_p: float = 1.0,
    seed: int | Sequence[int] = 0,
    logprobs: bool = False,
    batch_size: int = 32,
    skip_in_prefill: Sequence[int] = (),
    cache: Streaming | Evicted | None = None,
) -> Iterator[Piece]:
    """Yield every token of every text as it is drawn, with the row that it belongs to.

    Args:
      prompts: lists of token ids, each beginning as the model knows texts to begin; or texts, which the tokenizer
        encodes after its prefix: end-of-text, or what a folder's own tokenizer puts there (`pretrained_tokenizer`).
        They may have any lengths, and there may be any number of them.
      max_tokens: the most tokens of a text; one number, or one per prompt.
      tokenizer: makes the texts. Its end-of-text and other `ends` end a text. Without it pieces have tokens only.
      stop: a text ends before the first of these strings. A string may lie across tokens. It needs the tokenizer.
      stop_tokens: a text ends at the first of these ids, and does not show it.
      temperature, top_k, top_p: see `choose`.
      seed: one number: row b draws from (seed, b). One per prompt: a row draws from its own alone. Either way a text
        depends on its prompt and on its seed, and not on its neighbours, the batch size or the order of refilling; up
        to rounding, which may decide a near tie.
      logprobs: also give each token's log-probability, in nats.
      batch_size: how many rows decode at once. The caches have room for the longest prompt with its `max_tokens` in
        each of these rows. Prompts that find no free row wait, and take the first that ends.
      skip_in_prefill: numbers of layers, from 0, that only fill their caches while prompts are read; see `skipped` of
        `LanguageModel.hidden`.
      cache: which entries the caches of attention layers keep: `Streaming(...)`, a cache of fixed size for texts of any
        length; `Evicted(...)`, one eviction after the prompt; None, all of them.

    Prompts are padded on the right to a power of two, several are read in one call (PROMPT_TOKENS), and the capacity of
    the caches is a power of two, so that few compiled programs serve all lengths. Raises at the call: ValueError naming
    the argument that is out of range, or `max_tokens` if the caches are larger than the memory, TypeError naming one of
    another kind.
    """
    check_sampling(1, temperature, top_k, top_p, 0)
    batch_size = whole("batch_size", batch_size, 1)
    if not isinstance(logprobs, bool | np.bool_):
        raise TypeError(f"logprobs = {logprobs!r:.60}: give True or False")
    requests = make_requests(
        prompts,
        vocabulary_of(model),
        max_tokens=max_tokens,
        seed=seed,
        tokenizer=tokenizer,
        stop=stop,
        stop_tokens=stop_tokens,
    )
    nucleus, skipped = (
        None if top_p == 1 else jnp.float32(top_p),
        layer_switches("skip_in_prefill", skip_in_prefill, model),
    )
    chosen = resolved(cache, model, tokenizer, vocabulary_of(model))
    how = How(jnp.float32(temperature), nucleus, int(top_k), bool(logprobs), skipped, chosen)
    return _pieces(_Batch(model, requests, how, batch_size)) if requests else iter(())


def _pieces(batch: _Batch) -> Iterator[Piece]:
    ahead = 1  # calls that are dispatched before the tokens of the oldest are read
    while batch.busy() or batch.calls:
        batch.refill()
        if batch.busy():
            batch.advance()
        while len(batch.calls) > (ahead if batch.busy() else 0):
            yield from batch.read()


def _slots(model: LanguageModel, requests: list[Request], rule: Streaming | Evicted | None) -> Slots:
    """A power of two for each kind of layer: of what a prompt leaves in it, and the most tokens that are generated."""
    slots = Slots.of(rule, power_of_two(max(len(r.ids) + r.max_tokens for r in requests)))
    if isinstance(rule, Streaming):
        return slots
    kept = rule.counts if rule is not None else lambda length: (length, 0)
    chosen = power_of_two(max(kept(len(r.ids))[0] + r.max_tokens for r in requests))
    seen = seen_after(model, [r.ids for r in requests])
    behind = power_of_two(max(count + r.max_tokens for count, r in zip(seen, requests)))
    return dataclasses.replace(slots, chosen=chosen, behind=behind)


class _Batch:
    """The rows, who is in each, who waits, and the calls whose tokens are not read yet."""

    def __init__(self, model, requests: list[Request], how: How, rows: int):
        self._graphdef, self._params = nnx.split(model)
        self._how, self._waiting = how, collections.deque(requests)
        self._slots = _slots(model, requests, how.chosen)
        self._in_row: list[Request | None] = [None] * min(rows, len(requests))
        self._entries = np.zeros(len(self._in_row), np.int64)  # of a streaming cache
        most, size = (
            max(r.max_tokens for r in requests),
            {"rows": len(self._in_row), "slots": self._slots, "chosen": how.chosen},
        )
        fix = "fewer tokens, shorter prompts or a smaller batch_size"
        check_memory("max_tokens", most, self._graphdef, self._params, fix=fix, **size)
        self._state = _empty(self._graphdef, self._params, **size)
        self.calls: collections.deque[tuple[jax.Array, jax.Array | None, list[Request | None]]] = collections.deque()

    def busy(self) -> bool:
        return bool(self._waiting) or any(self._in_row)

    def refill(self) -> None:
        """Give each free row to a waiting prompt."""
        # A text of one token has it at once, and leaves its row free again.
        while self._waiting and (free := [row for row, request in enumerate(self._in_row) if request is None]):
            group = [self._waiting.popleft()]
            width = power_of_two(len(group[0].ids))
            while self._waiting and len(group) < len(free):
                wider = max(width, power_of_two(len(self._waiting[0].ids)))
                if wider * (len(group) + 1) > PROMPT_TOKENS:
                    break
                width = wider
                group.append(self._waiting.popleft())
            self._admit(group, free[: len(group)], width)

    def _admit(self, group, rows, width):
        # 1, 4, 16, ... prompts, so that few programs are compiled: the ones added have one token, and no row.
        count = 4 ** next(power for power in range(len(group)) if 4**power >= len(group))
        tokens, real = np.zeros((2, count, width), np.int32)
        real[:, 0] = 1
        row = np.full(count, len(self._in_row), np.int32)
        seed, stream = np.zeros((2, count), np.uint32)
        for i, request in enumerate(group):
            tokens[i, : len(request.ids)], real[i, : len(request.ids)] = request.ids, 1
            row[i], seed[i], stream[i] = rows[i], request.seed, request.stream
        how, kept = self._how, None
        if isinstance(how.chosen, Evicted):
            kept = np.array([how.chosen.counts(int(length)) for length in real.sum(axis=1)], np.int32).T
        prompts = (tokens, real, row, seed, stream, kept)
        self._state, token, logprob = _admit(
            self._graphdef,
            self._params,
            self._state,
            prompts,
            how.skipped,
            how.temperature,
            how.top_p,
            slots=self._slots,
            chosen=how.chosen,
            top_k=how.top_k,
            logprobs=how.logprobs,
        )
        if isinstance(how.chosen, Streaming):
            self._entries = np.array(_entries(nnx.merge(self._graphdef, self._params), self._state.cache), np.int64)
        for place, request in zip(rows, group):
            self._in_row[place] = request
        self._called(token, logprob, group)

    def advance(self) -> None:
        if not any(self._in_row):  # all had one token to draw, and drew it
            return
        how = self._how
        if isinstance(how.chosen, Streaming):
            # The host counts along, and waits for the device only when a row is full.
            if self._entries.max() == how.chosen.capacity:
                self._state, held = _compact(self._graphdef, self._params, self._state, chosen=how.chosen)
                self._entries = np.array(held, np.int64)
            self._entries += 1
        self._state, token, logprob = _advance(
            self._graphdef,
            self._params,
            self._state,
            how.temperature,
            how.top_p,
            chosen=how.chosen,
            top_k=how.top_k,
            logprobs=how.logprobs,
        )
        self._called(token, logprob, list(self._in_row))

    def _called(self, token, logprob, requests):
        """Remember whose tokens a call draws. A text that has its `max_tokens` with them gives its row away."""
        self.calls.append((token, logprob, requests))
        for request in filter(None, requests):
            request.asked += 1
            if request.asked == request.max_tokens:
                self._in_row[self._in_row.index(request)] = None

    def read(self) -> Iterator[Piece]:
        """The pieces of the oldest call. A text that ends gives its row away."""
        token, logprob, requests = self.calls.popleft()
        tokens = np.asarray(token)
        logprobs = None if logprob is None else np.asarray(logprob)
        for i, request in enumerate(requests):
            if request is None or request.finish:
                continue
            piece = request.push(int(tokens[i]), None if logprobs is None else float(logprobs[i]))
            if request.finish and request in self._in_row:
                self._in_row[self._in_row.index(request)] = None
            yield piece
