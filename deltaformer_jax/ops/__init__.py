"""Functions of arrays: the attention family and the delta rule. No Flax, no mesh, no config."""

from deltaformer_jax.ops.cache import KUCache, KVCache, token_positions
from deltaformer_jax.ops.causal_attention import causal_attention
from deltaformer_jax.ops.compression import compress_cache
from deltaformer_jax.ops.delta_attention import delta_attention, delta_values
from deltaformer_jax.ops.gated_delta_rule import gated_delta_rule
from deltaformer_jax.ops.gated_linear_attention import gated_linear_attention
from deltaformer_jax.ops.shift_mix import shift_mix
from deltaformer_jax.ops.similarity import Exp, Linear, Relu, Round, Softmax

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
    "token_positions",
]
