"""Flax (nnx) modules: the mixers, called as `mixer(x, *, segment_ids, positions, cache) -> (y, cache)`, and their
parts."""

from deltaformer_jax.layers.caches import AttentionCache, StateCache
from deltaformer_jax.layers.feed_forward import (
    Experts,
    ExpertsFeedForward,
    GeGLU,
    GeluFeedForward,
    MemoryFeedForward,
    ReluFeedForward,
    SquaredReluFeedForward,
    SwiGLU,
)
from deltaformer_jax.layers.feed_forward.shift_editor import ShiftedCache, ShiftEditor
from deltaformer_jax.layers.kv_shift import KVShift, ShiftTail
from deltaformer_jax.layers.mixers import (
    RWKV7,
    DeltaFormer,
    DeltaNet,
    DeltaProduct,
    GatedDeltaNet,
    GatedDeltaNet2,
    GatedDeltaProduct,
    GatedLinearAttention,
    KimiDeltaAttention,
    LinearAttention,
    Retention,
    SoftmaxAttention,
)
from deltaformer_jax.layers.norms import RMSNorm

__all__ = [
    "RWKV7",
    "AttentionCache",
    "DeltaFormer",
    "DeltaNet",
    "DeltaProduct",
    "Experts",
    "ExpertsFeedForward",
    "GatedDeltaNet",
    "GatedDeltaNet2",
    "GatedDeltaProduct",
    "GatedLinearAttention",
    "GeGLU",
    "GeluFeedForward",
    "KVShift",
    "KimiDeltaAttention",
    "LinearAttention",
    "MemoryFeedForward",
    "RMSNorm",
    "ReluFeedForward",
    "Retention",
    "ShiftEditor",
    "ShiftTail",
    "ShiftedCache",
    "SoftmaxAttention",
    "SquaredReluFeedForward",
    "StateCache",
    "SwiGLU",
]
