"""Going on from a cache: prefill, chunked prefill and decoding equal one call over everything."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.ops_cases import CASES, Case, call, case_id, draw_inputs, padded_rows, poison

from deltaformer_jax import KUCache, KVCache, Round, causal_attention, delta_attention, shift_mix
from deltaformer_jax.ops import token_positions


def pieces(x, start, stop):
    return jax.tree.map(lambda x: x[:, start:stop], x)


@pytest.mark.parametrize("case", [CASES[i] for i in (0, 1, 2, 4, 6, 7, 8, 9, 12)], ids=case_id)
def test_prefill_then_decode_equals_the_full_call(case, x64):
    """A prompt, a second prompt in blocks, then token by token, with room to spare."""
    inputs = draw_inputs(case, 1, jnp.float64)
    whole = call(case, inputs, "recurrent")
    cache = KUCache.empty(2, case.time + 3, case.kv_heads, case.write_heads, case.key_dim, case.value_dim, jnp.float64)
    step = jax.jit(lambda inputs, cache: call(case, inputs, None, cache=cache))
    outs = []
    stops = [0, case.time // 3, case.time // 3 + 4, *range(case.time // 3 + 5, case.time + 1)]
    for start, stop in itertools.pairwise(stops):
        out, cache = step(pieces(inputs, start, stop), cache)
        outs.append(out)
    np.testing.assert_allclose(jnp.concatenate(outs, 1), whole, rtol=1e-10, atol=1e-11)
    np.testing.assert_array_equal(cache.length, case.time)


@functools.cache
def compiled(case, implementation, padded, **more):
    """The call, compiled once for all lengths; with a cache when `cache` is given at run time."""
    run = lambda inputs, segment_ids, cache: call(
        case, inputs, implementation, segment_ids if padded else None, cache=cache, **more
    )
    return jax.jit(run)


@pytest.mark.parametrize("implementation", ["recurrent", "parallel", "chunked"])
@settings(max_examples=8)
@given(data=st.data())
def test_ragged_prompts_then_decoding(implementation, data):
    """Rows of different lengths, padded left and right with NaN: each goes on as if it were alone and unpadded."""
    with jax.enable_x64(True):
        case = Case(heads=4, kv_heads=2, time=12, chunk=5, write_query="query")
        inputs = draw_inputs(case, 3, jnp.float64)
        segment_ids = data.draw(padded_rows(8))
        prompt, rest = pieces(inputs, 0, 8), pieces(inputs, 8, 12)
        prompt = poison(prompt, segment_ids)
        if data.draw(st.booleans()):
            empty = KUCache.empty(2, 12, 2, 4, 4, 4, jnp.float64)
            out, cache = compiled(case, implementation, True)(prompt, segment_ids, empty)
        else:
            out, cache = compiled(case, implementation, True, return_cache=True)(prompt, segment_ids, None)
            grow = lambda x: jnp.pad(x, [(0, 0), (0, 4), (0, 0), (0, 0)])
            cache = KUCache(grow(cache.key), grow(cache.value), cache.length)
        np.testing.assert_array_equal(cache.length, (segment_ids != 0).sum(1))
        np.testing.assert_array_equal(np.where((segment_ids == 0)[..., None, None], out, 0), 0)
        decoded = []
        for t in range(4):
            step, cache = compiled(case, implementation, False)(pieces(rest, t, t + 1), None, cache)
            decoded.append(step)
        decoded = np.concatenate(decoded, 1)
        for row in range(2):
            # The same row with its padding moved to the end, where it cannot matter.
            real = segment_ids[row] != 0
            order = np.concatenate([np.flatnonzero(real), np.arange(8, 12), np.flatnonzero(~real)])
            ids = (np.arange(12) < real.sum() + 4).astype(np.int32)[None]
            alone = jax.tree.map(lambda x, row=row, order=order: x[row][order][None], inputs)
            expected = np.asarray(compiled(case, "recurrent", True)(alone, ids, None))[0]
            np.testing.assert_allclose(np.asarray(out)[row][real], expected[: real.sum()], rtol=1e-10, atol=1e-11)
            np.testing.assert_allclose(decoded[row], expected[real.sum() : real.sum() + 4], rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("forget", [False, True])
@pytest.mark.parametrize("window", [None, 1, 5])
@pytest.mark.parametrize("first", [3, 11])
def test_attention_decodes_through_its_ring(window, first, forget, x64):
    """With a window the cache is a ring of that many slots, however long the text; a prompt may be longer than it."""
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.standard_normal((2, 20, h, 4))) for h in (4, 2, 2)]
    sinks = jnp.asarray(rng.standard_normal(4)) if forget else None
    arrays.append(-jnp.asarray(10.0 ** rng.uniform(-3, 2, (2, 20, 4))) if forget else None)

    def attend(start, stop, **more):
        q, k, v, g = (None if x is None else x[:, start:stop] for x in arrays)
        return causal_attention(q, k, v, window=window, log_decay=g, sinks=sinks, **more)

    whole = attend(0, 20, implementation="recurrent")
    out, cache = attend(0, first, return_cache=True)
    assert cache.capacity == (window or first)
    if window is None:
        cache = KVCache.empty(2, 20, 2, 4, 4, jnp.float64, decay_heads=4 if forget else None)
        out, cache = attend(0, first, cache=cache)
    outs = [out]
    stops = [first, first + 6, *range(first + 7, 21)]
    for start, stop in itertools.pairwise(stops):
        out, cache = attend(start, stop, cache=cache)
        outs.append(out)
    np.testing.assert_allclose(jnp.concatenate(outs, 1), whole, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("implementation", ["recurrent", "parallel", "chunked"])
def test_attention_with_padded_prompts(implementation, x64):
    rng = np.random.default_rng(0)
    inputs = {name: jnp.asarray(rng.standard_normal((2, 9, 2, 4))) for name in ("query", "key", "value")}
    inputs["log_decay"] = -jnp.asarray(rng.uniform(size=(2, 9, 2)))
    segment_ids = np.asarray([[0, 0, 1, 1, 1, 0, 0, 0, 0], [1] * 8 + [0]])
    poisoned = poison(inputs, segment_ids)
    out, cache = causal_attention(**poisoned, window=3, segment_ids=segment_ids, return_cache=True)
    token = {name: x[:, :1] for name, x in inputs.items()}
    more, cache = causal_attention(**token, window=3, cache=cache, implementation=implementation)
    for row, real in enumerate(segment_ids != 0):
        alone = {name: jnp.concatenate([x[row][real], x[row, :1]])[None] for name, x in inputs.items()}
        expected = causal_attention(**alone, window=3, implementation="recurrent")[0]
        np.testing.assert_allclose(jnp.concatenate([out[row][real], more[row]]), expected, rtol=1e-11, atol=1e-12)


def test_gradients_flow_through_the_cache(x64):
    """What came before is trained by what comes after, as in one call."""
    case = Case(heads=4, kv_heads=2, time=10, chunk=4)
    inputs = draw_inputs(case, 0, jnp.float64)

    def in_two(inputs):
        out, cache = call(case, pieces(inputs, 0, 6), None, cache=KUCache.empty(2, 10, 2, 2, 4, 4, jnp.float64))
        more, _ = call(case, pieces(inputs, 6, 10), None, cache=cache)
        return (jnp.concatenate([out, more], 1) ** 2).sum()

    expected = jax.jit(jax.grad(lambda inputs: (call(case, inputs, "recurrent") ** 2).sum()))(inputs)
    actual = jax.jit(jax.grad(in_two))(inputs)
    for name in expected:
        np.testing.assert_allclose(actual[name], expected[name], rtol=1e-9, atol=1e-11, err_msg=name)


def test_narrow_cache_keeps_its_dtype():
    case = Case(time=6)
    inputs = draw_inputs(case, 0, jnp.bfloat16)
    out, cache = call(case, inputs, None, return_cache=True)
    out, cache = call(case, pieces(inputs, 0, 1), None, cache=KUCache.empty(2, 4, 2, 2, 4, 4, jnp.bfloat16))
    assert out.dtype == cache.key.dtype == cache.value.dtype == jnp.bfloat16


def unit_keys():
    """256 unit vectors in 128 dimensions: the identity and a Hadamard basis, whose |cosine| is 128 ** -0.5 or 0."""
    hadamard = np.ones((1, 1))
    while len(hadamard) < 128:
        hadamard = np.block([[hadamard, hadamard], [hadamard, -hadamard]])
    return np.concatenate([np.eye(128), hadamard / np.sqrt(128)])


@pytest.mark.parametrize("similarity, exact", [(Round(decimals=0), True), ("linear", False)])
def test_theorem_1_swaps_are_exact(similarity, exact, x64):
    """n = 256 slots in K = 128 dimensions, 2000 swaps, one token each, through the cache; then every slot is read.

    Writing k_i, v_i fills slot i; a token with key k_a − k_b and value 0 swaps slots a and b (Xu et al., Theorem 1).
    With integer rounding cross-talk of 0.088 vanishes; the linear similarity cannot hold more slots than dimensions.
    """
    n, width, swaps = 256, 8, 2000
    rng = np.random.default_rng(0)
    keys, values = unit_keys(), rng.standard_normal((n, width))
    settings = dict(write_similarity=similarity, read_similarity=similarity, write_scale=1.0, read_scale=1.0)
    lift = lambda x: jnp.asarray(x)[None, :, None, :]
    cache = KUCache.empty(1, n + swaps + n, 1, 1, 128, width, jnp.float64)
    _, cache = delta_attention(lift(keys), lift(keys), lift(values), **settings, cache=cache, implementation="parallel")

    pairs = np.stack([rng.choice(n, 2, replace=False) for _ in range(swaps)])
    expected = values.copy()
    for a, b in pairs:
        expected[[a, b]] = expected[[b, a]]

    @jax.jit
    def swap_all(cache, tokens):
        def swap(cache, token):
            token = token[None, None, None, :]
            _, cache = delta_attention(token, token, jnp.zeros((1, 1, 1, width)), **settings, cache=cache)
            return cache, None

        return jax.lax.scan(swap, cache, tokens)[0]

    cache = swap_all(cache, jnp.asarray(keys[pairs[:, 0]] - keys[pairs[:, 1]]))
    # α = β = 0: these tokens write u = 0 and so only read.
    nothing = jnp.zeros((1, n, 1))
    read, _ = delta_attention(
        lift(keys),
        lift(keys),
        lift(values),
        alpha=nothing,
        beta=nothing,
        **settings,
        cache=cache,
        implementation="parallel",
    )
    error = np.abs(np.asarray(read[0, :, 0]) - expected).max()
    # Each slot's value is a sum of n + swaps terms that cancel to one of the first values: one rounding a term.
    assert (error < (n + swaps) * np.finfo(float).eps * np.abs(values).max()) == exact, error
    if not exact:
        assert error > 0.1


@settings(max_examples=20)
@given(data=st.data())
def test_positions_count_real_tokens(data):
    segment_ids = data.draw(padded_rows(9))
    positions = np.asarray(token_positions(jnp.asarray(segment_ids), 2, 9, jnp.asarray([0, 5])))
    for row, real in enumerate(segment_ids != 0):
        np.testing.assert_array_equal(positions[row][real], np.arange(real.sum()) + (0, 5)[row])


@pytest.mark.parametrize("with_last", [False, True])
@settings(max_examples=20)
@given(data=st.data())
def test_shift_mix_is_the_two_term_sum(with_last, data):
    """Against a loop; in two calls with `last` it equals one call; padding may hold NaN."""
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    segment_ids = data.draw(padded_rows(7))
    x = rng.standard_normal((2, 7, 3, 4)).astype(np.float32)
    last = rng.standard_normal((2, 3, 4)).astype(np.float32) if with_last else None
    current, previous = rng.standard_normal((2, 3)).astype(np.float32)
    expected = np.zeros_like(x)
    for b in range(2):
        before = last[b] if with_last else np.zeros((3, 4), np.float32)
        for t in range(7):
            if segment_ids[b, t]:
                expected[b, t] = current[:, None] * x[b, t] + previous[:, None] * before
                before = x[b, t]
    poisoned = jnp.asarray(np.where((segment_ids == 0)[..., None, None], np.nan, x))
    actual = shift_mix(
        poisoned, jnp.asarray(current), jnp.asarray(previous), segment_ids=jnp.asarray(segment_ids), last=last
    )
    np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-6)


def test_shift_mix_resets_with_each_document():
    x = jnp.arange(1.0, 7.0).reshape(1, 6, 1, 1)
    mixed = shift_mix(x, jnp.ones(1), 10 * jnp.ones(1), segment_ids=jnp.asarray([[1, 1, 2, 2, 0, 3]]))
    np.testing.assert_array_equal(mixed[0, :, 0, 0], [1, 12, 3, 34, 0, 6])
    np.testing.assert_array_equal(shift_mix(x, jnp.ones(1), 10 * jnp.ones(1))[0, :, 0, 0], [1, 12, 23, 34, 45, 56])
