"""Caches of past tokens, for prefill and decoding. A cache has a fixed capacity. Each row holds one document and has a
length of its own.

`KUCache` is the cache of DeltaFormer. It holds keys and written values u; v itself is not needed again. With w = k it
is as large as an ordinary KV cache. `KVCache` is the cache of softmax attention. With a window both may be ring
buffers: slot = position mod capacity. `SelectedKUCache` and `SelectedKVCache` hold the entries of chosen tokens, with
their positions (`selection.py`).

Arrays are stored by head, [B, heads, N, …]. A decoding step multiplies one head's queries with all of its slots, and
so reads memory in order. The properties `key`, `value` and `decay` are token first, like all arrays of the ops.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from deltaformer_jax.ops.common.checks import as_int32, check_count, check_float, check_size, concrete_value
from deltaformer_jax.ops.common.tiles import accumulation_dtype


class _Cache:
    """A pytree of `key_by_head` [B, G, N, K], `value_by_head` [B, ·, N, V], `length` [B] and what a subclass adds.

    `read_only` is a part of the pytree's structure. Given a cache that is read only, an op returns the `Entries` of the
    new tokens instead of an extended cache. A model scans its layers over such caches, so that none of them is copied,
    and afterwards writes the entries of all layers at once (`written`).
    """

    ARRAYS = ("key_by_head", "value_by_head", "length")

    def __init__(self, key, value, length):
        self.key_by_head, self.value_by_head, self.length = _tokens_second(key), _tokens_second(value), length
        self.read_only = False

    def __init_subclass__(cls):
        names = cls.ARRAYS

        def flatten(cache):
            return [(jax.tree_util.GetAttrKey(name), getattr(cache, name)) for name in names], cache.read_only

        jax.tree_util.register_pytree_with_keys(cls, flatten, lambda read_only, arrays: cls._of(read_only, *arrays))

    @classmethod
    def _of(cls, read_only, *arrays):
        cache = object.__new__(cls)
        cache.read_only = read_only
        for name, array in zip(cls.ARRAYS, arrays):
            setattr(cache, name, array)
        return cache

    def with_arrays(self, **arrays):
        """A cache with some of ARRAYS replaced; `read_only` may be among them."""
        held = {name: getattr(self, name) for name in (*self.ARRAYS, "read_only")} | arrays
        return self._of(held.pop("read_only"), *held.values())

    @property
    def key(self) -> jax.Array:
        return _tokens_second(self.key_by_head)

    @property
    def value(self) -> jax.Array:
        return _tokens_second(self.value_by_head)

    @property
    def capacity(self) -> int:
        return self.key_by_head.shape[-2]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={getattr(self, name)!r}' for name in self.ARRAYS)})"


class KUCache(_Cache):
    """DeltaFormer's cache, KUCache(key, value, length): key [B, N, G, K], value [B, N, Hu, V] (it holds u), length [B]
    int32.

    N is the capacity. A token's slot is its position mod N. With a window, N ≥ window slots are enough for any number
    of tokens, since the write sees no more than the read. Without one, slots 0 … length − 1 of a row are filled.
    """

    @classmethod
    def empty(cls, batch, capacity, key_heads, value_heads, key_dim, value_dim, dtype=jnp.float32) -> KUCache:
        """An empty cache: all zeros, length 0. `value_heads` is Hu, the number of heads of the write query."""
        return cls._of(False, *_zeros(batch, capacity, key_heads, value_heads, key_dim, value_dim, dtype))


class KVCache(_Cache):
    """Softmax attention's cache, KVCache(key, value, length, decay=None): key [B, N, G, K], value [B, N, G, V], length
    [B] int32, decay [B, N, H] or None.

    `length` counts the tokens stored so far. A token's slot is its position mod N.
    `decay` is needed if the attention has a `log_decay`. For each slot it is the sum of the log decays of all tokens
    after the slot's token, in float32 or float64.
    Without a window, a row can hold at most N tokens. With a window, N ≥ window slots are enough for any number of
    tokens.
    """

    ARRAYS = (*_Cache.ARRAYS, "decay_by_head")

    def __init__(self, key, value, length, decay=None):
        super().__init__(key, value, length)
        self.decay_by_head = None if decay is None else decay.swapaxes(-2, -1)

    @property
    def decay(self) -> jax.Array | None:
        return None if self.decay_by_head is None else self.decay_by_head.swapaxes(-2, -1)

    @classmethod
    def empty(cls, batch, capacity, heads, key_dim, value_dim, dtype=jnp.float32, decay_heads=None) -> KVCache:
        """An empty cache: all zeros, length 0. `decay_heads` is the number of query heads if there is a `log_decay`,
        else None."""
        arrays = _zeros(batch, capacity, heads, heads, key_dim, value_dim, dtype)
        check_size("decay_heads", decay_heads)
        decay = None
        if decay_heads is not None:
            decay = jnp.zeros((batch, decay_heads, capacity), accumulation_dtype(jnp.dtype(dtype)))
        return cls._of(False, *arrays, decay)


class Selected:
    """What a cache of chosen tokens adds to KUCache or KVCache: position [B, N] int32, that of each slot's token in its
    document, −1 for an empty slot; lasting [B, N] bool, True for tokens that stay visible behind a window.

    `length` counts all tokens seen, those that have been dropped included: it is the position of the next token. The
    filled slots come first, in the order of their positions. `compact_cache` drops entries.

    Where each of the G heads keeps entries of its own, `heads_apart`, position and lasting are [B, N, G]: slot n of one
    head holds another token than slot n of the next. A new token goes to every head.
    """

    @classmethod
    def empty(cls, *sizes, **named):
        """An empty cache: the arguments are those of KUCache.empty or KVCache.empty."""
        return cls.of(cls.PLAIN.empty(*sizes, **named))

    @classmethod
    def of(cls, cache, lasting=None):
        """A KUCache or KVCache with the positions of its tokens; `lasting` [B, N] bool, None for none of them."""
        arrays = [getattr(cache, name) for name in cls.ARRAYS[:-2]]
        position = jnp.maximum(slot_positions(cache), -1)
        lasting = jnp.zeros(position.shape, bool) if lasting is None else lasting
        return cls._of(cache.read_only, *arrays, position, lasting)

    @property
    def heads_apart(self) -> bool:
        """Whether each head keeps entries of its own."""
        return self.position.ndim == self.length.ndim + 2

    def apart(self):
        """The same cache, with its positions and `lasting` for each head."""
        if self.heads_apart:
            return self
        heads = self.key_by_head.shape[-3]
        each = lambda x: jnp.broadcast_to(x[..., None], (*x.shape, heads))
        return self.with_arrays(position=each(self.position), lasting=each(self.lasting))

    @property
    def entries(self) -> jax.Array:
        """int32 [B], or [B, G] where heads are apart: the number of filled slots."""
        return jnp.sum(self.position >= 0, axis=-2 if self.heads_apart else -1, dtype=jnp.int32)


class SelectedKUCache(Selected, KUCache):
    """A KUCache of chosen tokens, see `Selected`."""

    PLAIN = KUCache
    ARRAYS = (*KUCache.ARRAYS, "position", "lasting")


class SelectedKVCache(Selected, KVCache):
    """A KVCache of chosen tokens, see `Selected`. It is no ring: with a window, too, drop entries to make room."""

    PLAIN = KVCache
    ARRAYS = (*KVCache.ARRAYS, "position", "lasting")


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Entries:
    """What new tokens add to a cache: key [B, T, G, K], value [B, T, ·, V], real [B, T] (False: padding, which is not
    stored), where attention forgets log_decay [B, T, H], 0 at padding, and for a `Selected` cache lasting [B, T]."""

    key: jax.Array
    value: jax.Array
    real: jax.Array
    log_decay: jax.Array | None = None
    lasting: jax.Array | None = None


def _tokens_second(x):
    """[…, heads, N, width] -> […, N, heads, width], and back."""
    return x.swapaxes(-3, -2)


def _zeros(batch, capacity, key_heads, value_heads, key_dim, value_dim, dtype):
    sizes = dict(
        batch=batch,
        capacity=capacity,
        key_heads=key_heads,
        value_heads=value_heads,
        key_dim=key_dim,
        value_dim=value_dim,
    )
    for name, size in sizes.items():
        check_count(name, size)
    check_float("the cache", jnp.dtype(dtype))
    return (
        jnp.zeros((batch, key_heads, capacity, key_dim), dtype),
        jnp.zeros((batch, value_heads, capacity, value_dim), dtype),
        jnp.zeros((batch,), jnp.int32),
    )


def _token_first(shape):
    return (*shape[:-3], shape[-2], shape[-3], shape[-1])


def check_cache(cache, kind, key, value_heads, value_dim, decay_heads=None):
    """`cache` with an int32 length. Raises if it is not a `kind` with the shapes that the other arguments need."""
    if not isinstance(cache, kind):
        raise TypeError(
            f"cache must be a {kind.__name__}, not {type(cache).__name__}: build it with {kind.__name__}.empty"
        )
    if not jnp.issubdtype(cache.length.dtype, jnp.integer):
        raise TypeError(f"cache.length is {cache.length.dtype}: it counts tokens, so give integers [batch]")
    check_float("cache.key", cache.key_by_head.dtype)
    check_float("cache.value", cache.value_by_head.dtype)
    batch, _, heads, width = key.shape
    key_shape, value_shape = (_token_first(x.shape) for x in (cache.key_by_head, cache.value_by_head))
    expected_key = (batch, cache.capacity, heads, width)
    expected_value = (batch, cache.capacity, value_heads, value_dim)
    if key_shape != expected_key or value_shape != expected_value or cache.length.shape != (batch,):
        raise ValueError(
            f"cache has key {key_shape}, value {value_shape}, length {cache.length.shape}; these arguments "
            f"need key {expected_key}, value {expected_value}, length {(batch,)}: build it with {kind.__name__}.empty"
        )
    decay = getattr(cache, "decay_by_head", None)
    expected_decay = None if decay_heads is None else (batch, decay_heads, cache.capacity)
    if (None if decay is None else decay.shape) != expected_decay:
        raise ValueError(
            "cache and log_decay must go together: give log_decay in every call or in none, and build an empty cache "
            f"for it with {kind.__name__}.empty(..., decay_heads=the number of query heads)"
        )
    return cache.with_arrays(length=as_int32(cache.length))


def check_room(cache, segment_ids, time, window=None):
    """Raise if the new tokens do not fit: `time` tokens per row, without padding. The check needs concrete values.
    Under jit it does nothing, and tokens that do not fit are lost without an error."""
    chosen = isinstance(cache, Selected)
    if window is not None and cache.capacity >= window and not chosen:
        return
    held = cache.entries if chosen else cache.length
    length, ids = concrete_value(held), None if segment_ids is None else concrete_value(segment_ids)
    if length is None or (segment_ids is not None and ids is None):
        return
    length = np.max(length, axis=1) if length.ndim == 2 else length  # of the fullest head
    new = np.full(length.shape, time) if ids is None else np.sum(ids != 0, axis=1)
    if np.any(length + new > cache.capacity):
        row = int(np.argmax(length + new))
        raise ValueError(
            f"cache is full: row {row} holds {int(length[row])} of {cache.capacity} tokens and this call adds "
            f"{int(new[row])}; build the cache with a larger capacity"
        )


def check_selected(cache, keep, initial):
    """Raise if `keep` or `initial` are given with a cache that does not say which of its tokens stay visible."""
    if (keep is not None or initial) and not isinstance(cache, Selected):
        kind = f"Selected{type(cache).__name__}"
        raise ValueError(f"keep and initial need a cache of chosen tokens: build it with {kind}.empty or {kind}.of")


def as_selected(cache: KUCache | KVCache) -> SelectedKUCache | SelectedKVCache:
    """`cache` as one of chosen tokens, of which none lasts; a cache of chosen tokens itself."""
    if isinstance(cache, Selected):
        return cache
    return (SelectedKUCache if isinstance(cache, KUCache) else SelectedKVCache).of(cache)


def heads_apart(cache) -> bool:
    """Whether each head of a cache keeps entries of its own."""
    return isinstance(cache, Selected) and cache.heads_apart


def check_together(cache, name):
    """Raise for `name`, which takes no cache whose heads keep entries of their own."""
    if heads_apart(cache):
        raise NotImplementedError(
            f"{name}: each head of the cache keeps entries of its own, by a keep [batch, slots, heads] of "
            "compact_cache; give a cache whose heads keep the same, by a keep [batch, slots]"
        )


def lasting_tokens(keep, initial, segment_ids, batch, length, start=None) -> jax.Array | None:
    """bool [B, T]: the tokens that stay visible behind a window, those of `keep` and the first `initial` of each
    segment. None if there are none. The other arguments are those of `token_positions`."""
    if not initial:
        return keep
    first = token_positions(segment_ids, batch, length, start) < initial
    return first if keep is None else first | keep


def token_positions(segment_ids, batch, length, start=None) -> jax.Array:
    """Positions, int32 [B, T]: each token's index in its own segment, plus `start`.

    segment_ids: [B, T], or None for one segment per row without padding. start: [B], the length of a cache, or None for
    0. Padding gets the position 0 + start.
    """
    if segment_ids is None:
        position = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
    else:
        index = jnp.arange(length, dtype=jnp.int32)[None]
        begins = jnp.concatenate(
            [jnp.ones_like(segment_ids[:, :1], bool), segment_ids[:, 1:] != segment_ids[:, :-1]], axis=1
        )
        position = index - lax.cummax(jnp.where(begins, index, 0), axis=1)
        position = jnp.where(segment_ids != 0, position, 0)
    return position if start is None else position + start[:, None].astype(jnp.int32)


def store(cache, entries: Entries):
    """`cache` with the tokens added for which `entries.real` is true. Slots wrap around: position mod capacity. In a
    `Selected` cache the tokens go to the first empty slots, and those without a slot are lost."""
    if heads_apart(cache):
        return _store_by_head(cache, entries)
    capacity, real = cache.capacity, entries.real
    position = cache.length[:, None] + jnp.cumsum(real, axis=1, dtype=jnp.int32) - 1
    length = cache.length + jnp.sum(real, axis=1, dtype=jnp.int32)
    # If several tokens have the same slot, only the last may write. The others, and padding, get the slot `capacity`,
    # which is out of bounds, so that the scatter drops them.
    if isinstance(cache, Selected):
        place = position + (cache.entries - cache.length)[:, None]
        slot = jnp.where(real, place, capacity)
    else:
        wanted = real & (position >= length[:, None] - capacity)
        slot = jnp.where(wanted, position % capacity, capacity)
    row = jnp.arange(real.shape[0], dtype=jnp.int32)[:, None]
    put = lambda old, new: old.at[row, :, slot].set(new.astype(old.dtype), mode="drop")
    arrays = dict(
        key_by_head=put(cache.key_by_head, entries.key), value_by_head=put(cache.value_by_head, entries.value)
    )
    if entries.log_decay is not None:
        passed = lax.cumsum(entries.log_decay, axis=1, reverse=True)
        arrays["decay_by_head"] = put(cache.decay_by_head + passed[:, 0, :, None], passed - entries.log_decay)
    if isinstance(cache, Selected):
        lasting = jnp.zeros_like(real) if entries.lasting is None else entries.lasting
        arrays["position"] = cache.position.at[row, slot].set(position, mode="drop")
        arrays["lasting"] = cache.lasting.at[row, slot].set(lasting, mode="drop")
    return cache.with_arrays(**arrays, length=length)


def _store_by_head(cache, entries: Entries):
    """`store` where heads are apart: the tokens go to the first empty slots of each head."""
    real, heads = entries.real, cache.position.shape[2]
    index = jnp.cumsum(real, axis=1, dtype=jnp.int32) - 1
    place = index[:, :, None] + cache.entries[:, None]
    slot = jnp.where(real[:, :, None], place, cache.capacity)  # [B, T, G]
    row = jnp.arange(real.shape[0], dtype=jnp.int32)[:, None, None]
    number = lambda count: jnp.arange(count, dtype=jnp.int32)[None, None]

    def put(old, new):
        """old [B, heads, N, …], new [B, T, heads, …]: G heads, or some for each of the G."""
        own = jnp.repeat(slot, old.shape[1] // heads, axis=2)
        return old.at[row, number(old.shape[1]), own].set(new.astype(old.dtype), mode="drop")

    arrays = dict(
        key_by_head=put(cache.key_by_head, entries.key), value_by_head=put(cache.value_by_head, entries.value)
    )
    if entries.log_decay is not None:
        passed = lax.cumsum(entries.log_decay, axis=1, reverse=True)
        arrays["decay_by_head"] = put(cache.decay_by_head + passed[:, 0, :, None], passed - entries.log_decay)
    lasting = jnp.zeros_like(real) if entries.lasting is None else entries.lasting
    mark = lambda old, new: old.at[row, slot, number(heads)].set(new[:, :, None], mode="drop")
    arrays["position"] = mark(cache.position, cache.length[:, None] + index)
    arrays["lasting"] = mark(cache.lasting, lasting)
    return cache.with_arrays(**arrays, length=cache.length + jnp.sum(real, axis=1, dtype=jnp.int32))


def over_heads(function, cache, *arrays, in_axes=2, out_axes=2):
    """`function(cache of one head, *its part of the arrays)` for each of the G heads: the results along a new axis.

    `in_axes` of the arrays and `out_axes` are those of jax.vmap: by default [B, ·, G, …]. A head's cache has its own
    decays and values, several of each where queries or writes are grouped, and, where heads are apart, its own
    positions.
    """
    heads, apart = cache.key_by_head.shape[1], heads_apart(cache)
    axes, parts = {}, {}
    for name in cache.ARRAYS:
        x, axes[name] = getattr(cache, name), None
        if name.endswith("by_head") and x is not None:
            axes[name], parts[name] = 1, x.reshape(x.shape[0], heads, -1, *x.shape[2:])
        elif apart and name in ("position", "lasting"):
            axes[name] = 2
    in_axes = in_axes if isinstance(in_axes, tuple) else (in_axes,) * len(arrays)
    return jax.vmap(function, (cache.with_arrays(**axes), *in_axes), out_axes)(cache.with_arrays(**parts), *arrays)


def read_only(tree: Any) -> Any:
    """`tree` with every cache of an op in it read only."""
    return _over_caches(lambda cache: cache.with_arrays(read_only=True), tree)


def written(before: Any, after: Any, axes: int = 0) -> Any:
    """`after`, what was computed from `read_only(before)`, with every `Entries` in it written into its cache of
    `before`. The arrays of both may lead with `axes` more axes, over layers."""
    put = store
    for _ in range(axes):
        put = jax.vmap(put)

    def one(cache, entries):
        if not isinstance(cache, _Cache):
            return entries
        return put(cache, entries) if isinstance(entries, Entries) else entries.with_arrays(read_only=False)

    return jax.tree.map(one, before, after, is_leaf=_is_cache)


def _is_cache(node: Any) -> bool:
    return isinstance(node, _Cache)


def _over_caches(function, tree):
    return jax.tree.map(lambda node: function(node) if _is_cache(node) else node, tree, is_leaf=_is_cache)


def slot_positions(cache) -> jax.Array:
    """int32 [B, N]: the position of the token in each slot, negative for an empty slot; [B, N, G] where heads are
    apart."""
    if isinstance(cache, Selected):
        return cache.position
    slot = jnp.arange(cache.capacity, dtype=jnp.int32)[None, :]
    newest = cache.length[:, None] - 1
    return newest - (newest - slot) % cache.capacity
