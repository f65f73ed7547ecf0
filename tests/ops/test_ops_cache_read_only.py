"""A cache that is only read: the op returns what the new tokens add, and writing that later gives the same cache."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deltaformer_jax import KUCache, KVCache, causal_attention, delta_attention
from deltaformer_jax.ops import read_only, written
from deltaformer_jax.ops.cache.caches import Entries

B, H, G, K, V = 2, 4, 2, 4, 3


def draw(time, seed=0):
    rng = np.random.default_rng(seed)
    query, key, value = (
        jnp.asarray(rng.standard_normal((B, time, heads, width)), jnp.float32)
        for heads, width in ((H, K), (G, K), (G, V))
    )
    return query, key, value, -jnp.asarray(rng.uniform(size=(B, time, H)), jnp.float32)


def forgetting(query, key, value, log_decay, **more):
    return causal_attention(query, key, value, log_decay=log_decay, **more)


OPS = {
    "delta_attention": (lambda q, k, v, g, **more: delta_attention(q, k, v, **more), KUCache.empty(B, 300, G, G, K, V)),
    "w = q": (
        lambda q, k, v, g, **more: delta_attention(q, k, v, write_query="query", **more),
        KUCache.empty(B, 300, G, H, K, V),
    ),
    "causal_attention": (lambda q, k, v, g, **more: causal_attention(q, k, v, **more), KVCache.empty(B, 300, G, K, V)),
    "a ring": (
        lambda q, k, v, g, **more: causal_attention(q, k, v, window=7, **more),
        KVCache.empty(B, 7, G, K, V),
    ),
    "forgetting": (forgetting, KVCache.empty(B, 300, G, K, V, decay_heads=H)),
}


@pytest.mark.parametrize("time", [1, 5, 150])  # 150 tokens are two blocks
@pytest.mark.parametrize("name", OPS)
def test_entries_written_later_are_the_cache(name, time):
    op, cache = OPS[name]
    _, cache = op(*draw(9, seed=1), cache=cache)
    ids = np.ones((B, time), np.int32)
    ids[0, : time // 3] = 0  # padding on the left in one row
    inputs = draw(time)
    expected, extended = op(*inputs, cache=cache, segment_ids=ids)
    out, entries = op(*inputs, cache=read_only(cache), segment_ids=ids)
    assert isinstance(entries, Entries) and entries.key.shape == (B, time, G, K)
    np.testing.assert_array_equal(out, expected)
    # Sums of log decays over blocks are added in another order: log2(150) roundings of sums below 150.
    near = dict(rtol=0, atol=150 * 8 * 2**-24 if name == "forgetting" else 0)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **near), written(cache, entries), extended)


def test_caches_inside_other_things_and_over_layers():
    op, empty = OPS["causal_attention"]
    cache = {"memory": empty, "count": jnp.zeros(B, jnp.int32)}
    _, entries = op(*draw(3), cache=read_only(cache)["memory"])
    both = written(cache, {"memory": entries, "count": cache["count"] + 3})
    assert isinstance(both["memory"], KVCache) and not both["memory"].read_only
    np.testing.assert_array_equal(both["memory"].length, 3)
    np.testing.assert_array_equal(both["count"], 3)
    layers = jax.tree.map(lambda *x: jnp.stack(x), cache, both)
    one = Entries(*draw(2, seed=2)[1:3], jnp.ones((B, 2), bool))
    more = jax.tree.map(lambda x: jnp.stack([x, x if x.dtype == bool else 2 * x]), one)
    after = written(layers, {"memory": more, "count": layers["count"]}, axes=1)["memory"]
    for layer, before in enumerate((empty, both["memory"])):
        one = written(before, jax.tree.map(lambda x, layer=layer: x[layer], more))
        jax.tree.map(lambda x, y, layer=layer: np.testing.assert_array_equal(x[layer], y), after, one)


def test_a_cache_is_token_first_outside():
    """Arrays go in and come out as [B, N, heads, width], on the device and on the host; the pytree's are by head."""
    rng = np.random.default_rng(0)
    key, value, decay = (rng.standard_normal((B, 5, *shape)) for shape in ((G, K), (G, V), (H,)))
    cache = KVCache(key, value, np.full(B, 3, np.int32), decay)
    assert cache.capacity == 5 and [x.shape[1] for x in jax.tree.leaves(cache)[:2]] == [G, G]
    for held in (cache, jax.tree.map(jnp.asarray, cache), jax.device_get(jax.tree.map(jnp.asarray, cache))):
        for name, given in (("key", key), ("value", value), ("decay", decay)):
            np.testing.assert_allclose(getattr(held, name), given, rtol=1e-6)
    assert KVCache(key, value, cache.length).decay is None
    assert "KVCache(key_by_head=" in repr(cache)
    leaves = jax.tree_util.tree_leaves_with_path(KUCache(key, value, cache.length))
    paths = [jax.tree_util.keystr(path) for path, _ in leaves]
    assert paths == [".key_by_head", ".value_by_head", ".length"]
