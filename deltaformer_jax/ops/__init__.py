"""The ops: attention and delta-rule layers as functions of arrays. They use no Flax, no mesh and no config."""

from deltaformer_jax.ops.cache.caches import (
    KUCache,
    KVCache,
    SelectedKUCache,
    SelectedKVCache,
    read_only,
    token_positions,
    written,
)
from deltaformer_jax.ops.cache.compression import compress_cache
from deltaformer_jax.ops.cache.eviction import entries_by_row, proxy_scores, select_entries, streaming_entries
from deltaformer_jax.ops.cache.places import in_places, newest_lasting
from deltaformer_jax.ops.cache.segments import fold_segments
from deltaformer_jax.ops.cache.selection import compact_cache, visible_entries
from deltaformer_jax.ops.common.similarity import Exp, Linear, Relu, Round, SelfAdjust, Softmax
from deltaformer_jax.ops.deltaformer.api import delta_attention, delta_values
from deltaformer_jax.ops.gated.api import gated_delta_rule, gated_linear_attention
from deltaformer_jax.ops.generalized.api import generalized_delta_rule
from deltaformer_jax.ops.position_bias import Alibi, Dape, Fire, Kerple, PositionBias
from deltaformer_jax.ops.shift_mix import shift_mix
from deltaformer_jax.ops.softmax.api import causal_attention

__all__ = [
    "Alibi",
    "Dape",
    "Exp",
    "Fire",
    "KUCache",
    "KVCache",
    "Kerple",
    "Linear",
    "PositionBias",
    "Relu",
    "Round",
    "SelectedKUCache",
    "SelectedKVCache",
    "SelfAdjust",
    "Softmax",
    "causal_attention",
    "compact_cache",
    "compress_cache",
    "delta_attention",
    "delta_values",
    "entries_by_row",
    "fold_segments",
    "gated_delta_rule",
    "gated_linear_attention",
    "generalized_delta_rule",
    "in_places",
    "newest_lasting",
    "proxy_scores",
    "read_only",
    "select_entries",
    "shift_mix",
    "streaming_entries",
    "token_positions",
    "visible_entries",
    "written",
]
