"""The layers of a model that a rule concerns: whether they can serve it, and their caches."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from deltaformer_jax import ops
from deltaformer_jax.data import Tokenizer
from deltaformer_jax.decoding.chosen.rules import Evicted, Streaming, separator_ids
from deltaformer_jax.decoding.requests import whole
from deltaformer_jax.layers.caches import AttentionCache
from deltaformer_jax.layers.feed_forward.shift_editor import ShiftedCache
from deltaformer_jax.model import LanguageModel
from deltaformer_jax.ops.common.similarity import Softmax


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
    apart = isinstance(rule, Evicted) and rule.by_head
    selected = (lambda memory: _selected(memory).apart()) if apart else _selected
    return tuple(
        with_memory(one, jax.vmap(selected)(one.memory)) if chosen else other
        for one, other, chosen in zip(small, usual, chooses(model))
    )


def _selected(memory):
    kind = ops.SelectedKUCache if isinstance(memory, ops.KUCache) else ops.SelectedKVCache
    return memory if isinstance(memory, kind) else kind.of(memory)


def with_memory(cache: AttentionCache | ShiftedCache, memory) -> AttentionCache | ShiftedCache:
    if isinstance(cache, ShiftedCache):
        return dataclasses.replace(cache, mixer=with_memory(cache.mixer, memory))
    return dataclasses.replace(cache, memory=memory)


def over_chosen(function, model: LanguageModel, caches):
    """The caches with `function(mixer, memory)` of each layer's cache of chosen tokens."""

    def one(block, cache, chosen):
        if not chosen:  # a layer with a window may have a cache of chosen tokens too, by a rule of its own
            return cache
        return with_memory(cache, jax.vmap(lambda block, memory: function(block.mixer, memory))(block, cache.memory))

    return tuple(map(one, model.blocks, caches, chooses(model)))


def with_memories(caches, memories):
    """The caches with other memories, of layers that can drop entries."""
    return tuple(with_memory(cache, memory) for cache, memory in zip(caches, memories))
