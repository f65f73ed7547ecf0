"""proxy_scores against NumPy, and what select_entries keeps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deltaformer_jax import KVCache, causal_attention
from deltaformer_jax.ops import compact_cache, proxy_scores, select_entries

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


def test_refusals():
    scores = jnp.zeros((2, 12))
    q, _, cache = prompt()
    for bad, kind, message in [
        (lambda: select_entries(scores, -1), ValueError, "n_top=-1: it must be an integer of at least 0"),
        (lambda: select_entries(scores, 0), ValueError, "at least one entry must be kept"),
        (lambda: select_entries(scores, 1, 1), ValueError, "n_random=1 needs a key"),
        (lambda: select_entries(scores[0], 1), ValueError, r"scores must have shape \[batch, slots\]; it has \(12,\)"),
        (
            lambda: select_entries(scores[:, :5], 1, cache=cache),
            ValueError,
            r"scores have shape \(2, 5\) but the cache",
        ),
        (lambda: proxy_scores(cache, q[:1]), ValueError, r"for this cache it must be \[2, tokens, heads, 4\]"),
        (lambda: proxy_scores(cache, q[:, :, :3]), ValueError, "query has 3 heads: it must be a multiple of key's 2"),
        (lambda: proxy_scores(q, q), TypeError, "cache must be a KUCache or a KVCache"),
    ]:
        with pytest.raises(kind, match=message):
            bad()
