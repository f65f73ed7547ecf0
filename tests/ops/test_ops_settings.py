"""Ops under JAX's global settings: each gives what it gives without them, or stops where the setting says so."""

import contextlib

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


@contextlib.contextmanager
def same_program():
    """Under these a program is the same to the letter: the ops neither promote unsaid nor leave products' precision
    open."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        with jax.default_matmul_precision("bfloat16"):
            yield


# Under these it has other indices or is looked at while it runs, and its numbers are the same.
SAME_NUMBERS = {
    "x64": lambda: jax.enable_x64(True),
    "debug_nans": lambda: jax.debug_nans(True),
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


# Four programs a case: two cases for every day, the others with the long tests.
EVERY_DAY = [("one pass", jnp.float32), ("gated_delta_rule", jnp.float32)]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(name, dtype, marks=[] if (name, dtype) in EVERY_DAY else pytest.mark.long)
        for name in OPS
        for dtype in (jnp.float32, jnp.bfloat16)
    ],
)
def test_values_and_gradients_under_every_setting(name, dtype):
    arrays = inputs(dtype)

    def program():
        def both(*x):
            out, pullback = jax.vjp(lambda *y: OPS[name](*y, arrays[4]), *x)
            ones = lambda y: jnp.ones_like(y) if y.dtype != jnp.int32 else np.zeros(y.shape, jax.dtypes.float0)
            return out, pullback(jax.tree.map(ones, out))

        # A new function each time, so that what was compiled under other settings is not taken again.
        return jax.jit(both).lower(*arrays[:4])

    lowered = program()
    with same_program():
        assert program().as_text() == lowered.as_text()

    expected = lowered.compile()(*arrays[:4])
    for setting, context in SAME_NUMBERS.items():
        with context():
            found = program().compile()(*arrays[:4])
        for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
            assert a.dtype == b.dtype, setting
            np.testing.assert_array_equal(a, b, err_msg=setting)
