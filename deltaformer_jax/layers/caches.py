"""What mixers keep between calls: an attention mixer its keys and values, a recurrent one its state."""

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
    """One document per row: the op's memory, and what its shift and its short convolutions look back at.

    `write_tail`: of the convolution of DeltaFormer's projected write queries, where it has both. `length` int32 [B]
    counts the real tokens seen so far.
    """

    memory: ops.KUCache | ops.KVCache
    tail: InputTail
    write_tail: jax.Array | None = None

    @property
    def length(self):
        return self.memory.length


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StateCache:
    """One document per row, of any length: the memory itself is all there is to keep.

    state [B,Hv,K,V], float32 or float64; tails: of the mixer's short convolutions, in its own order, or (); length
    int32 [B]: the real tokens seen so far.
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
        """With the new state and tails, `tokens` more in each row, or those whose segment id is not 0."""
        count = tokens if segment_ids is None else jnp.sum(segment_ids != 0, axis=1, dtype=jnp.int32)
        return StateCache(state, tails, self.length + count)


def remember(op: Callable, arrays: dict[str, jax.Array | None], cache: StateCache | None, tails):
    """op(**arrays) -> (o, final state), from the cache's state on: (o [B,T,Hv,V], the cache after it or None)."""
    if cache is None:
        return over_devices(lambda **given: op(**given)[0], arrays), None
    o, state = op(**arrays, initial_state=cache.state)
    return o, cache.after(state, tails, arrays["segment_ids"], o.shape[1])
