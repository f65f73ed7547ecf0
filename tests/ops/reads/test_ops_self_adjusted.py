"""Self-adjusted softmax: its weights by hand, every form against the definition, what it has not."""

import functools
from unittest import mock

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from support.ops_cases import Case, call, draw_inputs, inverse_norm, poison, segment_rows

from deltaformer_jax import SelfAdjust, causal_attention, delta_attention, delta_values
from deltaformer_jax.ops.softmax import api
from deltaformer_jax.sharding.context.chain import delta_attention_pipeline
from deltaformer_jax.sharding.context.ring import causal_attention_ring

TIME, HEADS, KV_HEADS = 19, 4, 2
NAMES = {"self_adjust": SelfAdjust(), "self_adjust_basic": SelfAdjust(normalised=False)}


def weights_by_hand(scores, basic=False):
    """κ of one row of visible scores, in NumPy."""
    p = np.exp(scores - scores.max())
    p /= p.sum()
    low, high = min(scores.min(), 0.0), max(scores.max(), 0.0)
    return p * scores if basic else p if high == low else p * (scores - low) / (high - low)


def by_hand(query, key, value, ids, basic, window):
    """Attention in NumPy, token by token: [B,T,H,V], and the least span M − m of a row that is not 0."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    out, least, group = np.zeros((*query.shape[:3], value.shape[3])), np.inf, query.shape[2] // key.shape[2]
    for b, t, h in np.ndindex(*query.shape[:3]):
        if ids[b, t]:
            seen = [i for i in range(t + 1) if ids[b, i] == ids[b, t] and (window is None or t - i < window)]
            scores = key[b, seen, h // group] @ query[b, t, h] * query.shape[3] ** -0.5
            out[b, t, h] = weights_by_hand(scores, basic) @ value[b, seen, h // group]
            least = min(least, max(scores.max(), 0) - min(scores.min(), 0) or np.inf)
    return out, least


@functools.cache
def compiled(name, implementation, window):
    @jax.jit
    def run(inputs, segment_ids, cotangent):
        how = dict(window=window, initial=2 if window else 0, implementation=implementation)
        attend = functools.partial(causal_attention, similarity=name, **how)
        out, pullback = jax.vjp(lambda inputs: attend(**inputs, segment_ids=segment_ids), inputs)
        return out, pullback(cotangent)[0]

    return run


def draw(seed, forget=False, whole=False):
    rng = np.random.default_rng(seed)
    shapes = dict(query=(HEADS, 5), key=(KV_HEADS, 5), value=(KV_HEADS, 3))
    numbers = (lambda shape: rng.integers(-1, 2, shape).astype(float)) if whole else rng.standard_normal
    inputs = {name: jnp.asarray(numbers((2, TIME, *shape))) for name, shape in shapes.items()}
    if forget:
        inputs["log_decay"] = -jnp.asarray(10.0 ** rng.uniform(-3, 1, (2, TIME, HEADS)))
    return inputs


COTANGENT = np.cos(np.arange(2 * TIME * HEADS * 3.0)).reshape(2, TIME, HEADS, 3)


@pytest.mark.parametrize(
    "name, window, forget", [("self_adjust", None, False), ("self_adjust", 6, True), ("self_adjust_basic", None, True)]
)
@hypothesis.settings(max_examples=8)
@hypothesis.given(data=st.data())
def test_forms_agree(name, window, forget, data):
    """Values and gradients, chunks of 4 rows, over packed rows with NaN in their padding, with grouped queries.

    With a window, each document's first two tokens are seen behind it.
    """
    with jax.enable_x64(True), mock.patch.object(api, "default_chunk", lambda length, window=None: 4):
        ids = data.draw(segment_rows(TIME))
        inputs = draw(data.draw(st.integers(0, 99)), forget)
        expected = compiled(name, "recurrent", window)(poison(inputs, ids), ids, COTANGENT)
        found, least = by_hand(inputs["query"], inputs["key"], inputs["value"], ids, "basic" in name, window)
        # At most T terms of a sum, each with T roundings; the gradients have 1/(M − m) as a factor, and those of decays
        # add up T more terms. Decays only make spans wider, or leave the one of a row's own score.
        bound = 16 * TIME * np.finfo(float).eps
        if not forget:
            np.testing.assert_allclose(expected[0], found, rtol=0, atol=bound * max(np.abs(found).max(), 1))
        bound *= TIME if forget else 1
        bound *= 1 if "basic" in name or np.isinf(least) else 1 + 1 / least
        for form in ("chunked",) if forget else ("parallel", "chunked"):
            actual = compiled(name, form, window)(poison(inputs, ids), ids, COTANGENT)
            for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(actual)):
                np.testing.assert_allclose(b, a, rtol=0, atol=bound * max(np.abs(a).max(), 1))


def test_equal_extremes_and_rows_of_zeros(x64):
    """Scores of whole numbers, exact in every form: many rows have several extremes, and some have nothing but zeros.

    The first of equal extremes gets the gradient, in all forms; zeros are plain softmax.
    """
    inputs = draw(3, whole=True) | {"query": 5**0.5 * draw(4, whole=True)["query"].at[0, 7:9].set(0.0)}
    ids = np.ones((2, TIME), np.int32)
    with mock.patch.object(api, "default_chunk", lambda length, window=None: 4):
        results = [compiled("self_adjust", form, None)(inputs, ids, COTANGENT) for form in ("recurrent", "chunked")]
    for a, b in zip(*map(jax.tree.leaves, results)):
        np.testing.assert_allclose(b, a, rtol=0, atol=16 * TIME * np.finfo(float).eps * np.abs(a).max())
    plain = causal_attention(**inputs, implementation="parallel")
    np.testing.assert_allclose(results[1][0][0, 7:9], plain[0, 7:9], rtol=1e-14)
    np.testing.assert_allclose(results[1][0], by_hand(*inputs.values(), ids, False, None)[0], rtol=0, atol=1e-14)


def test_a_row_by_hand_and_a_constant_added(x64):
    """softmax forgets a constant that is added to a row's scores. This does not, unless 0 lies between them."""

    def read(scores, name):
        key = jnp.asarray(scores).reshape(1, -1, 1, 1)
        value = jnp.eye(len(scores))[None, :, None]
        return causal_attention(jnp.ones_like(key), key, value, similarity=name, scale=1.0, implementation="parallel")[
            0, -1, 0
        ]

    scores = np.array([0.5, 2.0, 1.0])
    for shift in (0.0, 3.0, -1.0, -7.0):
        for name in NAMES:
            expected = weights_by_hand(scores + shift, basic=name != "self_adjust")
            np.testing.assert_allclose(read(scores + shift, name), expected, rtol=1e-14, atol=1e-16)
            if shift:
                assert np.abs(read(scores + shift, name) - read(scores, name)).max() > 0.01
    np.testing.assert_allclose(read(scores - 1, "self_adjust"), read(scores - 1.2, "self_adjust"), rtol=1e-13)
    assert read(scores + 3, "self_adjust").sum() < 1 and read([-2.0], "self_adjust") == 0


DELTA = Case("softmax", "self_adjust", heads=4, kv_heads=2, key_dim=5, value_dim=3, alpha=True, time=13, chunk=4)


@functools.cache
def delta(implementation):
    @jax.jit
    def run(inputs, segment_ids, cotangent):
        out, pullback = jax.vjp(lambda inputs: call(DELTA, inputs, implementation, segment_ids), inputs)
        return out, pullback(cotangent)[0]

    return run


@hypothesis.settings(max_examples=5)
@hypothesis.given(data=st.data())
def test_as_deltaformers_read(data):
    with jax.enable_x64(True):
        ids = data.draw(segment_rows(DELTA.time))
        inputs = draw_inputs(DELTA, data.draw(st.integers(0, 99)), jnp.float64)
        cotangent = jnp.asarray(np.random.default_rng(1).standard_normal((2, DELTA.time, 4, 3)))
        least = by_hand(inputs["query"], inputs["key"], inputs["value"], ids, False, None)[1]
        expected = delta("recurrent")(poison(inputs, ids), ids, cotangent)
        actual = delta("chunked")(poison(inputs, ids), ids, cotangent)
        # As for the other reads (test_ops_delta.tolerance), with the factor 1/(M − m) of the gradients.
        bound = 16 * DELTA.time * np.finfo(float).eps * inverse_norm(DELTA, inputs, ids) ** 2
        bound *= 1 if np.isinf(least) else 1 + 1 / least
        for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(actual)):
            np.testing.assert_allclose(b, a, rtol=0, atol=bound * max(np.abs(a).max(), 1))


@pytest.mark.parametrize("name", NAMES)
def test_decoding_is_the_whole(name, x64):
    """A prompt, then tokens one by one, with a window; a similarity by name and as an object."""
    inputs = draw(5)
    attend = functools.partial(causal_attention, similarity=NAMES[name], window=7)
    step = jax.jit(lambda inputs, cache: attend(**inputs, cache=cache))
    out, cache = attend(**{key: x[:, :9] for key, x in inputs.items()}, return_cache=True)
    parts = [out]
    for t in range(9, TIME):
        out, cache = step({key: x[:, t : t + 1] for key, x in inputs.items()}, cache)
        parts.append(out)
    whole = causal_attention(**inputs, similarity=name, window=7, implementation="chunked")
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_long_rows_in_narrow_dtypes(dtype):
    """Scores up to 60 over two chunks: |s| ≤ M − m, so that the two sums cancel no digits of the result."""
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.standard_normal((1, 600, 1, 8)), dtype) for _ in range(4)]
    arrays[0] *= 20

    @functools.partial(jax.jit, static_argnums=0)
    def run(implementation, *arrays):
        attend = functools.partial(causal_attention, similarity="self_adjust", implementation=implementation)
        out, pullback = jax.vjp(attend, *arrays[:3])
        return out, *pullback(arrays[3])

    out, *gradients = run("chunked", *arrays)
    with jax.enable_x64(True):
        exact, *expected = map(np.asarray, run("parallel", *(jnp.asarray(np.asarray(x, np.float64)) for x in arrays)))
    for found, right in zip(gradients, expected):
        # In the norm of the whole: dO·v, w, dS, o and A/l are rounded to `dtype`, then the sums; exp as below.
        error = np.linalg.norm(np.asarray(found, np.float64) - right) / np.linalg.norm(right)
        assert found.dtype == dtype and error < 8 * float(jnp.finfo(dtype).eps) + 60 * 8 * np.finfo(np.float32).eps
    # exp multiplies the rounding of scores of size 60 in float32; the products' operands and the result are `dtype`.
    atol = 60 * 8 * np.finfo(np.float32).eps + 4 * float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(np.asarray(out, np.float64), exact, rtol=0, atol=atol * np.abs(exact).max())


def test_what_it_has_not():
    q, k, v = (jnp.zeros((1, 3, 2, 8)) for _ in range(3))
    refused = pytest.raises
    for implementation in ("triton", "cudnn", "splash"):
        with refused(NotImplementedError, match=f"implementation='{implementation}'"):
            causal_attention(q, k, v, similarity="self_adjust", implementation=implementation)
    for implementation in ("triton", "pallas_tpu"):
        with refused(NotImplementedError, match=f"implementation='{implementation}'"):
            delta_attention(q, k, v, read_similarity="self_adjust", implementation=implementation)
    for name in NAMES:
        with refused(ValueError, match=f"write_similarity='{name}': self-adjusted softmax is a similarity of reads"):
            delta_attention(q, k, v, write_similarity=name)
        with refused(ValueError, match=f"write_similarity='{name}'"):
            delta_values(k, v, write_similarity=name)
    with refused(ValueError, match="similarity='linear': softmax attention has"):
        causal_attention(q, k, v, similarity="linear")
    with refused(ValueError, match="similarity='self_adjust': has no sinks"):
        causal_attention(q, k, v, similarity="self_adjust", sinks=jnp.zeros(2))
    with refused(ValueError, match="normalised must be True or False"):
        SelfAdjust(normalised=1)
    with refused(NotImplementedError, match="attention over a ring has softmax alone"):
        causal_attention_ring("context", q, k, v, similarity="self_adjust")
    with refused(NotImplementedError, match="the chain over devices has no self-adjusted softmax"):
        delta_attention_pipeline("context", q, k, v, read_similarity="self_adjust_basic")
    once = jax.grad(lambda q: jnp.sum(causal_attention(q, k, v, similarity="self_adjust")))
    with refused(NotImplementedError, match="no second derivative"):
        jax.grad(lambda q: jnp.sum(once(q)))(q)
