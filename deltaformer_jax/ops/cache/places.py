"""Caches whose entries are numbered by their places, and what is said of the newest entries afterwards.

An endless text has ever larger positions, which a model was not trained on. A streaming cache therefore gives its
entries, each time some are dropped, the positions 0, 1, 2, … again. Keys that a rotary embedding turned by the old
positions are turned by the difference: rotations compose.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from deltaformer_jax.ops.cache.caches import Selected, SelectedKUCache, SelectedKVCache, check_together, over_heads


def in_places(
    cache: SelectedKUCache | SelectedKVCache,
    turn: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
    slopes: jax.Array | None = None,
) -> SelectedKUCache | SelectedKVCache:
    """The cache with its entries numbered by their places.

        k_n -> turn(k_n, n − position_n),     position_n -> n,     length -> number of entries

    The next token's position is the number of entries. Where nothing was dropped, nothing changes, bit for bit.

    Args:
      turn: (keys [B, N, G, K], int32 [B, N]) -> keys moved by so many positions: one more rotation where keys are
        rotated. None: keys do not depend on positions.
      slopes: [H], of scores that fall by `slope` for each position of distance (ALiBi) and stand in the cache's decay;
        None: there are none. What a trained gate forgot stays forgotten.

    Raises TypeError for another cache. Cost: one pass over the keys.
    Error: `turn` rounds to the cache's dtype, each time an entry moves.
    Source: Xiao et al., arXiv 2309.17453, section 3.2; Chen et al., SepLLM, arXiv 2412.12094.
    """
    _check(cache)
    check_together(cache, "in_places")  # with other numbers of entries the heads would have other next positions
    filled = cache.position >= 0
    place = jnp.where(filled, jnp.arange(cache.capacity, dtype=jnp.int32)[None], -1)
    by, entries, arrays = jnp.where(filled, place - cache.position, 0), cache.entries, {}
    if turn is not None:
        key = cache.key
        moved = jnp.where((by != 0)[:, :, None, None], turn(key, by).astype(key.dtype), key)
        arrays["key_by_head"] = moved.swapaxes(1, 2)
    if slopes is not None:
        nearer = jnp.where(filled, (cache.length - entries)[:, None] + by, 0)  # old distance − new distance
        decay = cache.decay_by_head
        arrays["decay_by_head"] = decay + slopes.astype(decay.dtype)[None, :, None] * nearer[:, None].astype(
            decay.dtype
        )
    return cache.with_arrays(**arrays, position=place, length=entries)


def newest_lasting(
    cache: SelectedKUCache | SelectedKVCache, lasting: jax.Array, segment_ids: jax.Array | None = None
) -> SelectedKUCache | SelectedKVCache:
    """The cache after it took T tokens, with their `lasting`, bool [B, T]; segment_ids as in the call that took them.

    It is what `keep` of that call would have stored, for callers who cannot give it one.
    Raises ValueError, TypeError: another cache, a shape or dtype that does not fit.
    """
    _check(cache)
    batch = cache.position.shape[0]
    if lasting.ndim != 2 or lasting.shape[0] != batch or lasting.dtype != bool:
        raise ValueError(f"lasting must be bools [{batch}, tokens]; it is {lasting.dtype}{list(lasting.shape)}")
    real = jnp.ones(lasting.shape, bool) if segment_ids is None else segment_ids != 0
    mark = lambda one: _newest_marked(one, lasting, real)
    return cache.with_arrays(lasting=over_heads(mark, cache) if cache.heads_apart else mark(cache))


def _newest_marked(cache, lasting, real):
    """The cache's `lasting` [B, N] with that of its newest tokens."""
    first = cache.entries - jnp.sum(real, axis=1, dtype=jnp.int32)
    slot = jnp.where(real, first[:, None] + jnp.cumsum(real, axis=1, dtype=jnp.int32) - 1, cache.capacity)
    row = jnp.arange(lasting.shape[0], dtype=jnp.int32)[:, None]
    return cache.lasting.at[row, slot].set(lasting, mode="drop")


def _check(cache):
    if not isinstance(cache, Selected):
        raise TypeError(f"cache must be a SelectedKUCache or a SelectedKVCache, not {type(cache).__name__}")
