"""Caches of chosen tokens: which entries later tokens can still see, and a cache without the others.

Visibility only shrinks: an entry that the next token does not see is seen by no later one either. DeltaFormer's write
is masked like its read, so that the u of later tokens do not depend on such an entry. Dropping it therefore changes no
output. Masking the read alone would not do: u would then depend on entries that are gone.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from deltaformer_jax.ops.cache.caches import (
    KUCache,
    KVCache,
    Selected,
    SelectedKUCache,
    SelectedKVCache,
    as_selected,
    heads_apart,
    over_heads,
    slot_positions,
)
from deltaformer_jax.ops.common import checks
from deltaformer_jax.ops.common.compiled import compiled


def visible_entries(cache: KUCache | KVCache, window: int | None) -> jax.Array:
    """The slots whose tokens the next token sees, with the `window` of its call.

        visible_n = n is filled and (next position − position_n < window  or  lasting_n)

    Returns bool [B, N], or [B, N, G] where heads are apart; without a window, all filled slots. Source: as for
    `causal_attention`.
    """
    _check_kind(cache)
    checks.check_size("window", window)
    if heads_apart(cache):
        return over_heads(lambda one: visible_entries(one, window), cache)
    position = slot_positions(cache)
    visible = position >= 0
    if window is not None:
        near = cache.length[:, None] - position < window
        visible &= near | cache.lasting if isinstance(cache, Selected) else near
    return visible


def compact_cache(
    cache: KUCache | KVCache, keep: jax.Array, *, capacity: int | None = None
) -> SelectedKUCache | SelectedKVCache:
    """A cache of the chosen entries, in the order of their positions.

        (k_n, u_n, position_n, lasting_n) for the chosen filled slots n, then empty slots

    An endless text through a cache of fixed size, exactly as without eviction; compact every few tokens:

        out, cache = delta_attention(q, k, v, window=64, initial=4, keep=is_separator, cache=cache)
        cache = compact_cache(cache, visible_entries(cache, 64))

    `length`, and with it the next token's position, does not change, so that windows and rotary embeddings go on as if
    nothing had been dropped. All slots chosen: the same entries.

    With a third axis in `keep`, of the G key heads, each head keeps entries of its own, and position and lasting are
    [B, n, G]. For DeltaFormer an entry is then a key and the u of all write heads that share it. Each head goes on as a
    call with this head alone would. Heads that keep fewer have more empty slots.

    Args:
      cache: a KUCache or KVCache, also one of its `Selected` kinds. Of a ring, the filled slots are put in order.
      keep: bool [B, N], or int [B, n]: slots. A slot given twice counts once; an empty slot is not kept. For each head:
        bool [B, N, G], int [B, n, G]; once heads are apart it must be one of these.
      capacity: number of slots of the new cache; None means N for bools and n for ints.

    Returns:
      SelectedKUCache or SelectedKVCache. In a plain cache no token lasts: with a window, choose `lasting` by
      `SelectedKUCache.of`.

    Raises:
      ValueError, TypeError: a shape, dtype or size that does not fit. If their values are known, also slots outside of
        the cache and more entries than `capacity`; under jit such slots count as empty, and the last entries are lost.

    Cost: a copy of the new cache and a sort of N positions per row, or per head.

    Source: streaming caches of Xiao et al., arXiv 2309.17453, and Chen et al., SepLLM, arXiv 2412.12094. That eviction
    is exact for DeltaFormer if write and read are both masked is this project's.
    """
    _check_kind(cache)
    checks.check_size("capacity", capacity)
    batch, heads = cache.key_by_head.shape[:2]
    by_head = heads_apart(cache) or getattr(keep, "ndim", 2) == 3
    shape, slots, own = (batch, cache.capacity), f"[{batch}, n]", ()
    if by_head:
        shape, slots, own = (*shape, heads), f"[{batch}, n, {heads}]", (heads,)
    if not hasattr(keep, "shape") or keep.ndim != len(shape) or (keep.shape[0], *keep.shape[2:]) != (batch, *own):
        found = tuple(keep.shape) if hasattr(keep, "shape") else type(keep).__name__
        raise ValueError(f"keep must be bools {shape} or slots {slots}; it has {found}")
    if keep.dtype == bool:
        if tuple(keep.shape) != shape:
            named = "[batch, slots, heads]" if by_head else "[batch, slots]"
            raise ValueError(f"keep must have shape {named} = {shape}; it has {tuple(keep.shape)}")
        capacity = cache.capacity if capacity is None else capacity
    elif jnp.issubdtype(keep.dtype, jnp.integer):
        values = checks.concrete_value(keep)
        if values is not None and np.any((values < 0) | (values >= cache.capacity)):
            raise ValueError(f"keep names a slot outside of 0 … {cache.capacity - 1}, those that the cache has")
        capacity = keep.shape[1] if capacity is None else capacity
    else:
        raise TypeError(f"keep has dtype {keep.dtype}: give bools [batch, slots] or the integers of slots")
    _check_fits(cache, keep, capacity)
    return (_compact_by_head if by_head else _compact)(capacity, cache, keep)


def _check_kind(cache):
    if not isinstance(cache, KUCache | KVCache):
        raise TypeError(f"cache must be a KUCache or a KVCache, not {type(cache).__name__}")


def _check_fits(cache, keep, capacity):
    """Raise if a row keeps more entries than `capacity`, where values are known."""
    if capacity >= min(cache.capacity, keep.shape[1]) or checks.concrete_value(cache.length) is None:
        return
    if checks.concrete_value(keep) is not None:
        chosen, one = (over_heads(_chosen, cache, keep), "head") if keep.ndim == 3 else (_chosen(cache, keep), "row")
        most = int(jnp.max(jnp.sum(chosen, axis=1)))
        if most > capacity:
            raise ValueError(f"capacity={capacity}: a {one} keeps {most} entries; give a larger capacity or keep fewer")


def _chosen(cache, keep):
    """bool [B, N]: the filled slots that `keep`, bools or slots, names."""
    if keep.dtype != bool:
        row = jnp.arange(keep.shape[0], dtype=jnp.int32)[:, None]
        slots = jnp.where(keep < 0, cache.capacity, keep)  # else a negative number would count from the end
        keep = jnp.zeros((keep.shape[0], cache.capacity), bool).at[row, slots].set(True, mode="drop")
    return keep & (slot_positions(cache) >= 0)


@compiled(1)
def _compact(capacity, cache, keep):
    cache = as_selected(cache)
    chosen = _chosen(cache, keep)
    last = jnp.iinfo(jnp.int32).max
    order = jnp.argsort(jnp.where(chosen, cache.position, last), axis=1, stable=True)[:, :capacity]
    order = jnp.pad(order, [(0, 0), (0, capacity - order.shape[1])])
    filled = jnp.arange(capacity, dtype=jnp.int32)[None] < jnp.sum(chosen, axis=1, dtype=jnp.int32)[:, None]

    def taken(x, empty, axis=1):
        """The chosen slots of x, whose axis `axis` is that of slots; the others hold `empty`."""
        shape = [order.shape[0], *[1] * (axis - 1), capacity, *[1] * (x.ndim - axis - 1)]
        found = jnp.take_along_axis(x, order.reshape(shape), axis=axis, mode="promise_in_bounds")
        return jnp.where(filled.reshape(shape), found, jnp.asarray(empty, x.dtype))

    arrays = {name: taken(getattr(cache, name), 0, 2) for name in ("key_by_head", "value_by_head")}
    if getattr(cache, "decay_by_head", None) is not None:
        arrays["decay_by_head"] = taken(cache.decay_by_head, 0, 2)
    return cache.with_arrays(**arrays, position=taken(cache.position, -1), lasting=taken(cache.lasting, False))


@compiled(1)
def _compact_by_head(capacity, cache, keep):
    """`_compact` with a `keep` for each head: [B, N, G] or [B, n, G]."""
    cache = as_selected(cache).apart()
    chosen = over_heads(_chosen, cache, keep)
    last = jnp.iinfo(jnp.int32).max
    order = jnp.argsort(jnp.where(chosen, cache.position, last), axis=1, stable=True)[:, :capacity]
    order = jnp.pad(order, [(0, 0), (0, capacity - order.shape[1]), (0, 0)])
    filled = jnp.arange(capacity, dtype=jnp.int32)[None, :, None] < jnp.sum(chosen, axis=1, dtype=jnp.int32)[:, None]

    def taken(x, empty):
        """The chosen slots of x [B, N, G]; the others hold `empty`."""
        found = jnp.take_along_axis(x, order, axis=1, mode="promise_in_bounds")
        return jnp.where(filled, found, jnp.asarray(empty, x.dtype))

    def taken_by_head(x):
        """The chosen slots of x [B, heads, N, …], of G heads or of some for each of the G; the others hold 0."""
        of_head = lambda y: jnp.repeat(y.swapaxes(1, 2), x.shape[1] // y.shape[2], axis=1)
        place, full = (y.reshape(*y.shape, *[1] * (x.ndim - 3)) for y in (of_head(order), of_head(filled)))
        found = jnp.take_along_axis(x, place, axis=2, mode="promise_in_bounds")
        return jnp.where(full, found, jnp.zeros((), x.dtype))

    arrays = {name: taken_by_head(getattr(cache, name)) for name in ("key_by_head", "value_by_head")}
    if getattr(cache, "decay_by_head", None) is not None:
        arrays["decay_by_head"] = taken_by_head(cache.decay_by_head)
    return cache.with_arrays(**arrays, position=taken(cache.position, -1), lasting=taken(cache.lasting, False))
