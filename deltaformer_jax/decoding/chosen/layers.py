"""The layers of a model that a rule concerns: whether they can serve it, and their caches.

Three kinds of layers have caches with a slot for each token, unless something is dropped:

* those without a window, of which a rule chooses the entries that stay (`chooses`);
* those with tokens that last behind a window, which drop what they do not see any more (`behind_windows`);
* mixers of a user's own. They keep all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from deltaformer_jax import ops
from deltaformer_jax.data import Tokenizer
from deltaformer_jax.decoding.chosen.rules import Evicted, Streaming, separator_ids
from deltaformer_jax.decoding.requests import whole
from deltaformer_jax.layers.caches import AttentionCache, is_selected
from deltaformer_jax.layers.feed_forward.shift_editor import ShiftedCache
from deltaformer_jax.model import LanguageModel
from deltaformer_jax.ops.cache.caches import as_selected
from deltaformer_jax.ops.common.similarity import Softmax
from deltaformer_jax.ops.position_bias import BIASES


def resolved(cache: Streaming | Evicted | None, model: LanguageModel, tokenizer: Tokenizer | None, vocabulary: int):
    """`cache` with the ids of its separators in `characters`; None where it would do nothing. Raises ValueError or
    TypeError for what this model or tokenizer cannot serve."""
    if cache is None:
        return None
    if not isinstance(cache, Streaming | Evicted):
        raise TypeError(f"cache = {cache!r:.60}: give a Streaming or an Evicted of deltaformer_jax.decoding")
    if isinstance(cache, Evicted) and cache.keep == 1:
        return None
    if not any(chooses(model)) and not (isinstance(cache, Streaming) and any(behind_windows(model))):
        raise ValueError(
            "cache: no layer of this model has a cache that grows with the text (softmax_attention or delta_former "
            "without a window; for a streaming cache also with separators behind it), so there is nothing to choose"
        )
    if isinstance(cache, Streaming):
        _check_sizes(cache, model)
        characters = cache.characters
        if not any(chooses(model)):
            if characters is not None:
                raise ValueError(
                    "separators: all layers of this model have their own (model.separators); leave them out"
                )
            characters = ()
        if characters is None or isinstance(characters, str):
            if tokenizer is None:
                raise ValueError("cache: separators are looked up in the tokenizer; give tokenizer=, or their ids")
            characters = separator_ids(tokenizer, characters)
        ids = [whole("cache: characters", i, 0, f"ids from 0 to {vocabulary - 1}", vocabulary) for i in characters]
        return dataclasses.replace(cache, characters=tuple(ids))
    for block, chosen in zip(model.blocks, chooses(model)):
        if chosen:
            _check_compared(block.mixer, cache.write_weight)
    return cache


def _check_sizes(rule: Streaming, model: LanguageModel) -> None:
    if rule.fold and not any(chooses(model)):
        raise ValueError(
            "cache: fold: every layer of this model has a window, behind which nothing is folded; leave it out"
        )
    if rule.all_places and not any(behind_windows(model)):
        raise ValueError("all_places: no layer of this model has separators behind a window; leave it out")
    for block, behind in zip(model.blocks, behind_windows(model)):
        if behind:
            for name, own in (("initial", "initial_tokens"), ("window", "window")):
                if getattr(rule, name) < (least := getattr(block.mixer, own)):
                    raise ValueError(
                        f"cache: {name} = {getattr(rule, name)}: a layer of this model sees more, {own} = {least}; "
                        f"give at least {least}"
                    )


def _check_compared(mixer: Any, write_weight: float) -> None:
    name = type(mixer).__name__
    if any(getattr(mixer, name, None) is not None for name in BIASES):
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


def behind_windows(model: LanguageModel) -> list[bool]:
    """For each entry of the pattern, whether tokens last behind its window, so that its cache is one of chosen tokens
    by itself."""
    caches = jax.eval_shape(lambda: model.init_cache(1, 1))
    return [is_selected(cache) and block.mixer.window is not None for block, cache in zip(model.blocks, caches)]


@dataclasses.dataclass(frozen=True)
class Slots:
    """How many slots a row's caches have: `chosen` in the layers of `chooses`, `behind` in those of `behind_windows`,
    and `text`, the tokens of the longest text, in others that have one for each token."""

    text: int
    chosen: int
    behind: int

    @classmethod
    def of(cls, rule: Streaming | Evicted | None, text: int) -> Slots:
        """Those of a streaming cache; of others the most that can be needed."""
        return cls(text, *[rule.capacity if isinstance(rule, Streaming) else text] * 2)


def empty_cache(model: LanguageModel, rows: int, slots: Slots, rule: Streaming | Evicted | None):
    """Empty caches with `slots`; with a rule, layers that can drop entries have caches of chosen tokens."""
    usual, chosen, behind = (model.init_cache(rows, count) for count in (slots.text, slots.chosen, slots.behind))
    apart = isinstance(rule, Evicted) and rule.by_head
    selected = (lambda memory: as_selected(memory).apart()) if apart else as_selected
    found = []
    for place, (grows, lasts) in enumerate(zip(chooses(model), behind_windows(model))):
        cache = (chosen if grows else behind if lasts else usual)[place]
        found.append(with_memory(cache, jax.vmap(selected)(cache.memory)) if grows and rule is not None else cache)
    return tuple(found)


def seen_after(model: LanguageModel, prompts: Sequence[Sequence[int]]) -> list[int]:
    """For each prompt the most entries that a layer of `behind_windows` still sees after it; without such a layer its
    length, so that programs do not differ by it."""
    mixers = [block.mixer for block, behind in zip(model.blocks, behind_windows(model)) if behind]

    def seen(mixer, ids):
        index = np.arange(len(ids))
        lasts = (index < mixer.initial_tokens) | np.isin(ids, np.asarray(mixer.separator_tokens, ids.dtype))
        return int(np.sum(lasts | (index > len(ids) - mixer.window)))

    return [max((seen(mixer, np.asarray(ids, np.int64)) for mixer in mixers), default=len(ids)) for ids in prompts]


def without_unseen(model: LanguageModel, caches, capacity: int):
    """The caches of `behind_windows` without what later tokens do not see, in `capacity` slots; the others as given."""

    def one(mixer, memory):
        return ops.compact_cache(memory, ops.visible_entries(memory, mixer.window), capacity=capacity)

    return over_layers(one, model, caches, behind_windows(model))


def with_memory(cache: AttentionCache | ShiftedCache, memory) -> AttentionCache | ShiftedCache:
    if isinstance(cache, ShiftedCache):
        return dataclasses.replace(cache, mixer=with_memory(cache.mixer, memory))
    return dataclasses.replace(cache, memory=memory)


def over_layers(function, model: LanguageModel, caches, which: Sequence[bool]):
    """The caches with `function(mixer, memory)` of the memory of each layer that `which` names."""

    def one(block, cache, named):
        if not named:
            return cache
        return with_memory(cache, jax.vmap(lambda block, memory: function(block.mixer, memory))(block, cache.memory))

    return tuple(map(one, model.blocks, caches, which))


def with_memories(caches, memories):
    """The caches with other memories, of layers that can drop entries."""
    return tuple(with_memory(cache, memory) for cache, memory in zip(caches, memories))
