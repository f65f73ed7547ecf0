"""One eviction after the prompt, in each layer by itself:

    F_n = what the last `proxy` tokens read of entry n (`ops.proxy_scores`)
    kept = the proxies, `random` of the others drawn by softmax(F), and those with the largest F

With `by_head` in each key head by itself, where F_n is what the queries of its group read.

Source: Chen et al., "NACL", arXiv 2408.03675.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from deltaformer_jax import ops
from deltaformer_jax.decoding.chosen.layers import Slots, chooses, empty_cache, with_memory, without_unseen
from deltaformer_jax.decoding.chosen.rules import Evicted
from deltaformer_jax.model import LanguageModel


def read_and_evict(model: LanguageModel, tokens, segment_ids, slots: Slots, rule: Evicted, counts, keys, **skip):
    """(the final norm's output of each row's last token [B, d_model], caches with `slots`) after prompts [B, T], padded
    on the right, and their eviction. counts: int32 [2, B], `rule.counts` of the rows; keys [B]: their own."""
    rows, width = tokens.shape
    lengths = jnp.sum(segment_ids != 0, axis=1, dtype=jnp.int32)
    chosen = chooses(model)
    caches = empty_cache(model, rows, Slots(slots.text, width, width), None)
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
        read = functools.partial(ops.proxy_scores, memory, scale=1.0, by_head=rule.by_head)
        scores = read(query("read"))
        if rule.write_weight and "write" in compared:
            scores += rule.write_weight * read(query("write"), strict=True)
        own = jax.vmap(jax.random.fold_in, (0, None))(keys, period * len(chosen) + i)
        keep = ops.entries_by_row(scores, memory, *counts, own, proxies=rule.proxy)
        return ops.compact_cache(memory, keep, capacity=slots.chosen)

    left = []
    for i, (block, cache) in enumerate(zip(model.blocks, caches)):
        if chosen[i]:
            numbers = jnp.arange(model.periods, dtype=jnp.int32)
            given = block, numbers, streams[:, i], cache.memory
            memory = jax.lax.map(lambda given, i=i: evict(i, *given), given)
            cache = with_memory(cache, memory)
        left.append(cache)
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    return last, without_unseen(model, left, slots.behind)


def _behind(mixer: Any) -> int:
    """How many tokens before its own a read or write query depends on; DeltaFormer's write query may be its key."""
    convolutions, shift = mixer.inputs.convolutions, mixer.inputs.shift
    return (0 if convolutions is None else convolutions[0].width - 1) + (0 if shift is None else shift.window - 1)
