"""Ops under JAX's global settings: each gives what it gives without them, or stops where the setting says so."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deltaformer_jax import (
    KUCache,
    causal_attention,
    compress_cache,
    delta_attention,
    delta_values,
    gated_delta_rule,
    gated_linear_attention,
    shift_mix,
)

B, T, H, K = 2, 21, 2, 8

SETTINGS = {
    "x64": lambda: jax.enable_x64(True),
    "debug_nans": lambda: jax.debug_nans(True),
    "strict promotion": lambda: jax.numpy_dtype_promotion("strict"),
    "rank promotion": lambda: jax.numpy_rank_promotion("raise"),
    "bfloat16 products": lambda: jax.default_matmul_precision("bfloat16"),
    "float32 products": lambda: jax.default_matmul_precision("float32"),
}


def inputs(dtype):
    rng = np.random.default_rng(0)
    q, k, v = (np.asarray(rng.standard_normal((B, T, H, K)), np.float32) / 2 for _ in range(3))
    gate = np.asarray(rng.uniform(0.1, 0.9, (B, T, H)), np.float32)
    segments = np.asarray([[1] * 12 + [2] * 7 + [0] * 2, [0] * 3 + [5] * 18], np.int32)
    cast = lambda x: jnp.asarray(x, dtype)
    return cast(q), cast(k), cast(v), jnp.asarray(gate), jnp.asarray(segments)


def with_cache(q, k, v, gate, segments):
    cache = KUCache.empty(B, 32, H, H, K, K, q.dtype)
    _, cache = delta_attention(q, k, v, beta=gate, segment_ids=jnp.minimum(segments, 1), cache=cache)
    out, cache = delta_attention(q[:, :1], k[:, :1], v[:, :1], beta=gate[:, :1], cache=cache)
    return out, compress_cache(cache, k[:, :4])


OPS = {
    "delta_attention": lambda q, k, v, gate, ids: delta_attention(q, k, v, beta=gate, segment_ids=ids),
    "one pass": lambda q, k, v, gate, ids: delta_attention(q, k, v, beta=gate, write_query="query", segment_ids=ids),
    "delta_values": lambda q, k, v, gate, ids: delta_values(k, v, alpha=gate, segment_ids=ids),
    "caches": with_cache,
    "causal_attention": lambda q, k, v, gate, ids: causal_attention(
        q, k, v, log_decay=-gate, sinks=gate[0, 0], window=9, segment_ids=ids
    ),
    "gated_delta_rule": lambda q, k, v, gate, ids: gated_delta_rule(
        q, k, v, beta=gate, log_decay=-gate, segment_ids=ids
    ),
    "channels": lambda q, k, v, gate, ids: gated_delta_rule(
        q, k, v, beta=gate, log_decay=-jnp.broadcast_to(gate[..., None], k.shape), segment_ids=ids
    ),
    "gated_linear_attention": lambda q, k, v, gate, ids: gated_linear_attention(q, k, v, log_decay=-gate),
    "shift_mix": lambda q, k, v, gate, ids: shift_mix(k, gate[0, 0], gate[0, 1], segment_ids=ids),
}


def total(outputs):
    return sum(jnp.sum(x.astype(jnp.float32)) for x in jax.tree.leaves(outputs) if x.dtype != jnp.int32)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", OPS)
def test_values_and_gradients_under_every_setting(name, dtype):
    """Values and gradients, under jit, are those without the setting: to the bit but for the precision of products,
    which the ops choose themselves."""
    arrays = inputs(dtype)

    def run():
        def both(*x):
            value = lambda *y: OPS[name](*y, arrays[4])
            return value(*x), jax.grad(lambda *y: total(value(*y)), argnums=(0, 1, 2, 3))(*x)

        # A new function each time, so that what was compiled under other settings is not taken again.
        return jax.tree.map(np.asarray, jax.jit(both)(*arrays[:4]))

    expected = run()
    for setting, context in SETTINGS.items():
        with context():
            found = run()
        for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
            assert a.dtype == b.dtype, setting
            np.testing.assert_array_equal(a, b, err_msg=setting)
