"""Heads that keep entries of their own: each goes on as the op with that head alone does, from its own cache."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.ops_cases import Case, call, case_id, draw_inputs

from deltaformer_jax import KUCache, KVCache, Round, causal_attention, compress_cache
from deltaformer_jax.ops import (
    Alibi,
    SelectedKUCache,
    SelectedKVCache,
    compact_cache,
    entries_by_row,
    fold_segments,
    in_places,
    newest_lasting,
    proxy_scores,
    read_only,
    select_entries,
    streaming_entries,
    visible_entries,
    written,
)

SLOTS = 9
# Each similarity writes once and reads once; every kind of write query, with grouped heads; V != K.
CASES = [
    Case(write_query="heads", heads=4, alpha=True, key_dim=5, value_dim=3, time=6),
    Case("linear", "exp", heads=4, write_query="kv_heads", write_scale=0.25, time=6),
    Case("exp", "linear", write_scale=0.25, time=6),
    Case("relu", Round(decimals=1), write_query="query", heads=4, write_scale=0.25, time=6),
    Case("round", "relu", heads=4, write_scale=0.25, time=6),
]
PADDING = np.asarray([[[0, 1, 1], [1, 1, 1]], [[1, 1, 0], [1, 0, 0]]], np.int32)  # of two calls of three tokens


def part(x, head, heads=2):
    """The part [B, N, ·, …] of x [B, N, H, …] that belongs to one of the key heads."""
    size = x.shape[2] // heads
    return np.asarray(x)[:, :, head * size : (head + 1) * size]


def head_alone(cache, head):
    """A cache of one head, with its positions."""
    arrays = {name: part(getattr(cache, name), head).swapaxes(1, 2) for name in ("key", "value")}
    arrays = {f"{name}_by_head": x for name, x in arrays.items()}
    if getattr(cache, "decay_by_head", None) is not None:
        arrays["decay_by_head"] = part(cache.decay, head).swapaxes(1, 2)
    if hasattr(cache, "position") and cache.heads_apart:
        arrays |= dict(position=cache.position[:, :, head], lasting=cache.lasting[:, :, head])
    return cache.with_arrays(**arrays)


def same(cache, others):
    """That a cache holds what the caches of each head alone hold."""
    for head, other in enumerate(others):
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-12), head_alone(cache, head), other
        )


def go_on(op, cache, arrays, keep):
    """The outputs of two calls of three tokens, with an eviction before each: bools, then slots out of order."""
    outs = []
    for turn, segment_ids in enumerate(PADDING):
        cache = compact_cache(cache, keep[turn], capacity=SLOTS if turn == 0 else None)
        out, cache = op(poisoned(arrays, turn, segment_ids), segment_ids, cache)
        outs.append(out)
    return np.concatenate(outs, 1), cache


def poisoned(arrays, turn, segment_ids):
    """The tokens of one call, in NumPy, so that nothing is compiled for it, with NaN at padding."""
    tokens = {name: np.array(x[:, 3 * turn : 3 * turn + 3]) for name, x in arrays.items()}
    for x in tokens.values():
        x[segment_ids == 0] = np.nan
    return tokens


def check_heads(op, cache, arrays):
    """`op(arrays, segment ids, head or None, cache)` of both heads against each alone, by random choices per head."""
    rng = np.random.default_rng(1)
    keep = (
        rng.random((2, SLOTS - 3, 2)) < 0.6,
        rng.permuted(np.tile(np.arange(SLOTS)[:, None], (2, 1, 2)), axis=1)[:, :6],
    )
    keep = np.pad(keep[0], [(0, 0), (0, 3), (0, 0)]), np.pad(keep[1], [(0, 0), (0, 3), (0, 0)], mode="edge")
    out, after = go_on(lambda *given: op(None, *given), cache, arrays, keep)
    alone = []
    for head in range(2):
        own = {name: part(x, head) for name, x in arrays.items()}
        chosen = [x[:, :, head] for x in keep]
        expected, other = go_on(lambda *given, head=head: op(head, *given), head_alone(cache, head), own, chosen)
        np.testing.assert_allclose(part(out, head), expected, rtol=1e-12, atol=1e-12)
        alone.append(other)
    same(after, alone)
    assert np.any(after.position[:, :, 0] != after.position[:, :, 1])
    return after, alone


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_delta_attention_of_heads_with_their_own_entries(case, x64):
    rng = np.random.default_rng(0)
    normal = lambda heads, width: jnp.asarray(rng.standard_normal((2, SLOTS, heads, width)))
    cache = KUCache(normal(2, case.key_dim), normal(case.write_heads, case.value_dim), jnp.int32([6, 5]))
    op = lambda head, inputs, segment_ids, cache: call(case, inputs, None, segment_ids, cache=cache)
    check_heads(op, cache, {name: np.asarray(x) for name, x in draw_inputs(case, 1, jnp.float64).items()})


@pytest.mark.parametrize("forget", [False, True])
def test_softmax_attention_of_heads_with_their_own_entries(forget, x64):
    """With a window, entries that last, sinks and decays."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.standard_normal((2, *shape))
    decay = -np.cumsum(rng.random((2, SLOTS, 4)), axis=1)[:, ::-1] if forget else None
    plain = KVCache(*(jnp.asarray(normal(SLOTS, 2, 4)) for _ in range(2)), jnp.int32([6, 5]), decay)
    cache = SelectedKVCache.of(plain, jnp.asarray(rng.random((2, SLOTS)) < 0.3))
    arrays = dict(query=normal(6, 4, 4), key=normal(6, 2, 4), value=normal(6, 2, 4))
    if forget:
        arrays["log_decay"] = -rng.random((2, 6, 4))
    sinks, lasting = normal(4)[0], rng.random((2, 3)) < 0.5

    def op(head, tokens, segment_ids, cache):
        own = sinks if head is None else sinks[2 * head : 2 * head + 2]
        return causal_attention(
            **tokens, sinks=own, segment_ids=segment_ids, window=4, initial=1, keep=lasting, cache=cache
        )

    after, alone = check_heads(op, cache, arrays)
    if forget:
        return
    choices = jax.jit(
        lambda cache: (
            visible_entries(cache, 3),
            streaming_entries(cache, initial=1, separators=1, window=1, capacity=5),
            newest_lasting(cache, jnp.asarray(~lasting), jnp.asarray(PADDING[1])).lasting,
            cache.entries,
        )
    )
    for found, *expected in zip(choices(after), *map(choices, alone)):
        np.testing.assert_array_equal(found, np.stack(expected, axis=-1))


def prompt():
    """(queries of 4 heads, a cache of 2 heads with 7 and 5 of 8 slots filled)."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((2, 8, h, 4)), jnp.float32) for h in (4, 2, 2))
    return q, KVCache(k, v, jnp.int32([7, 5]))


def test_all_chosen_is_the_identity():
    _, cache = prompt()
    row, heads = (compact_cache(cache, np.ones(shape, bool)) for shape in ((2, 8), (2, 8, 2)))
    jax.tree.map(np.testing.assert_array_equal, heads, row.apart())
    np.testing.assert_array_equal(heads.entries, [[7, 7], [5, 5]])
    jax.tree.map(np.testing.assert_array_equal, compact_cache(heads, np.ones((2, 8, 2), bool)), heads)
    out, after = causal_attention(*(cache.key[:, :1],) * 3, cache=row)
    out_of_heads, after_heads = causal_attention(*(cache.key[:, :1],) * 3, cache=heads)
    np.testing.assert_allclose(out_of_heads, out, rtol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, after_heads, after.apart())


def test_entries_of_each_head_in_order():
    """Slots in any order, one twice, empty ones; positions survive, and new tokens go to the first empty slots."""
    _, cache = prompt()
    slots = np.asarray([[[6, 1], [0, 7], [6, 4]], [[2, 3], [6, 3], [4, 0]]])
    left = compact_cache(cache, slots, capacity=4)
    expected = np.asarray([[[0, 1], [6, 4], [-1, -1], [-1, -1]], [[2, 0], [4, 3], [-1, -1], [-1, -1]]])
    np.testing.assert_array_equal(left.position, expected)
    key, found = np.asarray(cache.key), np.asarray(left.key)
    for row, slot, head in np.argwhere(expected >= 0):
        np.testing.assert_array_equal(found[row, slot, head], key[row, expected[row, slot, head], head])
    assert not np.any(found[:, 2:])
    uneven = compact_cache(left, np.asarray([[[True, False]] + [[True, True]] * 3] * 2))
    np.testing.assert_array_equal(uneven.entries, [[2, 1]] * 2)

    # As a model does it: two layers in one scan, whose entries are written afterwards.
    tokens = [jnp.ones((2, 2, 2, 4))] * 3
    stacked = jax.tree.map(lambda x: np.stack([x, x]), uneven)
    assert stacked.heads_apart and stacked.entries.shape == (2, 2, 2)
    ids = np.asarray([[1, 1], [0, 1]])
    read = lambda _, cache: (None, causal_attention(*tokens, cache=cache, segment_ids=ids)[1])
    scanned = jax.jit(lambda cache: written(cache, jax.lax.scan(read, None, read_only(cache))[1], axes=1))
    after = jax.tree.map(np.asarray, scanned(stacked))
    np.testing.assert_array_equal(after.position[1, :, :, 0], [[0, 6, 7, 8], [2, 4, 5, -1]])
    np.testing.assert_array_equal(after.position[1, :, :, 1], [[4, 7, 8, -1], [3, 5, -1, -1]])
    np.testing.assert_array_equal(after.length, [[9, 6]] * 2)


def test_scores_and_choices_of_each_head():
    q, cache = prompt()
    scores = proxy_scores(cache, q[:, -2:], by_head=True)
    np.testing.assert_allclose(scores.sum(axis=2), proxy_scores(cache, q[:, -2:]), rtol=1e-5, atol=1e-6)
    chosen = select_entries(scores, 2, proxies=1, cache=cache)
    keys = jax.random.split(jax.random.key(0), 2)
    of_rows = jax.jit(functools.partial(entries_by_row, proxies=1))
    drawn = np.asarray(of_rows(jnp.zeros((2, 8, 2)), cache, np.int32([4, 3]), np.int32([3, 2]), keys))
    np.testing.assert_array_equal(drawn.sum(axis=1), [[4, 4], [3, 3]])
    assert np.any(drawn[:, :, 0] != drawn[:, :, 1])
    by_row = of_rows(scores, cache, np.int32([3, 3]), np.int32([0, 0]), keys)
    np.testing.assert_array_equal(by_row, np.any(np.arange(8)[:, None, None] == np.asarray(chosen)[:, None], axis=2))
    left = compact_cache(cache, chosen)
    for head in range(2):
        one = head_alone(cache, head)
        expected = proxy_scores(one, part(q[:, -2:], head))
        np.testing.assert_allclose(scores[:, :, head], expected, rtol=1e-5)
        np.testing.assert_array_equal(chosen[:, :, head], select_entries(expected, 2, proxies=1, cache=one))
        # What is left is scored as it would be in a cache of that head.
        again = proxy_scores(head_alone(left, head), part(q[:, -2:], head))
        found = proxy_scores(left, q[:, -2:], by_head=True)[:, :, head]
        np.testing.assert_allclose(found, again, rtol=1e-5)


def test_heads_draw_for_themselves_on_any_number_of_devices():
    """4000 rows of two heads with equal scores: each head draws by softmax(F), as if the other drew nothing."""
    logits, rows = np.asarray([0.0, 1.0, 2.0, -1.0]), 4000
    scores = jnp.broadcast_to(jnp.asarray(logits, jnp.float32)[:, None], (rows, 4, 2))
    draw = jax.jit(lambda scores, seed: select_entries(scores, 0, 1, jax.random.key(seed))[:, 0])
    chosen = np.asarray(draw(scores, 3))
    shares = np.exp(logits) / np.exp(logits).sum()
    joint = np.bincount(chosen[:, 0] * 4 + chosen[:, 1], minlength=16) / rows
    expected = np.outer(shares, shares).reshape(-1)
    assert np.all(np.abs(joint - expected) < 4 * np.sqrt(expected * (1 - expected) / rows))
    mesh = jax.make_mesh((2,), ("d",), devices=jax.devices()[:2], axis_types=(jax.sharding.AxisType.Auto,))
    for axes in (("d",), (None, None, "d")):
        over = jax.device_put(scores, jax.NamedSharding(mesh, jax.P(*axes)))
        np.testing.assert_array_equal(draw(over, 3), chosen)


def test_refusals():
    q, cache = prompt()
    heads = compact_cache(cache, np.ones((2, 8, 2), bool))
    latent = SelectedKUCache.of(KUCache(cache.key, cache.value, cache.length)).apart()
    apart = "each head of the cache keeps entries of its own"
    new = [q[:, :1], *[cache.key[:, :1]] * 2]
    for bad, kind, message in [
        (lambda: compact_cache(cache, np.ones((2, 8, 4), bool)), ValueError, r"bools \(2, 8, 2\) or slots \[2, n, 2\]"),
        (lambda: compact_cache(cache, np.ones((2, 7, 2), bool)), ValueError, r"\[batch, slots, heads\] = \(2, 8, 2\)"),
        (
            lambda: compact_cache(heads, np.ones((2, 8), bool)),
            ValueError,
            r"keep must be bools \(2, 8, 2\) .* \(2, 8\)",
        ),
        (lambda: compact_cache(heads, np.ones((2, 8, 2), bool), capacity=6), ValueError, "a head keeps 7 entries"),
        (lambda: proxy_scores(heads, q), ValueError, "by_head=False: each head of this cache keeps"),
        (lambda: select_entries(jnp.zeros((2, 8)), 1, cache=heads), ValueError, r"the cache's slots are \(2, 8, 2\)"),
        (lambda: entries_by_row(jnp.zeros((2, 8, 3)), cache, 1, 0, None, proxies=0), ValueError, r"are \(2, 8, 2\)"),
        (lambda: in_places(heads), NotImplementedError, f"in_places: {apart}"),
        (lambda: fold_segments(heads, np.ones((2, 8, 2), bool)), NotImplementedError, f"fold_segments: {apart}"),
        (lambda: compress_cache(latent, cache.key[:, :1]), NotImplementedError, f"compress_cache: {apart}"),
        (
            lambda: causal_attention(*new, cache=heads, position_bias=Alibi(jnp.ones(4))),
            NotImplementedError,
            f"write_bias, read_bias and position_bias: {apart}",
        ),
        (
            lambda: causal_attention(*[cache.key[:, :2]] * 3, cache=heads),
            ValueError,
            "cache is full: row 0 holds 7 of 8 tokens and this call adds 2",
        ),
    ]:
        with pytest.raises(kind, match=message):
            bad()
