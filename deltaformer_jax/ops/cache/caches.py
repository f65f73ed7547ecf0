"""Caches of past tokens, for prefill and decoding. A cache has a fixed capacity. Each row holds one document and has a
length of its own.

`KUCache` is the cache of DeltaFormer. It holds keys and written values u; v itself is not needed again. With w = k it
is as large as an ordinary KV cache. `KVCache` is the cache of softmax attention. With a window it is a ring buffer:
slot = position mod capacity.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from deltaformer_jax.ops.common.checks import check_count, check_float, check_size, concrete_value
from deltaformer_jax.ops.common.tiles import accumulation_dtype


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class KUCache:
    """DeltaFormer's cache: key [B, N, G, K], value [B, N, Hu, V] (it holds u), length [B] int32.

    N is the capacity. Slots 0 … length − 1 of a row are filled.
    """

    key: jax.Array
    value: jax.Array
    length: jax.Array

    @property
    def capacity(self) -> int:
        return self.key.shape[1]

    @classmethod
    def empty(cls, batch, capacity, key_heads, value_heads, key_dim, value_dim, dtype=jnp.float32) -> KUCache:
        """An empty cache: all zeros, length 0. `value_heads` is Hu, the number of heads of the write query."""
        return cls(*_zeros(batch, capacity, key_heads, value_heads, key_dim, value_dim, dtype))


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class KVCache:
    """Softmax attention's cache: key [B, N, G, K], value [B, N, G, V], length [B] int32, decay [B, N, H] or None.

    `length` counts the tokens stored so far. A token's slot is its position mod N.
    `decay` is needed if the attention has a `log_decay`. For each slot it is the sum of the log decays of all tokens
    after the slot's token, in float32 or float64.
    Without a window, a row can hold at most N tokens. With a window, N ≥ window slots are enough for any number of
    tokens.
    """

    key: jax.Array
    value: jax.Array
    length: jax.Array
    decay: jax.Array | None = None

    @property
    def capacity(self) -> int:
        return self.key.shape[1]

    @classmethod
    def empty(cls, batch, capacity, heads, key_dim, value_dim, dtype=jnp.float32, decay_heads=None) -> KVCache:
        """An empty cache: all zeros, length 0. `decay_heads` is the number of query heads if there is a `log_decay`,
        else None."""
        arrays = _zeros(batch, capacity, heads, heads, key_dim, value_dim, dtype)
        check_size("decay_heads", decay_heads)
        decay = None
        if decay_heads is not None:
            decay = jnp.zeros((batch, capacity, decay_heads), accumulation_dtype(jnp.dtype(dtype)))
        return cls(*arrays, decay)


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
        jnp.zeros((batch, capacity, key_heads, key_dim), dtype),
        jnp.zeros((batch, capacity, value_heads, value_dim), dtype),
        jnp.zeros((batch,), jnp.int32),
    )


def check_cache(cache, kind, key, value_heads, value_dim, decay_heads=None):
    """Raise if `cache` is not a `kind` with the shapes that the other arguments need."""
    if not isinstance(cache, kind):
        raise TypeError(f"cache must be a {kind.__name__}, not {type(cache).__name__}")
    check_float("cache.key", cache.key.dtype)
    check_float("cache.value", cache.value.dtype)
    batch, _, heads, width = key.shape
    expected_key = (batch, cache.capacity, heads, width)
    expected_value = (batch, cache.capacity, value_heads, value_dim)
    if cache.key.shape != expected_key or cache.value.shape != expected_value or cache.length.shape != (batch,):
        raise ValueError(
            f"cache has key {cache.key.shape}, value {cache.value.shape}, length {cache.length.shape}; these arguments "
            f"need key {expected_key}, value {expected_value}, length {(batch,)}: build it with {kind.__name__}.empty"
        )
    decay = getattr(cache, "decay", None)
    expected_decay = None if decay_heads is None else (batch, cache.capacity, decay_heads)
    if (None if decay is None else decay.shape) != expected_decay:
        raise ValueError(
            "cache and log_decay must go together: give log_decay in every call or in none, and build an empty cache "
            f"for it with {kind.__name__}.empty(..., decay_heads=the number of query heads)"
        )


def check_room(cache, segment_ids, time, window=None):
    """Raise if the new tokens do not fit: `time` tokens per row, without padding. The check needs concrete values.
    Under jit it does nothing, and tokens that do not fit are lost without an error."""
    if window is not None and cache.capacity >= window:
        return
    length, ids = concrete_value(cache.length), None if segment_ids is None else concrete_value(segment_ids)
    if length is None or (segment_ids is not None and ids is None):
        return
    new = np.full(length.shape, time) if ids is None else np.sum(ids != 0, axis=1)
    if np.any(length + new > cache.capacity):
        row = int(np.argmax(length + new))
        raise ValueError(
            f"cache is full: row {row} holds {int(length[row])} of {cache.capacity} tokens and this call adds "
            f"{int(new[row])}; build the cache with a larger capacity"
        )


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


def store(cache, key, value, real, log_decay=None):
    """`cache` with the tokens added for which `real` [B, T] is true: key [B, T, G, K], value [B, T, ·, V].

    Slots wrap around: position mod capacity. log_decay: [B, T, H], 0 at padding, if the cache has a `decay`; else None.
    """
    capacity = cache.capacity
    position = cache.length[:, None] + jnp.cumsum(real, axis=1, dtype=jnp.int32) - 1
    length = cache.length + jnp.sum(real, axis=1, dtype=jnp.int32)
    # If several tokens have the same slot, only the last may write. The others, and padding, get the slot `capacity`,
    # which is out of bounds, so that the scatter drops them.
    wanted = real & (position >= length[:, None] - capacity)
    slot = jnp.where(wanted, position % capacity, capacity)
    row = jnp.arange(key.shape[0], dtype=jnp.int32)[:, None]
    put = lambda old, new: old.at[row, slot].set(new.astype(old.dtype), mode="drop")
    more = {}
    if log_decay is not None:
        passed = lax.cumsum(log_decay, axis=1, reverse=True)
        more["decay"] = put(cache.decay + passed[:, :1], passed - log_decay)
    return dataclasses.replace(cache, key=put(cache.key, key), value=put(cache.value, value), length=length, **more)


def slot_positions(cache) -> jax.Array:
    """int32 [B, N]: the position of the token in each slot, negative for an empty slot."""
    slot = jnp.arange(cache.capacity, dtype=jnp.int32)[None, :]
    newest = cache.length[:, None] - 1
    return newest - (newest - slot) % cache.capacity
