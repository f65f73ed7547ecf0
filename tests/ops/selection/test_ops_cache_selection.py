"""Caches of chosen tokens: an evicting cache equals the masked op, and compact_cache keeps what it is told to."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.ops_cases import CASES, call, case_id, draw_inputs, poison

from deltaformer_jax import KUCache, KVCache, causal_attention, compress_cache
from deltaformer_jax.ops import (
    SelectedKUCache,
    SelectedKVCache,
    compact_cache,
    read_only,
    visible_entries,
    written,
)

WINDOW, INITIAL = 4, 2


def evicting(op, cache, arrays, keep, stops):
    """The outputs of `op` over pieces of the text, with all entries dropped in between that no later token sees; and
    the largest number of entries held."""
    outs, most = [], 0
    for start, stop in itertools.pairwise(stops):
        piece = {name: x[:, start:stop] for name, x in arrays.items()}
        out, cache = op(piece, keep[:, start:stop], cache)
        outs.append(out)
        most = max(most, int(cache.entries.max()))
        cache = compact_cache(cache, visible_entries(cache, WINDOW))
    return jnp.concatenate(outs, 1), most, cache


def check_eviction(op, whole, cache, arrays):
    """A prompt in one call and then token by token, in a cache far smaller than the text."""
    time = whole.shape[1]
    keep = np.random.default_rng(0).random((2, time)) < 0.2
    stops = [0, 5, *range(6, time + 1)]
    out, most, cache = evicting(op, cache, arrays, keep, stops)
    np.testing.assert_allclose(out, whole, rtol=1e-10, atol=1e-11)
    assert most <= cache.capacity < time
    np.testing.assert_array_equal(cache.length, time)
    lasting = keep.copy()
    lasting[:, :INITIAL] = True
    for row in range(2):
        left = np.flatnonzero(lasting[row] | (np.arange(time) > time - WINDOW))
        np.testing.assert_array_equal(cache.position[row, : len(left)], left)
        np.testing.assert_array_equal(cache.position[row, len(left) :], -1)


@pytest.mark.parametrize("case", [CASES[i] for i in (1, 3, 11)], ids=case_id)
def test_an_evicting_cache_equals_the_masked_delta_attention(case, x64):
    inputs = draw_inputs(case, 1, jnp.float64)
    keep = np.random.default_rng(0).random((2, case.time)) < 0.2
    settings = dict(window=WINDOW, initial=INITIAL)
    whole = call(case, inputs, "recurrent", keep=keep, **settings)
    op = jax.jit(lambda inputs, keep, cache: call(case, inputs, None, keep=keep, cache=cache, **settings))
    sizes = (2, 14, case.kv_heads, case.write_heads, case.key_dim, case.value_dim, jnp.float64)
    check_eviction(op, whole, SelectedKUCache.empty(*sizes), inputs)


@pytest.mark.parametrize("forget", [False, True])
def test_an_evicting_cache_equals_the_masked_softmax_attention(forget, x64):
    rng = np.random.default_rng(0)
    arrays = dict(zip(("query", "key", "value"), (jnp.asarray(rng.standard_normal((2, 21, h, 4))) for h in (4, 2, 2))))
    if forget:
        arrays["log_decay"] = -jnp.asarray(10.0 ** rng.uniform(-3, 0, (2, 21, 4)))
    keep = np.random.default_rng(0).random((2, 21)) < 0.2
    settings = dict(window=WINDOW, initial=INITIAL)
    whole = causal_attention(**arrays, keep=keep, implementation="recurrent", **settings)
    op = jax.jit(lambda arrays, keep, cache: causal_attention(**arrays, keep=keep, cache=cache, **settings))
    cache = SelectedKVCache.empty(2, 14, 2, 4, 4, jnp.float64, decay_heads=4 if forget else None)
    check_eviction(op, whole, cache, arrays)


def test_gradients_through_eviction(x64):
    """The gradient of an evicting loop is that of the masked op: what was dropped is trained until it is dropped."""
    case = CASES[1]
    inputs = draw_inputs(case, 1, jnp.float64)
    keep = np.random.default_rng(0).random((2, case.time)) < 0.2
    settings = dict(window=WINDOW, initial=INITIAL)
    weigh = lambda out: jnp.sum(out * jnp.cos(jnp.arange(out.size, dtype=out.dtype)).reshape(out.shape))

    def in_pieces(inputs):
        cache, outs = SelectedKUCache.empty(2, 19, 2, 2, 5, 3, jnp.float64), []
        for start in range(0, case.time, 11):
            piece = {name: x[:, start : start + 11] for name, x in inputs.items()}
            out, cache = call(case, piece, None, keep=keep[:, start : start + 11], cache=cache, **settings)
            cache = compact_cache(cache, visible_entries(cache, WINDOW))
            outs.append(out)
        return weigh(jnp.concatenate(outs, 1))

    whole = lambda inputs: weigh(call(case, inputs, "parallel", keep=keep, **settings))
    expected, actual = (jax.jit(jax.grad(loss))(inputs) for loss in (whole, in_pieces))
    for name in inputs:
        np.testing.assert_allclose(actual[name], expected[name], rtol=1e-9, atol=1e-10, err_msg=name)


def filled_cache(kind, tokens, capacity=6, window=None):
    """A cache after `tokens` tokens, of which the first is padding in row 1."""
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.standard_normal((2, tokens, 2, 4)), jnp.float32) for _ in range(3)]
    segment_ids = np.ones((2, tokens), np.int32)
    segment_ids[1, 0] = 0
    cache = kind.empty(2, capacity, 2, 4, 4)
    return causal_attention(*arrays, cache=cache, window=window, segment_ids=segment_ids)[1]


def test_compact_cache_keeps_the_chosen_entries_in_order():
    cache = filled_cache(KVCache, 5)
    every = compact_cache(cache, np.ones((2, 6), bool))
    for name in ("key", "value", "length"):
        np.testing.assert_array_equal(getattr(every, name), getattr(cache, name))
    np.testing.assert_array_equal(every.position, [[0, 1, 2, 3, 4, -1], [0, 1, 2, 3, -1, -1]])
    np.testing.assert_array_equal(every.entries, [5, 4])
    again = compact_cache(every, np.ones((2, 6), bool))
    jax.tree.map(np.testing.assert_array_equal, again, every)

    some = compact_cache(cache, jnp.asarray([[3, 0, 3], [4, 1, 2]]))  # a slot twice, an empty slot
    np.testing.assert_array_equal(some.position, [[0, 3, -1], [1, 2, -1]])
    np.testing.assert_array_equal(some.key[0, :2], cache.key[0, np.asarray([0, 3])])
    np.testing.assert_array_equal(some.value[1, :2], cache.value[1, np.asarray([1, 2])])
    np.testing.assert_array_equal(some.key[:, 2], 0)
    np.testing.assert_array_equal(some.length, cache.length)

    ring = filled_cache(KVCache, 10, capacity=4, window=4)
    np.testing.assert_array_equal(
        compact_cache(ring, np.ones((2, 4), bool)).position, [[6, 7, 8, 9], [5, 6, 7, 8]], err_msg="a ring, in order"
    )


def test_a_cache_of_chosen_tokens_may_be_read_only():
    """As a model scans its layers: the entries are written afterwards, with their positions."""
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.standard_normal((2, 3, 2, 4)), jnp.float32) for _ in range(3)]
    keep = np.asarray([[True, False, False]] * 2)
    cache = SelectedKVCache.empty(2, 5, 2, 4, 4)
    out, cache_after = causal_attention(*arrays, cache=cache, window=2, keep=keep)
    out_again, entries = causal_attention(*arrays, cache=read_only(cache), window=2, keep=keep)
    np.testing.assert_array_equal(out, out_again)
    jax.tree.map(np.testing.assert_array_equal, written(cache, entries), cache_after)
    np.testing.assert_array_equal(cache_after.lasting[0], [True, False, False, False, False])


def test_padded_prompts():
    """Padding on the left and on the right, with NaN in it: each row as if it were alone, its first token lasts."""
    rng = np.random.default_rng(0)
    arrays = {name: jnp.asarray(rng.standard_normal((2, 6, 2, 4)), jnp.float32) for name in ("query", "key", "value")}
    segment_ids = np.asarray([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]], np.int32)
    settings = dict(window=2, initial=1)
    cache = SelectedKVCache.empty(2, 7, 2, 4, 4)
    out, cache = causal_attention(**poison(arrays, segment_ids), segment_ids=segment_ids, cache=cache, **settings)
    cache = compact_cache(cache, visible_entries(cache, 2))
    np.testing.assert_array_equal(cache.position[:, :3], [[0, 3, -1], [0, 4, -1]])
    token = {name: x[:, :1] for name, x in arrays.items()}
    more, _ = causal_attention(**token, cache=cache, **settings)
    for row, real in enumerate(segment_ids != 0):
        alone = {name: jnp.concatenate([x[row][real], x[row, :1]])[None] for name, x in arrays.items()}
        expected = causal_attention(**alone, implementation="parallel", **settings)[0]
        np.testing.assert_allclose(jnp.concatenate([out[row][real], more[row]]), expected, rtol=1e-5, atol=1e-6)


def test_a_compacted_cache_can_be_compressed():
    """What slot keys read out of it is what they read out of its entries alone, not of its empty slots."""
    rng = np.random.default_rng(0)
    key, u, slots = (jnp.asarray(rng.standard_normal((1, n, 1, 4)), jnp.float32) for n in (6, 6, 2))
    chosen = np.asarray([1, 4, 5])
    whole = KUCache(key, u, jnp.asarray([6]))
    alone = KUCache(key[:, chosen], u[:, chosen], jnp.asarray([3]))
    left = compact_cache(whole, jnp.asarray(chosen)[None], capacity=5)
    expected, actual = (compress_cache(cache, slots, capacity=2) for cache in (alone, left))
    np.testing.assert_allclose(actual.value, expected.value, rtol=1e-6)


def test_refusals():
    cache = filled_cache(KVCache, 5)
    x = jnp.zeros((2, 2, 2, 4))
    keep = np.ones((2, 6), bool)
    for bad, kind, message in [
        (lambda: compact_cache(cache, keep[:, :5]), ValueError, r"keep must have shape \[batch, slots\] = \(2, 6\)"),
        (lambda: compact_cache(cache, keep[:1]), ValueError, r"keep must be bools \(2, 6\) or slots \[2, n\]"),
        (lambda: compact_cache(cache, keep.astype(float)), TypeError, "keep has dtype float64"),
        (lambda: compact_cache(cache, np.asarray([[6], [0]])), ValueError, "a slot outside of 0 … 5"),
        (lambda: compact_cache(cache, keep, capacity=4), ValueError, "capacity=4: a row keeps 5 entries"),
        (lambda: compact_cache((1, 2), keep), TypeError, "cache must be a KUCache or a KVCache, not tuple"),
        (lambda: visible_entries(cache, 0), ValueError, "window=0"),
        (
            lambda: causal_attention(x, x, x, window=2, initial=1, cache=cache),
            ValueError,
            "keep and initial need a cache of chosen tokens: build it with SelectedKVCache.empty or SelectedKVCache.of",
        ),
        (
            lambda: causal_attention(x, x, x, window=2, cache=SelectedKVCache.of(cache)),
            ValueError,
            "cache is full: row 0 holds 5 of 6 tokens and this call adds 2",
        ),
    ]:
        with pytest.raises(kind, match=message):
            bad()
