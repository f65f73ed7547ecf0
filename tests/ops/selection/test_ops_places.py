"""Entries numbered by places, what the newest of them are, folding of segments, and choices that differ by row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deltaformer_jax import KUCache, KVCache
from deltaformer_jax.ops import (
    SelectedKUCache,
    SelectedKVCache,
    compact_cache,
    compress_cache,
    entries_by_row,
    fold_segments,
    in_places,
    newest_lasting,
    proxy_scores,
    select_entries,
)


def cache_of(length=(6, 4), slots=8, heads=2, u_heads=4):
    rng = np.random.default_rng(0)
    key, value = (
        jnp.asarray(
            rng.standard_normal((2, slots, h, 4)) * (np.arange(slots) < np.array(length)[:, None])[..., None, None]
        )
        for h in (heads, u_heads)
    )
    return SelectedKUCache.of(KUCache(key.astype(jnp.float32), value.astype(jnp.float32), jnp.int32(length)))


def test_entries_move_to_their_places():
    cache = cache_of()
    left = compact_cache(cache, jnp.asarray([[0, 2, 5], [3, 1, 7]]), capacity=4)
    np.testing.assert_array_equal(left.position, [[0, 2, 5, -1], [1, 3, -1, -1]])
    turn = lambda key, by: key + by[:, :, None, None].astype(key.dtype)
    moved = in_places(left, turn)
    np.testing.assert_array_equal(moved.position, [[0, 1, 2, -1], [0, 1, -1, -1]])
    np.testing.assert_array_equal(moved.length, [3, 2])
    by = np.array([[0, -1, -3, 0], [-1, -2, 0, 0]], np.float32)
    np.testing.assert_array_equal(moved.key, np.asarray(left.key) + by[..., None, None])
    # What has its place already is not even turned by 0, which could round.
    again = in_places(moved, lambda key, by: key * jnp.nan)
    jax.tree.map(np.testing.assert_array_equal, again, moved)


def test_slopes_count_places():
    """A decay of −0.5 and −0.25 a position: after the move, as many of them as entries follow."""
    rng, slopes = np.random.default_rng(0), np.array([0.5, 0.25], np.float32)
    key, gate = rng.standard_normal((1, 6, 2, 4)).astype(np.float32), rng.standard_normal((1, 6, 2)).astype(np.float32)
    after = np.arange(5, -1, -1, dtype=np.float32)
    plain = KVCache(key, key, jnp.int32([6]), jnp.asarray(gate - after[None, :, None] * slopes))
    left = compact_cache(SelectedKVCache.of(plain), jnp.asarray([[0, 3, 4]]))
    moved = in_places(left, None, jnp.asarray(slopes))
    np.testing.assert_allclose(moved.decay[0], gate[0, [0, 3, 4]] - after[3:, None] * slopes, rtol=1e-6, atol=1e-6)


def test_the_newest_are_marked():
    lasting = jnp.asarray([[True, False, True], [True, True, False]])
    marked = newest_lasting(cache_of(), lasting, jnp.asarray([[1, 1, 1], [0, 1, 1]]))
    np.testing.assert_array_equal(np.nonzero(marked.lasting[0])[0], [3, 5])
    np.testing.assert_array_equal(np.nonzero(marked.lasting[1])[0], [2])


def test_a_segment_is_folded_as_compress_cache_reads_it():
    """Separators 2, 4 and 5 of six entries; 0, 1 and 3 are dropped, and separator 4 with the segment of 3."""
    cache = cache_of(length=(6, 6))
    cache = cache.with_arrays(lasting=jnp.zeros((2, 8), bool).at[:, jnp.asarray([2, 4, 5])].set(True))
    keep = jnp.zeros((2, 8), bool).at[:, jnp.asarray([2, 5])].set(True)
    folded = fold_segments(cache, keep, read_scale=0.7)
    segment = KUCache(cache.key[:, :3], cache.value[:, :3], jnp.int32([3, 3]))
    expected = compress_cache(segment, cache.key[:, 2:3], read_scale=0.7).value[:, 0]
    np.testing.assert_allclose(folded.value[:, 2], expected, rtol=1e-5, atol=1e-6)
    others = np.arange(8) != 2
    np.testing.assert_array_equal(folded.value[:, others], cache.value[:, others])
    np.testing.assert_array_equal(folded.key, cache.key)


def test_each_row_keeps_its_own_number():
    """Top and proxies as `select_entries` of each row; draws by the row's own key, whatever its neighbours."""
    cache = cache_of(length=(8, 5))
    scores = jnp.asarray(np.random.default_rng(1).standard_normal((2, 8)), jnp.float32)
    keys = jax.random.split(jax.random.key(3), 2)
    choose = lambda kept, drawn, keys=keys: np.asarray(
        entries_by_row(scores, cache, jnp.int32(kept), jnp.int32(drawn), keys, proxies=2)
    )
    found = choose([5, 3], [0, 0])
    for row, top in enumerate((3, 1)):
        expected = select_entries(scores, top, proxies=2, cache=cache)[row]
        np.testing.assert_array_equal(np.nonzero(found[row])[0], expected)
    drawn = choose([6, 4], [2, 1])
    np.testing.assert_array_equal(drawn.sum(axis=1), [6, 4])
    np.testing.assert_array_equal(drawn, choose([6, 4], [2, 1]))
    assert np.all(drawn[0, 6:]) and np.all(drawn[1, 3:5])
    np.testing.assert_array_equal(drawn[0], choose([6, 3], [2, 0])[0])
    assert len({tuple(choose([4, 4], [2, 0], jax.random.split(jax.random.key(i), 2))[0]) for i in range(8)}) > 1
    # The proxies stay even if there is no room for them; more than there is: all.
    np.testing.assert_array_equal(choose([1, 99], [1, 3]).sum(axis=1), [2, 5])


def test_scores_with_decay_and_without_the_token_itself():
    rng = np.random.default_rng(0)
    key, query = (rng.standard_normal((1, t, 1, 4)).astype(np.float32) for t in (5, 2))
    gates = rng.standard_normal((1, 5, 1)).astype(np.float32)
    sums = np.cumsum(gates[0, :, 0])
    cache = KVCache(key, key, jnp.int32([5]), jnp.asarray(sums[-1] - sums)[None, :, None])
    for strict in (False, True):
        expected = np.zeros(5)
        for p, t in enumerate((3, 4)):
            scores = key[0, : t + 1 - strict, 0] @ query[0, p, 0] / 2 + (sums[t] - sums[: t + 1 - strict])
            expected[: t + 1 - strict] += np.exp(scores) / np.exp(scores).sum()
        np.testing.assert_allclose(proxy_scores(cache, query, strict=strict)[0], expected, rtol=1e-5)


def test_refusals():
    cache, plain = cache_of(), KUCache.empty(2, 8, 2, 4, 4, 4)
    for bad, kind, message in [
        (lambda: in_places(plain), TypeError, "must be a SelectedKUCache or a SelectedKVCache, not KUCache"),
        (lambda: newest_lasting(cache, jnp.zeros((2, 3))), ValueError, r"lasting must be bools \[2, tokens\]"),
        (lambda: fold_segments(plain, jnp.zeros((2, 8), bool)), TypeError, "must be a SelectedKUCache"),
        (lambda: fold_segments(cache, jnp.zeros((2, 7), bool)), ValueError, r"keep must be bools \(2, 8\)"),
    ]:
        with pytest.raises(kind, match=message):
            bad()
