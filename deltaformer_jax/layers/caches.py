"""The caches of mixers: an attention mixer keeps keys and values between calls, a recurrent mixer its state."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from deltaformer_jax import ops
from deltaformer_jax.layers.query_key_value import InputTail
from deltaformer_jax.ops.common.tiles import accumulation_dtype
from deltaformer_jax.sharding import over_devices


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionCache:
    """The cache of an attention mixer, with one document per row.

    `memory`: the op's cache. `tail`: earlier tokens for the KV shift and the short convolutions of q, k and v.
    `write_tail`: the same for the short convolution of DeltaFormer's projected write queries, if there is one; else
    None. `length` int32 [B]: the number of real tokens seen so far.
    """

    memory: ops.KUCache | ops.KVCache
    tail: InputTail
    write_tail: jax.Array | None = None

    @property
    def length(self):
        return self.memory.length


def is_selected(cache) -> bool:
    """Whether a mixer's cache is one of chosen tokens (`ops.SelectedKUCache`, `ops.SelectedKVCache`)."""
    return isinstance(getattr(cache, "memory", None), ops.SelectedKUCache | ops.SelectedKVCache)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StateCache:
    """The cache of a recurrent mixer, with one document of any length per row.

    `state` [B,Hv,K,V]: the memory, float32 or float64. `tails`: the earlier tokens that the mixer's short convolutions
    need, in the order of q, k, v, or (). `length` int32 [B]: the number of real tokens seen so far.
    """

    state: jax.Array
    tails: tuple[jax.Array, ...]
    length: jax.Array

    @classmethod
    def empty(cls, batch, heads, key_dim, value_dim, tails, dtype) -> StateCache:
        wide = accumulation_dtype(dtype)
        state = jnp.zeros((batch, heads, key_dim, value_dim), wide)
        return cls(state, tails, jnp.zeros((batch,), jnp.int32))

    def after(self, state, tails, segment_ids, tokens) -> StateCache:
        """The cache after a call: the new state and tails, and `length` advanced by the number of real tokens.

        Without `segment_ids` all `tokens` tokens of a row are real.
        """
        count = tokens if segment_ids is None else jnp.sum(segment_ids != 0, axis=1, dtype=jnp.int32)
        return StateCache(state, tails, self.length + count)


def remember(op: Callable, arrays: dict[str, jax.Array | None], cache: StateCache | None, tails):
    """Run a recurrent op, starting from the cache's state if there is a cache: (o [B,T,Hv,V], updated cache or None).

    `op(**arrays)` returns (o, final state). Without a cache the op runs on every device's own rows and heads.
    """
    if cache is None:
        return over_devices(op, arrays), None
    o, state = op(**arrays, initial_state=cache.state)
    return o, cache.after(state, tails, arrays["segment_ids"], o.shape[1])
