"""Flax (nnx) modules: mixers, each `module(x, *, segment_ids, positions, cache) -> (y, cache)`, and their parts."""

from deltaformer_jax.layers.caches import AttentionCache
from deltaformer_jax.layers.feed_forward import SwiGLU
from deltaformer_jax.layers.kv_shift import KVShift, ShiftTail
from deltaformer_jax.layers.mixers.delta_former import DeltaFormer
from deltaformer_jax.layers.mixers.softmax_attention import SoftmaxAttention
from deltaformer_jax.layers.norms import RMSNorm

__all__ = ["AttentionCache", "DeltaFormer", "KVShift", "RMSNorm", "ShiftTail", "SoftmaxAttention", "SwiGLU"]
