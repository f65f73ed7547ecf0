"""A segment's separator takes over what is dropped of the segment: its value becomes what its key reads there."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from deltaformer_jax.ops.cache.caches import Selected, SelectedKUCache, SelectedKVCache, check_together
from deltaformer_jax.ops.common import checks
from deltaformer_jax.ops.common.compiled import compiled
from deltaformer_jax.ops.common.heads import repeat_heads
from deltaformer_jax.ops.common.similarity import Similarity, as_similarity, row_weights, with_arrays, without_arrays
from deltaformer_jax.ops.common.tiles import accumulation_dtype


def fold_segments(
    cache: SelectedKUCache | SelectedKVCache,
    keep: jax.Array,
    *,
    read_similarity: str | Similarity = "softmax",
    read_scale: float | None = None,
) -> SelectedKUCache | SelectedKVCache:
    """Values of the kept entries that last, before the others are dropped:

        ṽ_j = κ₂(k_j, k_j) u_j + Σ_{n ∈ D_j} κ₂(k_j, k_n) u_n        j kept and lasting

    D_j are the entries before j that are not kept, back to the next lasting entry before j, kept or not. A similarity
    that is normalised is so over D_j and j. All other values, those with an empty D_j among them, and all keys stay.
    What follows the last lasting entry is dropped without a trace, and so are segments
    whose separator is not kept.

    It is `compress_cache` within each segment, with its separator's key as the one slot key.

    Args:
      cache: of G key heads and Hu value heads, a multiple of G. Entries are in the order of their positions.
      keep: bool [B, N], for example from `streaming_entries`; give the same to `compact_cache` afterwards.
      read_similarity, read_scale: as in `delta_attention`.

    Returns the cache with the new values. Raises ValueError, TypeError: another cache, a shape or dtype that does not
    fit. Cost: 2 N² (K + V) Hu B floating-point operations and N² Hu B scores.

    Source: this project's, after section 3.3.1 of "DeltaFormer" and SepLLM, arXiv 2412.12094, whose separators are
    trained to carry their segments.
    """
    if not isinstance(cache, Selected):
        raise TypeError(f"cache must be a SelectedKUCache or a SelectedKVCache, not {type(cache).__name__}")
    check_together(cache, "fold_segments")
    if keep.dtype != bool or tuple(keep.shape) != tuple(cache.position.shape):
        raise ValueError(f"keep must be bools {tuple(cache.position.shape)}; it is {keep.dtype}{list(keep.shape)}")
    similarity, arrays = without_arrays(as_similarity(read_similarity, "read_similarity"))
    scale = checks.check_scale("read_scale", read_scale, cache.key_by_head.shape[-1])
    return _fold(similarity, scale, arrays, cache, keep)


@compiled(2)
def _fold(similarity, scale, arrays, cache, keep):
    filled = cache.position >= 0
    ends, dropped = filled & cache.lasting, filled & ~keep
    # The number of the segment that an entry lies in, or ends: of the lasting entries before it.
    segment = lax.cumsum(ends.astype(jnp.int32), axis=1) - ends.astype(jnp.int32)
    among = (segment[:, :, None] == segment[:, None, :]) & dropped[:, None, :]
    changed = ends & keep & jnp.any(among, axis=2)
    visible = among | jnp.eye(cache.capacity, dtype=bool)[None]

    value = cache.value_by_head
    wide = accumulation_dtype(value.dtype)
    key = repeat_heads(cache.key, value.shape[1]).astype(wide)
    with jax.default_matmul_precision("highest"):
        scores = jnp.einsum("bjhk,bnhk->bhjn", key, key) * scale
        weights = row_weights(with_arrays(similarity, arrays), scores, visible[:, None])
        read = jnp.einsum("bhjn,bhnv->bhjv", weights, value.astype(wide))
    folded = jnp.where(changed[:, None, :, None], read.astype(value.dtype), value)
    return cache.with_arrays(value_by_head=folded)
