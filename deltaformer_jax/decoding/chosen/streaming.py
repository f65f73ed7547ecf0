"""A streaming cache: full rows drop what does not stay (`ops.streaming_entries`), and number the rest by places.

    kept = the first `initial` tokens, the last `window`, and of the separators between them the last `separators`

A layer behind a window of its own drops by its own first tokens, window and separators. Its entries keep their
positions in the text, unless the rule says `all_places`, so that nothing changes until a separator has to go.

Source: Chen et al., "SepLLM", arXiv 2412.12094, eq. 3; numbering by places: Xiao et al., arXiv 2309.17453, section 3.2.
"""

from __future__ import annotations

import functools
import operator

import jax
import jax.numpy as jnp

from deltaformer_jax import ops
from deltaformer_jax.decoding.chosen.layers import behind_windows, chooses, over_layers
from deltaformer_jax.decoding.chosen.rules import Streaming
from deltaformer_jax.layers.mixers.visible import is_one_of
from deltaformer_jax.model import LanguageModel


def entries(model: LanguageModel, caches) -> jax.Array:
    """int32 [B]: the number of entries in each row, the most of the layers that drop them."""
    drops = map(operator.or_, chooses(model), behind_windows(model))
    # All layers at one place in the pattern have as many.
    each = [jnp.sum(cache.memory.position[0] >= 0, axis=-1) for cache, one in zip(caches, drops) if one]
    return functools.reduce(jnp.maximum, each).astype(jnp.int32)


def marked(model: LanguageModel, caches, tokens, segment_ids, rule: Streaming):
    """The caches, with which of the newest tokens [B, T] are separators. Layers with separators of their own know."""
    separators = is_one_of(tokens, rule.characters)
    mark = lambda _, memory: ops.newest_lasting(memory, separators, segment_ids)
    return over_layers(mark, model, caches, chooses(model))


def compacted(model: LanguageModel, caches, rule: Streaming):
    """The caches after rows with `rule.capacity` entries dropped those that do not stay; other rows do not change."""
    sizes = dict(separators=rule.separators, capacity=rule.capacity)

    def one(mixer, memory):
        keep = ops.streaming_entries(memory, initial=rule.initial, window=rule.window, **sizes)
        if rule.fold:
            memory = mixer.folded(memory, keep)
        return mixer.in_places(ops.compact_cache(memory, keep))

    def behind(mixer, memory):
        keep = ops.streaming_entries(memory, initial=mixer.initial_tokens, window=mixer.window, **sizes)
        memory = ops.compact_cache(memory, keep)
        return mixer.in_places(memory) if rule.all_places else memory

    caches = over_layers(one, model, caches, chooses(model))
    return over_layers(behind, model, caches, behind_windows(model))


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
