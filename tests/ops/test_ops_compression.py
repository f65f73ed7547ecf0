"""compress_cache: against the definition, exact where the theorem says so, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.ops_cases import padded_rows

from deltaformer_jax import KUCache, KVCache, Round, compress_cache, delta_attention
from deltaformer_jax.tasks import SwapConstruction, near_orthogonal_keys

SIMILARITIES = {
    "linear": lambda s: s,
    "relu": lambda s: np.maximum(s, 0),
    "exp": np.exp,
    "softmax": lambda s: np.exp(s) / np.exp(s).sum() if len(s) else s,
    "round": lambda s: np.round(s, 2),
    Round(decimals=0): np.round,
}


@pytest.mark.parametrize("similarity", SIMILARITIES, ids=str)
@settings(max_examples=6)
@given(st.data())
def test_each_slot_holds_what_it_read(similarity, data):
    """One row, one head, one slot at a time; empty places of the cache and absent slots hold NaN."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(data.draw(st.integers(0, 99)))
        lengths = np.array(data.draw(st.lists(st.integers(0, 7), min_size=2, max_size=2)), np.int32)
        ids = data.draw(padded_rows(4))
        key, value = rng.standard_normal((2, 7, 2, 3)), rng.standard_normal((2, 7, 4, 5))
        slots = rng.standard_normal((2, 4, 2, 3))
        slots[ids == 0] = np.nan
        empty = np.arange(7) >= lengths[:, None]
        key[empty], value[empty] = np.nan, np.nan
        cache = KUCache(jnp.asarray(key), jnp.asarray(value), jnp.asarray(lengths))
        small = compress_cache(
            cache,
            jnp.asarray(slots),
            read_similarity=similarity,
            read_scale=0.7,
            capacity=6,
            segment_ids=jnp.asarray(ids),
        )
        assert small.capacity == 6
        np.testing.assert_array_equal(small.length, (ids != 0).sum(axis=1))
        for row in range(2):
            for place, slot in enumerate(np.flatnonzero(ids[row])):
                np.testing.assert_array_equal(small.key[row, place], slots[row, slot])
                for head in range(4):
                    scores = 0.7 * key[row, : lengths[row], head // 2] @ slots[row, slot, head // 2]
                    expected = SIMILARITIES[similarity](scores) @ value[row, : lengths[row], head]
                    np.testing.assert_allclose(small.value[row, place, head], expected, rtol=1e-12, atol=1e-12)
            assert not np.asarray(small.key[row, small.length[row] :]).any()


def test_it_is_a_read_that_writes_nothing(x64):
    """ṽ is what delta_attention reads with these keys as queries, α = β = 0, through the same cache."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape))
    _, cache = delta_attention(draw(2, 6, 4, 3), draw(2, 6, 2, 3), draw(2, 6, 2, 5), return_cache=True)
    slots, nothing = draw(2, 1, 2, 3), jnp.zeros((2, 1, 2))
    room = KUCache(*(jnp.pad(x, [(0, 0), (0, 1), (0, 0), (0, 0)]) for x in (cache.key, cache.value)), cache.length)
    read, _ = delta_attention(
        slots, slots, jnp.zeros((2, 1, 2, 5)), alpha=nothing, beta=nothing, read_similarity="linear", cache=room
    )
    small = compress_cache(cache, slots, read_similarity="linear")
    np.testing.assert_allclose(small.value[:, :1], read, rtol=1e-12)
    assert small.capacity == cache.capacity == 6
    shared = compress_cache(cache, slots[0], read_similarity="linear")
    np.testing.assert_allclose(shared.value[0], small.value[0], rtol=1e-15)


def swapped(memory, slots, similarity, compressions):
    """(what is read at the end [1, n, V], entries held at most), compressing so many times on the way."""
    swaps = memory.pairs.shape[1]
    part = swaps // (compressions + 1)
    settings = dict(write_similarity=similarity, read_similarity=similarity, write_scale=1.0, read_scale=1.0)
    lift = lambda x: jnp.asarray(x)[:, :, None, :]
    capacity = slots + (part if compressions else swaps) + slots
    cache = KUCache.empty(1, capacity, 1, 1, memory.keys.shape[2], memory.values.shape[2], jnp.float64)
    feed = jax.jit(
        lambda keys, values, gate, cache: delta_attention(
            lift(keys),
            lift(keys),
            lift(values),
            alpha=gate[..., None],
            beta=gate[..., None],
            **settings,
            cache=cache,
            implementation="parallel",
        )
    )
    pieces = lambda a, b: (memory.keys[:, a:b], memory.values[:, a:b], memory.gate[:, a:b])
    _, cache = feed(*pieces(0, slots), cache)
    most = 0
    for start in range(slots, slots + swaps, part):
        _, cache = feed(*pieces(start, start + part), cache)
        most = max(most, int(cache.length[0]))
        if compressions:
            slot_keys = jnp.asarray(memory.keys[0, :slots, None])
            cache = compress_cache(cache, slot_keys, read_similarity=similarity, read_scale=1.0)
            np.testing.assert_array_equal(cache.length, slots)
    out, _ = feed(*pieces(slots + swaps, slots + swaps + slots), cache)
    return np.asarray(out[:, :, 0]), most


@pytest.mark.parametrize("compressions", [0, 1, 4])
def test_theorem_1_is_exact_through_compression(compressions, x64):
    """64 slots, 32 keys of either basis of 128 dimensions (ε = 0.088), 500 swaps; compressed on the way or not."""
    slots, width = 64, 8
    rng = np.random.default_rng(0)
    values = rng.standard_normal((slots, width))
    keys = near_orthogonal_keys(128 + 32, 128)[96:]
    memory = SwapConstruction(keys, values, 500)(0, np.array([3]))
    read, most = swapped(memory, slots, Round(decimals=0), compressions)
    # A slot's value is a sum of as many terms as there are entries, which cancel to one of the first values; each
    # compression starts from the last one's.
    bound = 2 * (slots + 500) * np.finfo(float).eps * np.abs(values).max()
    assert np.abs(read - memory.expected).max() < bound
    assert most == slots + 500 // (compressions + 1)


def test_orthogonal_keys_are_exact_for_the_linear_similarity_too(x64):
    values = np.random.default_rng(1).standard_normal((16, 4))
    memory = SwapConstruction(np.eye(16), values, 60)(0, np.array([0]))
    read, _ = swapped(memory, 16, "linear", 3)
    np.testing.assert_allclose(read, memory.expected, rtol=0, atol=2 * 76 * np.finfo(float).eps * np.abs(values).max())


def test_linear_with_nearly_orthogonal_keys_is_not_exact(x64):
    """What the theorem needs rounding for: cross-talk of 0.088 stays."""
    values = np.random.default_rng(1).standard_normal((64, 4))
    keys = near_orthogonal_keys(128 + 32, 128)[96:]
    memory = SwapConstruction(keys, values, 500)(0, np.array([3]))
    assert np.abs(swapped(memory, 64, "linear", 4)[0] - memory.expected).max() > 0.1


def test_narrow_caches_and_gradients():
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    cache = KUCache(draw(1, 5, 1, 4), draw(1, 5, 2, 3), jnp.array([4], jnp.int32))
    slots = draw(1, 2, 1, 4)
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x, cache)
    small = compress_cache(narrow, slots.astype(jnp.bfloat16), capacity=2)
    assert small.key.dtype == small.value.dtype == jnp.bfloat16
    exact = compress_cache(cache, slots, capacity=2)
    np.testing.assert_allclose(small.value.astype(jnp.float32), exact.value, atol=0.05)

    def total(value, slots):
        return jnp.sum(compress_cache(KUCache(cache.key, value, cache.length), slots, capacity=2).value ** 2)

    to_value, to_slots = jax.jit(jax.grad(total, (0, 1)))(cache.value, slots)
    assert np.abs(to_slots).min() > 0 and not np.asarray(to_value[:, 4]).any()
    assert np.abs(to_value[:, :4]).min() > 0


CACHE, SLOT = KUCache.empty(2, 5, 2, 4, 3, 6), jnp.zeros((2, 1, 2, 3))


@pytest.mark.parametrize(
    ("arguments", "options", "kind", "message"),
    [
        ((KVCache.empty(2, 5, 2, 3, 6), SLOT), {}, TypeError, "cache must be a KUCache, not KVCache"),
        ((CACHE, [1.0]), {}, TypeError, "keys must be an array, not list"),
        (
            (CACHE, jnp.zeros((2, 1, 4, 3))),
            {},
            ValueError,
            r"keys have shape \(2, 1, 4, 3\): .*must have shape .* \[2, n, 2, 3\]",
        ),
        ((CACHE, jnp.zeros((1, 2, 4))), {}, ValueError, r"keys have shape \(1, 2, 4\)"),
        ((CACHE, jnp.zeros((2, 0, 2, 3))), {}, ValueError, r"keys have shape \(2, 0, 2, 3\)"),
        ((CACHE, SLOT.astype(jnp.bfloat16)), {}, TypeError, "keys are bfloat16 but cache.key is float32"),
        ((CACHE, jnp.zeros((2, 6, 2, 3))), {}, ValueError, "capacity=5: it must be at least the number of keys, 6"),
        ((CACHE, SLOT), {"capacity": 0}, ValueError, "capacity=0"),
        ((CACHE, SLOT), {"read_similarity": "liner"}, ValueError, "read_similarity='liner'.*'linear'"),
        ((CACHE, SLOT), {"read_scale": np.inf}, ValueError, "read_scale=inf"),
        ((CACHE, jnp.zeros((2, 2, 2, 3))), {"segment_ids": jnp.ones((2, 1), jnp.int32)}, ValueError, "segment_ids"),
        (
            (CACHE, jnp.zeros((2, 2, 2, 3))),
            {"segment_ids": jnp.array([[1, 2], [1, 1]], jnp.int32)},
            ValueError,
            "one document per row",
        ),
    ],
)
def test_errors(arguments, options, kind, message):
    with pytest.raises(kind, match=message):
        compress_cache(*arguments, **options)
