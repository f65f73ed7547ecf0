"""Flax (nnx) modules: mixers, each `module(x, *, segment_ids, positions, cache) -> (y, cache)`, and their parts."""

from deltaformer_jax.layers.attention_cache import AttentionCache
from deltaformer_jax.layers.delta_former import DeltaFormer
from deltaformer_jax.layers.feed_forward import SwiGLU
from deltaformer_jax.layers.kv_shift import KVShift, ShiftTail
from deltaformer_jax.layers.norms import RMSNorm
from deltaformer_jax.layers.softmax_attention import SoftmaxAttention

__all__ = ["AttentionCache", "DeltaFormer", "KVShift", "RMSNorm", "ShiftTail", "SoftmaxAttention", "SwiGLU"]
