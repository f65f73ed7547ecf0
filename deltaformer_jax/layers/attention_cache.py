"""What an attention mixer keeps between calls."""

from __future__ import annotations

import dataclasses

import jax

from deltaformer_jax import ops
from deltaformer_jax.layers.kv_shift import ShiftTail


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionCache:
    """One document per row: the op's memory, and the shift's tail where the mixer shifts keys and values.

    `length` int32 [B] counts the real tokens seen so far.
    """

    memory: ops.KUCache | ops.KVCache
    tail: ShiftTail | None

    @property
    def length(self):
        return self.memory.length
