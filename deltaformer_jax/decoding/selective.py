"""Caches of chosen tokens while texts are generated: a streaming cache of fixed size, or one eviction after the prompt.

Both choose which keys and values a trained model keeps; the model is not trained for it. They concern the attention
layers whose cache grows with the text. Layers with a state of fixed size or a window stay as they are.

Sources: Chen et al., "SepLLM", arXiv 2412.12094; Chen et al., "NACL", arXiv 2408.03675.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from deltaformer_jax import ops
from deltaformer_jax.data import Tokenizer
from deltaformer_jax.data.tokenizer.characters import tokens_of
from deltaformer_jax.decoding.requests import items, number, whole
from deltaformer_jax.layers.caches import AttentionCache
from deltaformer_jax.layers.feed_forward.shift_editor import ShiftedCache
from deltaformer_jax.model import LanguageModel
from deltaformer_jax.ops.common.similarity import Softmax

PAPERS = ".,?!;: \t\n"  # SepLLM's separators
OF_BYTES = "\n.;:"  # a fifth of all bytes of a text are spaces


@dataclasses.dataclass(frozen=True)
class Streaming:
    """A streaming cache: at most `capacity` tokens, whatever the length of the text.

        Streaming(initial=4, separators=64, window=256, capacity=800)

    When a row has `capacity` tokens, these stay: the first `initial`, the last `window`, and of the separators between
    them the last `separators`. They are then numbered by their places in the cache, 0, 1, 2, …, and their keys are
    rotated to these positions. Until then nothing changes, up to the rounding of programs of other shapes.

    characters: a token is a separator if its text consists of these. None: SepLLM's . , ? ! ; : space tab newline, and
      for a tokenizer of bytes newline . ; : alone. A list of ids: these.
    fold: what is dropped of a segment is not lost at once but folded into its separator (`ops.fold_segments`).

    Raises ValueError or TypeError, naming the argument, unless initial + separators + window < capacity.
    """

    initial: int
    separators: int
    window: int
    capacity: int
    characters: str | Sequence[int] | None = None
    fold: bool = False

    def __post_init__(self):
        for name, least in (("initial", 0), ("separators", 0), ("window", 1), ("capacity", 2)):
            object.__setattr__(self, name, whole(f"cache: {name}", getattr(self, name), least))
        if self.stays >= self.capacity:
            raise ValueError(
                f"cache: capacity = {self.capacity}: give more than initial + separators + window = {self.stays}"
            )
        if not isinstance(self.fold, bool):
            raise TypeError(f"cache: fold = {self.fold!r:.60}: give True or False")
        if self.characters is not None and not isinstance(self.characters, str):
            object.__setattr__(self, "characters", tuple(items("cache: characters", self.characters, "text or ids")))

    @property
    def stays(self) -> int:
        """The most tokens that stay when the others are dropped."""
        return self.initial + self.separators + self.window


@dataclasses.dataclass(frozen=True)
class Evicted:
    """One eviction after the prompt: of n tokens, ⌈keep n⌉ stay, with their positions, and what is generated is added.

        Evicted(keep=0.2, proxy=32, random=0.06)

    The last `proxy` tokens stay. Of the others stay `random` n, drawn by softmax(F), and those with the largest F, as
    many as there is room for; F is what the proxies read of a token (`ops.proxy_scores`), plus `write_weight` times
    what DeltaFormer's write compares of it. Each layer chooses for itself. A prompt of at most `proxy` tokens stays
    whole. keep = 1: all stay, and nothing is done.

    Raises ValueError or TypeError, naming the argument.
    """

    keep: float
    proxy: int = 32
    random: float = 0.0
    write_weight: float = 0.0

    def __post_init__(self):
        if not 0 < number("keep", self.keep, "a share above 0, at most 1 (all tokens)") <= 1:
            raise ValueError(f"keep = {self.keep}: give a share above 0, at most 1 (all tokens)")
        object.__setattr__(self, "proxy", whole("proxy", self.proxy, 1))
        if not 0 <= number("random", self.random, "a share of the prompt") <= self.keep:
            raise ValueError(f"random = {self.random}: give a share of the prompt from 0 to keep = {self.keep}")
        if not 0 <= number("write_weight", self.write_weight, "0 or more") < math.inf:
            raise ValueError(f"write_weight = {self.write_weight}: give 0 or more")

    def counts(self, length: int) -> tuple[int, int]:
        """(how many of a prompt's `length` tokens stay, how many of these are drawn)."""
        share = lambda part: round(part * length, 6)  # else 0.1 · 30 would be more than 3
        kept = max(math.ceil(share(self.keep)), min(length, self.proxy))
        return kept, min(round(share(self.random)), kept - min(length, self.proxy))


def separator_ids(tokenizer: Tokenizer, characters: str | None = None) -> tuple[int, ...]:
    """The ids whose text consists of these characters only; None: the default of `Streaming.characters`.

    Raises ValueError if there is none.
    """
    if characters is None:
        characters = OF_BYTES if tokenizer.kind == "bytes" else PAPERS
    ids = tuple(tokens_of(characters, tokenizer))
    if not ids:
        raise ValueError(
            f"separators: the tokenizer has no token that consists of {characters!r} only; give other characters"
        )
    return ids


def resolved(cache: Streaming | Evicted | None, model: LanguageModel, tokenizer: Tokenizer | None, vocabulary: int):
    """`cache` with the ids of its separators in `characters`; None where it would do nothing. Raises ValueError or
    TypeError for what this model or tokenizer cannot serve."""
    if cache is None:
        return None
    if not isinstance(cache, Streaming | Evicted):
        raise TypeError(f"cache = {cache!r:.60}: give a Streaming or an Evicted of deltaformer_jax.decoding")
    if not any(chooses(model)):
        raise ValueError(
            "cache: no layer of this model has a cache that grows with the text (softmax_attention or delta_former "
            "without a window), so there is nothing to drop"
        )
    if isinstance(cache, Streaming):
        characters = cache.characters
        if characters is None or isinstance(characters, str):
            if tokenizer is None:
                raise ValueError("cache: separators are looked up in the tokenizer; give tokenizer=, or their ids")
            characters = separator_ids(tokenizer, characters)
        ids = [whole("cache: characters", i, 0, f"ids from 0 to {vocabulary - 1}", vocabulary) for i in characters]
        return dataclasses.replace(cache, characters=tuple(ids))
    for block, chosen in zip(model.blocks, chooses(model)):
        if chosen:
            _check_compared(block.mixer, cache.write_weight)
    return None if cache.keep == 1 else cache


def _check_compared(mixer: Any, write_weight: float) -> None:
    name = type(mixer).__name__
    if getattr(mixer, "position_bias", None) is not None or getattr(mixer, "read_bias", None) is not None:
        raise ValueError(f"keep: the scores of {name} have a position bias (model.position_bias), which proxies lack")
    if mixer.read_similarity != Softmax():
        raise ValueError(f"keep: the read of {name} is not softmax, so that its proxies have no shares to sum")
    if write_weight and hasattr(mixer, "write_similarity") and mixer.write_similarity != Softmax():
        raise ValueError(f"write_weight = {write_weight}: the write of {name} is not softmax; give 0")


def chooses(model: LanguageModel) -> list[bool]:
    """For each entry of the pattern, whether its cache grows with the text and its mixer can drop entries."""
    return [
        hasattr(block.mixer, "in_places") and getattr(block.mixer, "window", None) is None for block in model.blocks
    ]


def needs_whole_prompts(model: LanguageModel, length: int) -> bool:
    """Whether a layer that drops nothing of texts of `length` tokens has a slot for each token, as it does behind a
    window with first tokens or separators, and in `delta_former` with any window."""
    caches = jax.eval_shape(lambda: model.init_cache(1, length))
    others = [cache.memory for cache, chosen in zip(caches, chooses(model)) if not chosen and hasattr(cache, "memory")]
    return any(memory is not None and memory.capacity >= length for memory in others)


def empty_cache(model: LanguageModel, rows: int, capacity: int, rule: Streaming | Evicted | None):
    """Empty caches for texts of `capacity` tokens: `model.init_cache(rows, capacity)`, where layers can drop entries of
    chosen tokens; a `Streaming` rule limits them to its own capacity."""
    usual = model.init_cache(rows, capacity)
    if rule is None:
        return usual
    small = model.init_cache(rows, rule.capacity) if isinstance(rule, Streaming) else usual
    return tuple(
        _with_memory(one, jax.vmap(_selected)(one.memory)) if chosen else other
        for one, other, chosen in zip(small, usual, chooses(model))
    )


def _selected(memory):
    kind = ops.SelectedKUCache if isinstance(memory, ops.KUCache) else ops.SelectedKVCache
    return memory if isinstance(memory, kind) else kind.of(memory)


def _with_memory(cache: AttentionCache | ShiftedCache, memory) -> AttentionCache | ShiftedCache:
    if isinstance(cache, ShiftedCache):
        return dataclasses.replace(cache, mixer=_with_memory(cache.mixer, memory))
    return dataclasses.replace(cache, memory=memory)


def _over_selected(function, model: LanguageModel, caches):
    """The caches with `function(mixer, memory)` of each layer's cache of chosen tokens."""

    def one(block, cache, chosen):
        if not chosen:  # a layer with a window may have a cache of chosen tokens too, by a rule of its own
            return cache
        return _with_memory(cache, jax.vmap(lambda block, memory: function(block.mixer, memory))(block, cache.memory))

    return tuple(map(one, model.blocks, caches, chooses(model)))


def with_memories(caches, memories):
    """The caches with other memories, of layers that can drop entries."""
    return tuple(_with_memory(cache, memory) for cache, memory in zip(caches, memories))


def entries(model: LanguageModel, caches) -> jax.Array:
    """int32 [B]: the number of entries in each row, of the layers that drop them; they all have as many."""
    first = caches[chooses(model).index(True)]
    return jnp.sum(first.memory.position[0] >= 0, axis=-1, dtype=jnp.int32)


def marked(model: LanguageModel, caches, tokens, segment_ids, rule: Streaming):
    """The caches, with which of the newest tokens [B, T] are separators."""
    is_separator = jnp.isin(tokens, jnp.asarray(rule.characters, tokens.dtype))
    mark = jax.vmap(lambda memory: ops.newest_lasting(memory, is_separator, segment_ids))
    return tuple(_with_memory(c, mark(c.memory)) if chosen else c for c, chosen in zip(caches, chooses(model)))


def compacted(model: LanguageModel, caches, rule: Streaming):
    """The caches after rows with `rule.capacity` entries dropped those that do not stay; other rows do not change."""

    def one(mixer, memory):
        sizes = dict(initial=rule.initial, separators=rule.separators, window=rule.window, capacity=rule.capacity)
        keep = ops.streaming_entries(memory, **sizes)
        if rule.fold:
            memory = mixer.folded(memory, keep)
        return mixer.in_places(ops.compact_cache(memory, keep))

    return _over_selected(one, model, caches)


def read_in_pieces(model: LanguageModel, tokens, segment_ids, caches, rule: Streaming, **skip):
    """(the final norm's output of each row's last token [B, d_model], the caches) after prompts [B, T], padded on the
    right, of any lengths. What each token sees is what it would see if the tokens came one by one: a row stops where
    its cache is full, and goes on after it was compacted.
    """
    rows, lengths = tokens.shape[0], jnp.sum(segment_ids != 0, axis=1, dtype=jnp.int32)

    def read(state):
        cursor, caches, last = state
        hidden, count, caches = read_piece(model, tokens, lengths, cursor, caches, rule, **skip)
        newest = jnp.take_along_axis(hidden, jnp.maximum(count - 1, 0)[:, None, None], axis=1)[:, 0]
        return cursor + count, caches, jnp.where((count > 0)[:, None], newest, last)

    start = jnp.zeros(rows, jnp.int32), caches, jnp.zeros((rows, model.embedding.d_model), model.embedding.dtype)
    _, caches, last = jax.lax.while_loop(lambda state: jnp.any(state[0] < lengths), read, start)
    return last, caches


def read_piece(model: LanguageModel, tokens, lengths, cursor, caches, rule: Streaming, **skip):
    """(the final norm's output [B, P, d_model], how many tokens each row read int32 [B], the caches) after as many of
    the tokens [B, T] from `cursor` [B] on, up to `lengths` [B], as a row has room for; full rows are compacted before.
    P = min(T, capacity − what stays)."""
    width = tokens.shape[1]
    piece = min(width, rule.capacity - rule.stays)
    place = jnp.arange(piece, dtype=jnp.int32)[None]
    caches = compacted(model, caches, rule)
    count = jnp.minimum(jnp.minimum(lengths - cursor, piece), rule.capacity - entries(model, caches))
    at = jnp.minimum(cursor[:, None] + place, width - 1)
    given, real = jnp.take_along_axis(tokens, at, axis=1), (place < count[:, None]).astype(jnp.int32)
    hidden, caches = model.hidden(given, segment_ids=real, cache=caches, **skip)
    return hidden, count, marked(model, caches, given, real, rule)


def read_and_evict(model: LanguageModel, tokens, segment_ids, total: int, rule: Evicted, counts, keys, **skip):
    """(the final norm's output of each row's last token [B, d_model], caches with `total` slots) after prompts [B, T],
    padded on the right, and their eviction. counts: int32 [2, B], `rule.counts` of the rows; keys [B]: their own."""
    rows, width = tokens.shape
    lengths = jnp.sum(segment_ids != 0, axis=1, dtype=jnp.int32)
    chosen = chooses(model)
    wide, usual = model.init_cache(rows, width), model.init_cache(rows, total)
    caches = tuple(one if grows else other for one, other, grows in zip(wide, usual, chosen))
    behind = max(_behind(block.mixer) for block, grows in zip(model.blocks, chosen) if grows)
    before_end = jnp.arange(-(rule.proxy + behind), 0, dtype=jnp.int32)[None]
    at = lengths[:, None] + before_end
    ids = (at >= 0).astype(jnp.int32)

    def last_inputs(before, after, real):
        place = jnp.sum(real, axis=1, dtype=jnp.int32)[:, None] + before_end
        return jnp.take_along_axis(before, jnp.maximum(place, 0)[:, :, None], axis=1)

    hidden, caches, streams = model.read(tokens, last_inputs, cache=caches, segment_ids=segment_ids, **skip)
    streams = streams.reshape(model.periods, len(model.blocks), *streams.shape[1:])

    def evict(i, block, period, x, memory):
        compared = block.mixer.compared(
            x if block.norms_after else block.mixer_norm(x), segment_ids=ids, positions=jnp.maximum(at, 0)
        )
        query = lambda kind: compared[kind]["query"][:, behind:].astype(memory.key_by_head.dtype)
        scores = ops.proxy_scores(memory, query("read"), scale=1.0)
        if rule.write_weight and "write" in compared:
            scores += rule.write_weight * ops.proxy_scores(memory, query("write"), scale=1.0, strict=True)
        own = jax.vmap(jax.random.fold_in, (0, None))(keys, period * len(chosen) + i)
        keep = ops.entries_by_row(scores, memory, *counts, own, proxies=rule.proxy)
        return ops.compact_cache(memory, keep, capacity=total)

    left = []
    for i, (block, cache) in enumerate(zip(model.blocks, caches)):
        if chosen[i]:
            numbers = jnp.arange(model.periods, dtype=jnp.int32)
            given = block, numbers, streams[:, i], cache.memory
            memory = jax.lax.map(lambda given, i=i: evict(i, *given), given)
            cache = _with_memory(cache, memory)
        left.append(cache)
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    return last, tuple(left)


def _behind(mixer: Any) -> int:
    """How many tokens before its own a read or write query depends on; DeltaFormer's write query may be its key."""
    convolutions, shift = mixer.inputs.convolutions, mixer.inputs.shift
    return (0 if convolutions is None else convolutions[0].width - 1) + (0 if shift is None else shift.window - 1)
