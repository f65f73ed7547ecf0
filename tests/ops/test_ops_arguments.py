"""What the ops take beside float arrays of the full shape: numbers for gates, integers of any width, host arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deltaformer_jax import (
    KUCache,
    KVCache,
    causal_attention,
    compress_cache,
    delta_attention,
    delta_values,
    gated_delta_rule,
    gated_linear_attention,
    generalized_delta_rule,
    shift_mix,
)

B, T, H, K = 2, 9, 2, 4


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


Q, KEY, V = (draw(B, T, H, K, seed=i) for i in range(3))
FULL = jnp.ones((B, T, H))

# Name -> (the op of a number or an array for each of its gates, their names).
GATED = {
    "delta_attention": (lambda **gates: delta_attention(Q, KEY, V, **gates), {"alpha": 0.5, "beta": 0.25}),
    "delta_values": (lambda **gates: delta_values(KEY, V, **gates), {"alpha": 0.5, "beta": 0.25}),
    "causal_attention": (lambda **gates: causal_attention(Q, KEY, V, **gates), {"log_decay": -0.5}),
    "gated_delta_rule": (lambda **gates: gated_delta_rule(Q, KEY, V, **gates), {"beta": 0.25, "log_decay": -0.5}),
    "gated_linear_attention": (lambda **gates: gated_linear_attention(Q, KEY, V, **gates), {"log_decay": -0.5}),
    "generalized_delta_rule": (
        lambda **gates: generalized_delta_rule(Q, KEY, V, KEY / 4, KEY / 4, **gates),
        {"log_decay": -0.5},
    ),
}


@pytest.mark.parametrize("kind", [float, np.float32, jnp.float32, int])
@pytest.mark.parametrize("name", GATED)
def test_one_number_is_that_number_everywhere(name, kind):
    op, gates = GATED[name]
    numbers = {gate: kind(-1 if gate == "log_decay" else 1) if kind is int else kind(x) for gate, x in gates.items()}
    arrays = {gate: FULL * float(x) for gate, x in numbers.items()}
    jax.tree.map(np.testing.assert_array_equal, op(**numbers), op(**arrays))


SEGMENTS = np.asarray([[1, 1, 1, 2, 2, 2, 2, 0, 0], [0, 0, 3, 3, 3, 3, 3, 3, 3]])

SEGMENTED = {
    "delta_attention": lambda ids: delta_attention(Q, KEY, V, segment_ids=ids),
    "delta_values": lambda ids: delta_values(KEY, V, segment_ids=ids),
    "causal_attention": lambda ids: causal_attention(Q, KEY, V, segment_ids=ids),
    "gated_delta_rule": lambda ids: gated_delta_rule(Q, KEY / 4, V, segment_ids=ids),
    "gated_linear_attention": lambda ids: gated_linear_attention(Q, KEY, V, segment_ids=ids),
    "generalized_delta_rule": lambda ids: generalized_delta_rule(Q, KEY, V, KEY / 4, KEY / 4, segment_ids=ids),
    "shift_mix": lambda ids: shift_mix(KEY, jnp.ones(H), jnp.ones(H), segment_ids=ids),
    "return_cache": lambda ids: delta_attention(Q, KEY, V, segment_ids=np.minimum(ids, 1), return_cache=True),
}


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.uint16, np.uint32, np.int64, np.uint64])
@pytest.mark.parametrize("name", SEGMENTED)
def test_segment_ids_of_every_integer_type(name, dtype):
    """The same bits as int32 gives, where 64-bit ids differ by multiples of 2**32 too, and from JAX as from NumPy."""
    op = SEGMENTED[name]
    expected = op(SEGMENTS.astype(np.int32))
    with jax.enable_x64(np.dtype(dtype).itemsize == 8):
        ids = SEGMENTS.astype(dtype)
        if dtype in (np.int64, np.uint64) and name != "return_cache":
            ids = ids * np.asarray(2**32, dtype)
        for given in (ids, jnp.asarray(ids)):
            jax.tree.map(np.testing.assert_array_equal, op(given), expected)


@pytest.mark.parametrize("dtype", [bool, np.float32])
@pytest.mark.parametrize("name", [name for name in SEGMENTED if name != "return_cache"])
def test_segment_ids_of_other_types_are_refused(name, dtype):
    with pytest.raises(TypeError, match=f"segment_ids has dtype {np.dtype(dtype).name}: it must be an integer array"):
        SEGMENTED[name](SEGMENTS.astype(dtype))


def test_caches_and_arrays_from_the_host():
    """What jax.device_get or a checkpoint brings goes on as it would have on the device."""
    cases = (
        (delta_attention, KUCache.empty(B, 16, H, H, K, K)),
        (causal_attention, KVCache.empty(B, 16, H, K, K)),
        (lambda *x, cache: causal_attention(*x, cache=cache, window=5), KVCache.empty(B, 5, H, K, K)),
    )
    for op, empty in cases:
        _, cache = op(Q, KEY, V, cache=empty)
        expected = op(Q[:, :3], KEY[:, :3], V[:, :3], cache=cache)
        host = jax.device_get((Q[:, :3], KEY[:, :3], V[:, :3], cache))
        found = op(*host[:3], cache=host[3])
        jax.tree.map(np.testing.assert_array_equal, found, expected)
    _, cache = delta_attention(Q, KEY, V, return_cache=True)
    expected = compress_cache(cache, KEY[:, :4])
    found = compress_cache(jax.device_get(cache), np.asarray(KEY[:, :4]))
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    state = gated_delta_rule(Q, KEY / 4, V)[1]
    expected = gated_delta_rule(Q, KEY / 4, V, initial_state=state)
    found = gated_delta_rule(*map(np.asarray, (Q, KEY / 4, V)), initial_state=np.asarray(state))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.uint8, jnp.int16, jnp.uint32])
def test_lengths_of_every_integer_type(dtype):
    """A cache's length in a narrow type: 200 tokens and more are counted all the same."""
    draws = np.random.default_rng(0)
    x = jnp.asarray(draws.standard_normal((B, 120, H, K)), jnp.float32)
    _, cache = delta_attention(x, x, x, cache=KUCache.empty(B, 300, H, H, K, K))
    narrow = KUCache(cache.key, cache.value, cache.length.astype(dtype))
    for given in (cache, narrow):
        out, after = delta_attention(x, x, x, cache=given)
        if given is cache:
            expected = out
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(after.length, 240)


def test_lengths_of_other_types_are_refused():
    x = jnp.ones((B, 1, H, K))
    empty = KUCache.empty(B, 4, H, H, K, K)
    with pytest.raises(TypeError, match=r"cache\.length is float32: it counts tokens"):
        delta_attention(x, x, x, cache=KUCache(empty.key, empty.value, empty.length.astype(jnp.float32)))
