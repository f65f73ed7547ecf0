"""proxy_scores against NumPy, and what select_entries and streaming_entries keep."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deltaformer_jax import KVCache, causal_attention, delta_attention
from deltaformer_jax.ops import (
    SelectedKUCache,
    SelectedKVCache,
    compact_cache,
    proxy_scores,
    select_entries,
    streaming_entries,
)

TIME, PROXIES = 9, 3


def prompt():
    """(queries, a cache with three empty slots, segment ids): row 1 begins with two tokens of padding."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((2, TIME, h, 4)), jnp.float32) for h in (4, 2, 2))
    segment_ids = np.ones((2, TIME), np.int32)
    segment_ids[1, :2] = 0
    cache = KVCache.empty(2, TIME + 3, 2, 4, 4)
    return q, k, causal_attention(q, k, v, cache=cache, segment_ids=segment_ids)[1]


def test_proxy_scores_are_what_the_last_tokens_read():
    q, k, cache = prompt()
    scores = proxy_scores(cache, q[:, -PROXIES:], scale=0.7)
    expected = np.zeros((2, TIME + 3))
    for row, skipped in enumerate((0, 2)):
        for head in range(4):
            for t in range(TIME - PROXIES, TIME):
                weights = np.exp(0.7 * k[row, skipped : t + 1, head // 2] @ q[row, t, head])
                expected[row, : t + 1 - skipped] += weights / weights.sum()
    np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-6)


def test_the_last_and_the_best_are_kept():
    _, _, cache = prompt()
    scores = jnp.asarray(
        [[5, 1, 4, 0, 9, 0, 3, 8, 2, 99, 99, 99], [0, 7, 0, 6, 0, 0, 0, 99, 99, 99, 99, 99]], jnp.float32
    )
    chosen = select_entries(scores, 2, proxies=PROXIES, cache=cache)
    np.testing.assert_array_equal(chosen, [[0, 4, 6, 7, 8], [1, 3, 4, 5, 6]])
    left = compact_cache(cache, chosen)
    np.testing.assert_array_equal(left.position, chosen)
    np.testing.assert_array_equal(left.key[0], cache.key[0, chosen[0]])
    np.testing.assert_array_equal(
        select_entries(scores, 3), [[9, 10, 11], [7, 8, 9]], err_msg="all filled, ties in order"
    )


def test_all_are_kept_if_there_is_room():
    """As many as there are slots: the identity. More than a row has filled: all of these."""
    _, _, cache = prompt()
    scores = jnp.zeros((2, TIME + 3))
    for sizes in ((12, 0), (2, 99)):
        chosen = select_entries(scores, *sizes, jax.random.key(0), proxies=1, cache=cache)
        np.testing.assert_array_equal(chosen, np.broadcast_to(np.arange(12), (2, 12)))
    left = compact_cache(cache, select_entries(scores, 3, 2, jax.random.key(0), proxies=4, cache=cache))
    np.testing.assert_array_equal(left.entries, [9, 7])


def test_draws_follow_the_softmax_of_the_scores():
    """4000 rows: the first draw's shares, which differ by less than 4 standard errors; one seed, one choice."""
    logits, rows = np.asarray([0.0, 1.0, 2.0, -1.0, 9.0]), 4000
    scores = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (rows, 5))
    draw = lambda seed: np.asarray(select_entries(scores, 1, 1, jax.random.key(seed)))
    chosen = draw(3)
    np.testing.assert_array_equal(chosen[:, 1], 4)  # the best; it is not drawn a second time
    expected = np.exp(logits[:4]) / np.exp(logits[:4]).sum()
    found = np.bincount(chosen[:, 0], minlength=4) / rows
    assert np.all(np.abs(found - expected) < 4 * np.sqrt(expected * (1 - expected) / rows))
    np.testing.assert_array_equal(draw(3), chosen)
    assert np.any(draw(4) != chosen)


def held_by_hand(separator, initial, separators, window, capacity):
    """The positions in the cache after each token, by the rule's words."""
    held, steps = [], []
    for t in range(len(separator)):
        held = [*held, t]
        steps.append(held)
        if len(held) == capacity:
            between = [i for i in held if i >= initial and i < t + 1 - window and separator[i]]
            held = [i for i in held if i < initial or i >= t + 1 - window]
            held = sorted(held + (between[-separators:] if separators else []))
    return steps


@pytest.mark.parametrize("kind", ["softmax", "delta"])
def test_streaming_through_a_cache_that_goes_up_and_down(kind):
    """140 tokens through 16 slots in one compiled scan: each sees what the rule leaves, and before the first eviction
    all there is. The entries go up and down between 2 + 3 + 5 and 16, as the mean of eq. 3 says."""
    sizes = dict(initial=2, separators=3, window=5, capacity=16)
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((1, 140, 1, 4)), jnp.float32) for _ in range(3))
    separator = rng.random(140) < 0.4
    op = causal_attention if kind == "softmax" else functools.partial(delta_attention, beta=0.5)
    kinds = {"softmax": (SelectedKVCache, (1, 16, 1, 4, 4)), "delta": (SelectedKUCache, (1, 16, 1, 1, 4, 4))}
    cls, shape = kinds[kind]

    @jax.jit
    def stream(q, k, v, keep):
        def token(cache, now):
            q, k, v, keep = (x[:, None] for x in now)
            out, cache = op(q, k, v, keep=keep, cache=cache)
            return compact_cache(cache, streaming_entries(cache, **sizes)), (
                out[0, 0, 0],
                cache.position,
                cache.entries,
            )

        each = tuple(jnp.moveaxis(x, 1, 0) for x in (q, k, v, keep))
        return jax.lax.scan(token, cls.empty(*shape), each)[1]

    out, position, entries = stream(q, k, v, separator[None])
    steps = held_by_hand(separator, **sizes)
    np.testing.assert_array_equal(entries[:, 0], [len(held) for held in steps])
    q, k, v = (np.asarray(x, np.float64)[0, :, 0] for x in (q, k, v))
    u = np.zeros_like(v)
    softmax = lambda scores: np.exp(scores) / np.exp(scores).sum() if len(scores) else scores
    for t, held in enumerate(steps):
        np.testing.assert_array_equal(position[t, 0, : len(held)], held)
        past = 0.5 * softmax(k[held[:-1]] @ k[t] / 2) @ u[held[:-1]] if kind == "delta" else 0
        u[t] = v[t] - past
        np.testing.assert_allclose(out[t], softmax(k[held] @ q[t] / 2) @ u[held], rtol=1e-4, atol=1e-5)
    full = [t for t, held in enumerate(steps) if len(held) == 16]
    cycle = [len(held) for held in steps[full[-2] : full[-1]]]
    # Of the two ends of a cycle, 10 and 16 entries, the lower is left before a token comes and seen only with it.
    assert len(full) > 10 and np.mean(cycle) == (10 + 1 + 16) / 2
    # Eq. 4: those that are neither first tokens nor separators in the separators' block, what came since the window
    # of the last eviction: from 5 and the new token to 16 − 2 − 3.
    neighbours = [np.sum(position[t, 0] > max(one for one in full if one < t) - 5) for t in range(full[-2], full[-1])]
    assert np.mean(neighbours) == (5 + 1 + 16 - 2 - 3) / 2


def test_refusals():
    scores = jnp.zeros((2, 12))
    q, _, cache = prompt()
    chosen, sizes = SelectedKVCache.of(cache), dict(initial=2, separators=3, window=4, capacity=9)
    for bad, kind, message in [
        (lambda: select_entries(scores, -1), ValueError, "n_top=-1: it must be an integer of at least 0"),
        (lambda: select_entries(scores, 0), ValueError, "at least one entry must be kept"),
        (lambda: select_entries(scores, 1, 1), ValueError, "n_random=1 needs a key"),
        (lambda: select_entries(scores, 1, 1, 3), TypeError, "key must be one key, .* not int"),
        (lambda: select_entries(scores, 1, 1, jax.random.split(jax.random.key(0))), TypeError, r"not an array .*\(2,"),
        (lambda: select_entries(scores[0], 1), ValueError, r"shape \[batch, slots\] or .*heads\]; it has \(12,\)"),
        (
            lambda: select_entries(scores[:, :5], 1, cache=cache),
            ValueError,
            r"scores have shape \(2, 5\) but the cache",
        ),
        (lambda: proxy_scores(cache, q[:1]), ValueError, r"for this cache it must be \[2, tokens, heads, 4\]"),
        (lambda: proxy_scores(cache, q[:, :, :3]), ValueError, "query has 3 heads: it must be a multiple of key's 2"),
        (lambda: proxy_scores(q, q), TypeError, "cache must be a KUCache or a KVCache"),
        (lambda: streaming_entries(cache, **sizes), TypeError, "must be a SelectedKUCache or a SelectedKVCache"),
        (lambda: streaming_entries(chosen, **sizes), ValueError, r"capacity=9: it must be greater than .* = 9 and at"),
        (lambda: streaming_entries(chosen, **{**sizes, "window": 0}), ValueError, "window=0: .* at least 1"),
    ]:
        with pytest.raises(kind, match=message):
            bad()
