"""What an attention mixer keeps between calls."""

from __future__ import annotations

import dataclasses

import jax

from deltaformer_jax import ops
from deltaformer_jax.layers.query_key_value import InputTail


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
