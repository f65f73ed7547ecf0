"""Bad input to the ops: one error, raised while tracing, that names the argument and the fix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deltaformer_jax import KUCache, KVCache, Round, causal_attention, delta_attention, delta_values, shift_mix


def zeros(*shape, dtype=jnp.float32):
    return jnp.zeros(shape, dtype)


GOOD = dict(query=zeros(2, 6, 4, 8), key=zeros(2, 6, 2, 8), value=zeros(2, 6, 2, 5))

BAD_DELTA = [
    (dict(query=zeros(6, 4, 8)), ValueError, r"query must have shape \[batch, time, heads, width\]"),
    (dict(query=zeros(2, 6, 3, 8)), ValueError, "query has 3 heads: it must be a multiple of key's 2 heads"),
    (dict(query=zeros(2, 6, 4, 7)), ValueError, "query has width 7 but key has 8"),
    (dict(query=zeros(2, 5, 4, 8)), ValueError, r"query has \[batch, time\]"),
    (dict(query=np.zeros((2, 6, 4, 8), np.int32)), TypeError, "query has dtype int32: cast it"),
    (dict(query=zeros(2, 6, 4, 8, dtype=jnp.bfloat16)), TypeError, "query is bfloat16 but key is float32"),
    (dict(value=zeros(2, 6, 4, 5)), ValueError, "value has 4 heads but key has 2"),
    (dict(query=[1.0]), TypeError, "query must be an array, not list"),
    (dict(query=zeros(2, 0, 4, 8), key=zeros(2, 0, 2, 8), value=zeros(2, 0, 2, 5)), ValueError, "must be at least 1"),
    (dict(beta=zeros(2, 6, 4)), ValueError, r"beta must have shape .* = \(2, 6, 2\) .*; it has \(2, 6, 4\)"),
    (dict(alpha=zeros(2, 6)), ValueError, "alpha must have shape"),
    (dict(alpha=[0.5]), ValueError, "alpha must have shape .* or be one number; it has list"),
    (dict(alpha=True), ValueError, "alpha must have shape .* or be one number; it has bool"),
    (dict(beta=np.zeros((2, 6, 2), np.int32)), TypeError, "beta has dtype int32"),
    (dict(write_query="value"), ValueError, 'write_query=\'value\': give "key", "query" or an array'),
    (dict(write_query=zeros(2, 6, 3, 8)), ValueError, "write_query has 3 heads: it must have as many as key"),
    (dict(write_query=zeros(2, 6, 2, 9)), ValueError, "write_query has shape"),
    (dict(write_similarity="sotfmax"), ValueError, "write_similarity='sotfmax' .*; did you mean softmax"),
    (dict(read_similarity=3), ValueError, "read_similarity=3 is not a similarity"),
    (dict(write_scale=float("nan")), ValueError, "write_scale=nan"),
    (dict(read_scale=zeros(1)), ValueError, "read_scale=.* finite Python number"),
    (dict(chunk_size=0), ValueError, "chunk_size=0: it must be a positive integer"),
    (dict(chunk_size=2.0), ValueError, "chunk_size=2.0"),
    (dict(implementation="chunk"), ValueError, "implementation='chunk' is unknown.*; did you mean chunked"),
    (dict(implementation="pallas_tpu"), NotImplementedError, "implementation='pallas_tpu' runs on tpu only"),
    (dict(implementation="triton"), NotImplementedError, "implementation='triton'"),
    (dict(segment_ids=np.ones((2, 5), np.int32)), ValueError, r"segment_ids must have shape .* = \(2, 6\)"),
    (dict(segment_ids=np.ones((2, 6), np.float32)), TypeError, "segment_ids has dtype float32"),
    (dict(segment_ids=np.asarray([[1, 1, 2, 2, 1, 1]] * 2)), ValueError, "an id occurs in two separate runs"),
    (
        dict(cache=KVCache.empty(2, 8, 2, 8, 5)),
        TypeError,
        "cache must be a KUCache, not KVCache: build it with KUCache.empty",
    ),
    (dict(cache=KUCache.empty(2, 8, 2, 4, 8, 5)), ValueError, "cache has .* build it with KUCache.empty"),
    (
        dict(cache=KUCache.empty(2, 5, 2, 2, 8, 5)),
        ValueError,
        "cache is full: row 0 holds 0 of 5 tokens and this call adds 6",
    ),
    (
        dict(cache=KUCache.empty(2, 8, 2, 2, 8, 5), segment_ids=np.asarray([[1, 1, 1, 2, 2, 2]] * 2)),
        ValueError,
        "a cache holds one document per row",
    ),
    (dict(return_cache=True, segment_ids=np.asarray([[1, 1, 1, 2, 2, 2]] * 2)), ValueError, "one document per row"),
]


@pytest.mark.parametrize("change, kind, message", BAD_DELTA, ids=[message[:40] for _, _, message in BAD_DELTA])
def test_delta_attention(change, kind, message):
    with pytest.raises(kind, match=message):
        delta_attention(**{**GOOD, **change})


def test_the_good_case_is_good():
    assert delta_attention(**GOOD).shape == (2, 6, 4, 5)


def test_shapes_are_refused_while_tracing():
    with pytest.raises(ValueError, match="must be a multiple"):
        jax.jit(delta_attention).lower(zeros(2, 6, 3, 8), GOOD["key"], GOOD["value"])


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(write_query="query"), "write_query='query': give \"key\" or an array"),
        (dict(chunk_size=-1), "chunk_size=-1"),
        (dict(beta=zeros(2, 6, 3)), "beta must have shape"),
        (dict(write_similarity="cosine"), "write_similarity='cosine'"),
    ],
)
def test_delta_values(change, message):
    with pytest.raises(ValueError, match=message):
        delta_values(**{"key": GOOD["key"], "value": GOOD["value"], **change})


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(window=0), "window=0: it must be a positive integer"),
        (dict(scale="big"), "scale='big'"),
        (dict(query=zeros(2, 6, 3, 8)), "must be a multiple"),
        (dict(cache=KVCache.empty(2, 5, 2, 8, 5)), "cache is full"),
        (dict(implementation="flash"), "implementation='flash' is unknown"),
        (
            dict(log_decay=zeros(2, 6, 2)),
            r"log_decay must have shape .* = \(2, 6, 4\) .*; it has \(2, 6, 2\)",
        ),
        (dict(log_decay=0.5), "log_decay holds 0.5: the natural log of a decay must be at most 0; pass"),
        (
            dict(log_decay=zeros(2, 6, 4) + 0.5),
            "log_decay holds 0.5: the natural log of a decay must be at most 0; pass",
        ),
        (dict(log_decay=zeros(2, 6, 4) - np.inf), "log_decay holds -inf, inf or NaN: it must be finite"),
        (
            dict(implementation="chunk"),
            r"one of \('recurrent', 'parallel', 'chunked', 'triton', 'cudnn', 'splash'\) or None",
        ),
        (dict(sinks=zeros(2)), r"sinks must have shape \[query heads\] = \(4,\); it has \(2,\)"),
        (dict(cache=KVCache.empty(2, 8, 2, 8, 5), log_decay=zeros(2, 6, 4)), "cache and log_decay must go together"),
        (dict(cache=KVCache.empty(2, 8, 2, 8, 5, decay_heads=4)), "cache and log_decay must go together"),
    ],
)
def test_causal_attention(change, message):
    with pytest.raises(ValueError, match=message):
        causal_attention(**{**GOOD, **change})


def test_a_ring_is_never_full():
    _, cache = causal_attention(**GOOD, window=5, cache=KVCache.empty(2, 5, 2, 8, 5))
    np.testing.assert_array_equal(cache.length, 6)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((zeros(2, 6, 8), zeros(2), zeros(2)), "x must have shape"),
        ((zeros(2, 0, 2, 8), zeros(2), zeros(2)), "x has shape .*: time, heads and width must be at least 1"),
        ((zeros(2, 6, 2, 8), zeros(3), zeros(2)), r"current must have shape \[heads\] = \(2,\)"),
        ((zeros(2, 6, 2, 8), zeros(2), zeros(2, 1)), "previous must have shape"),
    ],
)
def test_shift_mix(arguments, message):
    with pytest.raises(ValueError, match=message):
        shift_mix(*arguments)


@pytest.mark.parametrize("x", [[[[[1.0]]]], np.ones((2, 6, 2, 8), np.int32)])
def test_shift_mix_of_what_is_no_float_array(x):
    with pytest.raises(TypeError, match=r"x must be an array, not list|x has dtype int32: cast it"):
        shift_mix(x, zeros(2), zeros(2))


def test_shift_mix_last():
    with pytest.raises(ValueError, match=r"last must have shape .* = \(2, 2, 8\)"):
        shift_mix(zeros(2, 6, 2, 8), zeros(2), zeros(2), last=zeros(2, 1, 2, 8))


@pytest.mark.parametrize("sizes", [(2, 0, 1, 1, 4, 4), (2, 8, 1, 1, 4, None), (2, 8, 1.5, 1, 4, 4)])
def test_empty_caches(sizes):
    with pytest.raises(ValueError, match="positive integer"):
        KUCache.empty(*sizes)


@pytest.mark.parametrize(
    "empty", [lambda: KUCache.empty(2, 8, 2, 2, 8, 5, jnp.int32), lambda: KVCache.empty(2, 8, 2, 8, 5, int)]
)
def test_caches_of_integers(empty):
    with pytest.raises(TypeError, match=r"the cache has dtype int(32|64): cast it to float64"):
        empty()


def test_a_cache_of_integers_from_elsewhere():
    cache = jax.tree.map(lambda x: x.astype(jnp.int32), KVCache.empty(2, 8, 2, 8, 5))
    with pytest.raises(TypeError, match=r"cache\.key has dtype int32: cast it to float64"):
        causal_attention(**GOOD, cache=cache)


@pytest.mark.parametrize("decimals", [2.5, "a", True, -1])
def test_decimals(decimals):
    with pytest.raises(ValueError, match=r"Round\(decimals=.*\): decimals must be an integer of at least 0"):
        Round(decimals=decimals)
