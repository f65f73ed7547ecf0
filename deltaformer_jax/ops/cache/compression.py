"""Cache compression: replaces a KUCache by a smaller one that holds what a few given keys read out of it."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from deltaformer_jax.ops.cache.caches import Entries, KUCache, check_together, slot_positions, store
from deltaformer_jax.ops.common import checks
from deltaformer_jax.ops.common import heads as H
from deltaformer_jax.ops.common.compiled import compiled
from deltaformer_jax.ops.common.similarity import Similarity, as_similarity, row_weights, with_arrays, without_arrays
from deltaformer_jax.ops.common.tiles import accumulation_dtype


def compress_cache(
    cache: KUCache,
    keys: jax.Array,
    *,
    read_similarity: str | Similarity = "softmax",
    read_scale: float | None = None,
    capacity: int | None = None,
    segment_ids: jax.Array | None = None,
) -> KUCache:
    """Replaces the t entries of a KUCache by n entries (k_j, ṽ_j), the values that n slot keys read out of it.

        ṽ_j = Σ_i κ₂(k_j, k_i) u_i

    Compression is exact under two conditions: later queries read only the slot keys, and reading one slot key returns
    nothing of the other slots. Theorem 1's construction meets them (nearly orthogonal keys, κ₂ rounds). Otherwise
    compression is an approximation; "softmax", for example, mixes the values of the slots. If a memory of n slots is
    compressed every O(n) tokens, its cache needs O(n) entries at any sequence length.

    Letters as in `delta_attention`: G key heads of dimension K; Hu heads of u, a multiple of G, of dimension V.

    Args:
      cache: a KUCache with key [B, N, G, K], value (u) [B, N, Hu, V] and length [B].
      keys: the slot keys: [B, n, G, K], or [n, G, K] for the same keys in every row; cache.key's dtype.
      read_similarity: κ₂, as in `delta_attention`: a name or an object such as Round(decimals=0).
      read_scale: multiplies k_j·k_i; None means K ** -0.5. For keys of unit length use 1.
      capacity: number of slots of the new cache, at least n; None means that of the given cache.
      segment_ids: [B, n] ints, 0 for slot keys that a row does not have; None means that every row has all n.

    Returns:
      A new KUCache of that capacity with the given cache's dtypes. Its length is the number of slot keys of the row.
      Sums are float32 (float64 for float64). A layer's rotary embedding counts positions from the cache's length. To
      continue from the position in the text instead, pass `positions` to the layer.

    Raises:
      ValueError, TypeError: a shape, dtype, name or size that does not fit. The message names the argument.

    Cost: 2 n N (K + V) Hu B floating-point operations; memory: n N Hu B scores.

    Source: Xu et al., "DeltaFormer: unlock the state space of Transformer", NeurIPS 2025, section 3.3.1 and appendix C.
    """
    if not isinstance(cache, KUCache):
        raise TypeError(
            f"cache must be a KUCache, not {type(cache).__name__}: delta_attention(..., cache=) returns one"
        )
    check_together(cache, "compress_cache")
    similarity, arrays = without_arrays(as_similarity(read_similarity, "read_similarity"))
    keys = _checked_keys(cache, keys)
    slots, width = keys.shape[1], keys.shape[3]
    scale = checks.check_scale("read_scale", read_scale, width)
    checks.check_size("capacity", capacity)
    capacity = cache.capacity if capacity is None else capacity
    if capacity < slots:
        raise ValueError(f"capacity={capacity}: it must be at least the number of keys, {slots}")
    segment_ids = checks.as_segment_ids(segment_ids, keys)
    checks.check_one_document(segment_ids)
    return _compress(similarity, scale, capacity, arrays, cache, keys, segment_ids)


@compiled(3)
def _compress(similarity, scale, capacity, arrays, cache, keys, segment_ids):
    similarity = with_arrays(similarity, arrays)
    batch, slots, heads, width = keys.shape
    real = jnp.ones((batch, slots), bool) if segment_ids is None else segment_ids != 0
    clean = jnp.where(real[..., None, None], keys, 0)

    filled = slot_positions(cache) >= 0
    only_filled = lambda x: jnp.where(filled[..., None, None], x, 0)
    wide = accumulation_dtype(cache.key.dtype)
    write_heads = cache.value.shape[2]
    repeat = lambda x: H.repeat_heads(x, write_heads).astype(wide)
    with jax.default_matmul_precision("highest"):
        scores = jnp.einsum("bjhk,bnhk->bhjn", repeat(clean), repeat(only_filled(cache.key))) * scale
        visible = jnp.broadcast_to(filled[:, None, None, :], scores.shape)
        weights = row_weights(similarity, scores, visible)
        read = jnp.einsum("bhjn,bnhv->bjhv", weights, only_filled(cache.value).astype(wide))

    empty = KUCache.empty(batch, capacity, heads, write_heads, width, cache.value.shape[3], cache.key.dtype)
    return store(empty, Entries(clean, read, real))


def _checked_keys(cache: KUCache, keys: jax.Array) -> jax.Array:
    """`keys` checked against the cache and broadcast to [B, n, G, K]."""
    batch, _, heads, width = cache.key.shape
    if not hasattr(keys, "shape") or not hasattr(keys, "dtype"):
        raise TypeError(f"keys must be an array, not {type(keys).__name__}")
    shape = tuple(keys.shape)
    if len(shape) == 3:
        keys = jnp.broadcast_to(keys[None], (batch, *shape))
    if keys.ndim != 4 or keys.shape[1] == 0 or (keys.shape[0], *keys.shape[2:]) != (batch, heads, width):
        raise ValueError(
            f"keys have shape {shape}: to fit the cache they must have shape [batch, slots, heads, width] = "
            f"[{batch}, n, {heads}, {width}], or [n, {heads}, {width}] for the same keys in every row"
        )
    if keys.dtype != cache.key.dtype:
        raise TypeError(f"keys are {keys.dtype} but cache.key is {cache.key.dtype}: cast them to one dtype")
    return jnp.asarray(keys)
