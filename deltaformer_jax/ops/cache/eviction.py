"""Which entries of a cache to keep: after a prompt, by what its last tokens read (NACL), and in an endless text, by a
fixed rule (SepLLM).

    F_n = Σ_{p ∈ P} Σ_h softmax_n(scale · q_ph·k_n),        kept = P ∪ top(F, C) ∪ C' others drawn by softmax(F)

P, the proxies, are the last tokens of the prompt, often its question. `compact_cache` makes the cache of the kept
entries. Unlike the eviction of `visible_entries`, these change the outputs that follow.

Source: Chen et al., NACL, arXiv 2408.03675; Chen et al., SepLLM, arXiv 2412.12094.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from deltaformer_jax.ops.cache.caches import KUCache, KVCache, Selected, heads_apart, over_heads, slot_positions
from deltaformer_jax.ops.common import checks
from deltaformer_jax.ops.common.compiled import compiled
from deltaformer_jax.ops.common.similarity import Softmax, row_weights
from deltaformer_jax.ops.common.tiles import accumulation_dtype


def proxy_scores(
    cache: KUCache | KVCache,
    query: jax.Array,
    *,
    scale: float | None = None,
    strict: bool = False,
    by_head: bool = False,
) -> jax.Array:
    """How much the last tokens of a cache read of each of its entries.

        F_n = Σ_p Σ_h softmax_n(scale · q_ph·k_n + D_pn),      n filled and position_n ≤ position_p

    D is the sum of the log decays between the two tokens in a cache that has them, else 0. With `strict`, position_n <
    position_p. So of DeltaFormer's write queries it is what these tokens would still correct; add it, times a factor of
    your own.

    Args:
      cache: after these tokens, a KUCache or KVCache of G key heads.
      query: [B, P, H, K], the queries of the last P tokens in the cache, H a multiple of G.
      scale: multiplies q·k; None means K ** -0.5.
      strict: a token does not see itself.
      by_head: F of each key head by itself, the sum over the H / G query heads of its group. Where the cache's heads
        keep entries of their own it must be True.

    Returns F [B, N], or [B, N, G] by head, in float32 (float64 for float64), 0 at empty slots; it sums to P · H in a
    row with P tokens, P · H / G in a head.
    Raises ValueError, TypeError: a shape or dtype that does not fit. Cost: 2 P N K H B floating-point operations.
    Source: Chen et al., NACL, arXiv 2408.03675; there the sum is by head.
    """
    if not isinstance(cache, KUCache | KVCache):
        raise TypeError(f"cache must be a KUCache or a KVCache, not {type(cache).__name__}")
    checks.check_tokens("query", query)
    batch, heads, _, width = cache.key_by_head.shape
    if query.shape[0] != batch or query.shape[3] != width:
        raise ValueError(
            f"query has shape {tuple(query.shape)}: for this cache it must be [{batch}, tokens, heads, {width}]"
        )
    checks.check_multiple("query", query.shape[2], heads)
    if not by_head and heads_apart(cache):
        raise ValueError("by_head=False: each head of this cache keeps entries of its own; give by_head=True")
    scores = _scores_by_head if by_head else _scores
    return scores(checks.check_scale("scale", scale, width), bool(strict), cache, query)


@compiled(2)
def _scores(scale, strict, cache, query):
    batch, time, heads, width = query.shape
    wide = accumulation_dtype(query.dtype)
    groups = cache.key_by_head.shape[1]
    rows = query.astype(wide).reshape(batch, time, groups, heads // groups, width)
    scores = jnp.einsum("btgrk,bgnk->bgrtn", rows, cache.key_by_head.astype(wide), precision=lax.Precision.HIGHEST)
    position = slot_positions(cache)[:, None, :]
    token = cache.length[:, None] - time + jnp.arange(time, dtype=jnp.int32)[None]
    visible = (position >= 0) & (position <= token[:, :, None] - int(strict))
    scores = scores * scale
    if (decay := getattr(cache, "decay_by_head", None)) is not None:
        own = position == token[:, :, None]  # a token's own slot has the decays after it
        after = jnp.sum(jnp.where(own[:, None], decay[:, :, None], 0.0), axis=-1, keepdims=True)
        apart = decay[:, :, None] - after
        scores += apart.reshape(batch, groups, heads // groups, time, -1).astype(wide)
    weights = row_weights(Softmax(), scores, jnp.broadcast_to(visible[:, None, None], scores.shape))
    return jnp.sum(weights, axis=(1, 2, 3))


@compiled(2)
def _scores_by_head(scale, strict, cache, query):
    groups = cache.key_by_head.shape[1]
    query = query.reshape(*query.shape[:2], groups, -1, query.shape[3])
    return over_heads(lambda one, query: _scores(scale, strict, one, query), cache, query)


def select_entries(
    scores: jax.Array,
    n_top: int,
    n_random: int = 0,
    key: jax.Array | None = None,
    *,
    proxies: int = 0,
    cache: KUCache | KVCache | None = None,
) -> jax.Array:
    """The slots to keep: the last `proxies` tokens, the `n_top` best of the others, and `n_random` more.

        kept = P ∪ T ∪ R,     T = top of F without P,     R drawn from softmax(F) without P ∪ T, none twice

    Args:
      scores: F [B, N], floats, for example `proxy_scores`. F [B, N, G]: each head chooses for itself, and draws by a
        key of its own.
      n_top, n_random, proxies: how many slots, each at least 0, together at least 1.
      key: a `jax.random` key, needed for n_random > 0. One seed gives one choice, on any number of devices.
      cache: says which slots are filled and which tokens are last. None: all are filled, in order.

    Returns:
      int32 [B, n], or [B, n, G], in ascending order and none twice, for `compact_cache`. n = proxies + n_top +
      n_random, or N if that is less: then all slots. Of a row with fewer than n filled slots, all of these and some
      empty ones.

    Raises ValueError, TypeError: a size, shape or dtype that does not fit; n_random without a key.
    Cost: three sorts of N numbers per row, or per head.
    Source: Chen et al., NACL, arXiv 2408.03675; drawn as in Kool et al., arXiv 1903.06059: the largest of F plus Gumbel
    noise.
    """
    for name, count in (("n_top", n_top), ("n_random", n_random), ("proxies", proxies)):
        if not isinstance(count, (int, np.integer)) or isinstance(count, bool) or count < 0:
            raise ValueError(f"{name}={count!r}: it must be an integer of at least 0")
    if not n_top + n_random + proxies:
        raise ValueError("n_top, n_random and proxies are all 0: at least one entry must be kept")
    if not hasattr(scores, "ndim") or scores.ndim not in (2, 3):
        found = tuple(scores.shape) if hasattr(scores, "shape") else type(scores).__name__
        raise ValueError(f"scores must have shape [batch, slots] or [batch, slots, heads]; it has {found}")
    checks.check_float("scores", scores.dtype)
    if cache is not None:
        _check_scores(scores, cache)
    if n_random and key is None:
        raise ValueError(f"n_random={n_random} needs a key: give key=jax.random.key(seed)")
    if n_random:
        _check_key(key)
    select = _select_by_head if scores.ndim == 3 else _select
    return select(int(n_top), int(n_random), int(proxies), scores, key if n_random else None, cache)


def _check_key(key):
    try:
        jax.eval_shape(jax.random.fold_in, key, 0)
    except (TypeError, ValueError):
        found = f"an array of shape {tuple(key.shape)}" if hasattr(key, "shape") else type(key).__name__
        raise TypeError(f"key must be one key, key=jax.random.key(seed), not {found}") from None


def _check_scores(scores, cache):
    batch, heads = cache.key_by_head.shape[:2]
    by_head = scores.ndim == 3 or heads_apart(cache)
    slots = (batch, cache.capacity, heads) if by_head else (batch, cache.capacity)
    if tuple(scores.shape) != slots:
        raise ValueError(f"scores have shape {tuple(scores.shape)} but the cache's slots are {slots}")


@compiled(3)
def _select_by_head(n_top, n_random, proxies, scores, key, cache):
    """`_select` of each head of scores [B, N, G], by keys of their own."""
    one = lambda cache, scores, key: _select(n_top, n_random, proxies, scores, key, cache)
    keys = None if key is None else _keys_by_head(key, scores.shape[2])
    if cache is None:
        return jax.vmap(functools.partial(one, None), (2, 0), 2)(scores, keys)
    return over_heads(one, cache, scores, keys, in_axes=(2, 0))


def _keys_by_head(key, heads):
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(heads, dtype=jnp.int32))


@compiled(3)
def _select(n_top, n_random, proxies, scores, key, cache):
    batch, slots = scores.shape
    scores = scores.astype(accumulation_dtype(scores.dtype))
    if cache is None:
        position = jnp.broadcast_to(jnp.arange(slots, dtype=jnp.int32), scores.shape)
        length = jnp.full((batch, 1), slots, jnp.int32)
    else:
        position, length = slot_positions(cache), cache.length[:, None]
    # −∞ for empty slots and for what is chosen already, so that they come last.
    rank = jnp.where(position >= 0, scores, -jnp.inf)
    best = jnp.where((position >= 0) & (position >= length - proxies), jnp.inf, rank)
    chosen = _mark(best, min(slots, proxies + n_top))
    if n_random:
        noisy = rank + jax.random.gumbel(key, rank.shape, rank.dtype)
        more = min(slots, proxies + n_top + n_random)
        chosen = _mark(jnp.where(chosen, jnp.inf, noisy), more)
    count = min(slots, proxies + n_top + n_random)
    return jnp.sort(lax.top_k(chosen.astype(jnp.int32), count)[1], axis=1)


def _mark(rank, count):
    """bool [B, N]: the `count` largest of each row; of equal ones, those with the smaller index."""
    row = jnp.arange(rank.shape[0], dtype=jnp.int32)[:, None]
    return jnp.zeros(rank.shape, bool).at[row, lax.top_k(rank, count)[1]].set(True)


def entries_by_row(
    scores: jax.Array,
    cache: KUCache | KVCache,
    kept: jax.Array,
    drawn: jax.Array,
    keys: jax.Array,
    *,
    proxies: int,
) -> jax.Array:
    """The slots to keep where each row keeps its own number of them: `select_entries` of each row.

        kept_b = min(n_b, proxies) + top + drawn_b,       top ≥ 0 is what is left of kept_b

    Args:
      scores: F [B, N], floats; or F [B, N, G]: each head of a row chooses for itself, as many as the others.
      cache: says which slots are filled and which tokens are last.
      kept, drawn: int32 [B]: how many in all, and how many of them are drawn. The proxies come first, then what is
        drawn, and the top is what is left. kept of at least the filled slots: all of them.
      keys: `jax.random` keys [B]. A row's draw depends on its own key and scores, not on the other rows, and a head's
        on its number too.

    Returns bool [B, N], or [B, N, G], for `compact_cache`. Raises ValueError for scores that do not fit the cache.
    Cost: two sorts of N numbers per row, or per head. Source: as for `select_entries`.
    """
    _check_scores(scores, cache)
    if scores.ndim == 3:
        one = lambda cache, scores, keys: entries_by_row(scores, cache, kept, drawn, keys, proxies=proxies)
        own = jax.vmap(_keys_by_head, (0, None))(keys, scores.shape[2])
        return over_heads(one, cache, scores, own, in_axes=(2, 1))
    position = slot_positions(cache)
    filled = position >= 0
    rank = jnp.where(filled, scores.astype(accumulation_dtype(scores.dtype)), -jnp.inf)
    last = filled & (position >= cache.length[:, None] - proxies)
    held = jnp.sum(last, axis=1, dtype=jnp.int32)
    drawn = jnp.clip(drawn, 0, jnp.maximum(kept - held, 0))
    chosen = _largest(jnp.where(last, jnp.inf, rank), jnp.maximum(kept - drawn, held))
    noise = jax.vmap(lambda key: jax.random.gumbel(key, rank.shape[1:], rank.dtype))(keys)
    return filled & _largest(jnp.where(chosen, jnp.inf, rank + noise), jnp.maximum(kept, held))


def _largest(rank, count):
    """bool [B, N]: the count_b largest of each row; of equal ones, those with the smaller index."""
    order = jnp.argsort(-rank, axis=1, stable=True)
    place = jnp.arange(rank.shape[1], dtype=jnp.int32)[None]
    row = jnp.arange(rank.shape[0], dtype=jnp.int32)[:, None]
    return jnp.zeros(rank.shape, bool).at[row, order].set(place < count[:, None])


def streaming_entries(cache, *, initial: int, separators: int, window: int, capacity: int) -> jax.Array:
    """The slots of a streaming cache to keep before the next token: all until `capacity` of them are filled, and then

        the first `initial` tokens, the last `window` tokens, and of those that last between them the last `separators`

    The entries of an endless text so go up and down between initial + separators + window and `capacity`; their mean is
    half the sum of the two.

    Args:
      cache: a SelectedKUCache or SelectedKVCache. Its tokens that last were given as `keep`, in calls without a window,
        so that a token sees all entries there are.
      initial, separators: at least 0. window, capacity: at least 1, and initial + separators + window < capacity.

    Returns bool [B, N], or [B, N, G] where heads are apart, for `compact_cache`. Raises ValueError, TypeError: another
    cache, or sizes that do not fit. Source: Chen et al., SepLLM, arXiv 2412.12094, eq. 3. There the tokens are numbered
    by their places in the cache: `in_places`.
    """
    if not isinstance(cache, Selected):
        raise TypeError(f"cache must be a SelectedKUCache or a SelectedKVCache, not {type(cache).__name__}")
    for name, count, least in (("initial", initial, 0), ("separators", separators, 0), ("window", window, 1)):
        if not isinstance(count, (int, np.integer)) or isinstance(count, bool) or count < least:
            raise ValueError(f"{name}={count!r}: it must be an integer of at least {least}")
    checks.check_count("capacity", capacity)
    if not initial + separators + window < capacity <= cache.capacity:
        raise ValueError(
            f"capacity={capacity}: it must be greater than initial + separators + window = "
            f"{initial + separators + window} and at most the cache's {cache.capacity} slots"
        )
    if cache.heads_apart:
        sizes = dict(initial=initial, separators=separators, window=window, capacity=capacity)
        return over_heads(lambda one: streaming_entries(one, **sizes), cache)
    filled = cache.position >= 0
    recent = cache.length[:, None] - cache.position <= window
    older = filled & cache.lasting & ~recent & (cache.position >= initial)
    newer = lax.cumsum(older.astype(jnp.int32), axis=1, reverse=True)  # slots are in the order of their positions
    kept = filled & ((cache.position < initial) | recent | (older & (newer <= separators)))
    return jnp.where((cache.entries < capacity)[:, None], filled, kept)
