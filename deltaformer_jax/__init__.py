"""DeltaFormer and the delta-rule family of attention in JAX. What is exported here is promised; the rest may change."""

from deltaformer_jax.ops import (
    Exp,
    KUCache,
    KVCache,
    Linear,
    Relu,
    Round,
    Softmax,
    causal_attention,
    compress_cache,
    delta_attention,
    delta_values,
    gated_delta_rule,
    gated_linear_attention,
    shift_mix,
)

__version__ = "0.1.0"

__all__ = [
    "Exp",
    "KUCache",
    "KVCache",
    "Linear",
    "Relu",
    "Round",
    "Softmax",
    "causal_attention",
    "compress_cache",
    "delta_attention",
    "delta_values",
    "gated_delta_rule",
    "gated_linear_attention",
    "shift_mix",
]
