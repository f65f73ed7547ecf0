"""causal_attention: every form against the definition, and the definition against jax.nn."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from support.ops_cases import poison, segment_rows

from deltaformer_jax import causal_attention


@functools.cache
def compiled(implementation, window):
    @jax.jit
    def run(inputs, segment_ids, cotangent):
        attend = lambda inputs: causal_attention(
            **inputs, window=window, segment_ids=segment_ids, implementation=implementation
        )
        out, pullback = jax.vjp(attend, inputs)
        return out, pullback(cotangent)[0]

    return run


def draw(time, seed=0, heads=4, kv_heads=2, batch=2, forget=False, sinks=False):
    rng = np.random.default_rng(seed)
    shapes = dict(query=(heads, 5), key=(kv_heads, 5), value=(kv_heads, 3))
    inputs = {name: jnp.asarray(rng.standard_normal((batch, time, *shape))) for name, shape in shapes.items()}
    if forget:
        # From gates that keep everything to gates that leave nothing.
        inputs["log_decay"] = -jnp.asarray(10.0 ** rng.uniform(-3, 3, (batch, time, heads)))
    if sinks:
        inputs["sinks"] = jnp.asarray(rng.standard_normal(heads))
    return inputs


@pytest.mark.parametrize("implementation", ["parallel", "chunked"])
@pytest.mark.parametrize(
    "window, forget, sinks", [(None, False, False), (1, False, True), (6, True, True), (None, True, False)]
)
@hypothesis.settings(max_examples=6)
@hypothesis.given(data=st.data())
def test_forms_agree(window, forget, sinks, implementation, data):
    with jax.enable_x64(True):
        segment_ids = data.draw(segment_rows(19))
        inputs = draw(19, data.draw(st.integers(0, 99)), forget=forget, sinks=sinks)
        inputs = {**inputs, **poison({name: x for name, x in inputs.items() if name != "sinks"}, segment_ids)}
        cotangent = jnp.cos(jnp.arange(2 * 19 * 4 * 3.0)).reshape(2, 19, 4, 3)
        expected = compiled("recurrent", window)(inputs, segment_ids, cotangent)
        actual = compiled(implementation, window)(inputs, segment_ids, cotangent)
        for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(actual)):
            # Convex combinations of at most T terms: T roundings, and no magnification. A log decay's gradient adds up
            # those of all pairs around it, T more.
            many = 19 * 19 if forget else 19
            np.testing.assert_allclose(b, a, rtol=0, atol=16 * many * np.finfo(float).eps * max(np.abs(a).max(), 1))


def test_decay_and_sink_by_hand(x64):
    """Two tokens, q·k = 0: the weights are 1, e^g and e^b over their sum."""
    g, b = -0.7, 0.4
    out = causal_attention(
        jnp.zeros((1, 2, 1, 1)),
        jnp.zeros((1, 2, 1, 1)),
        jnp.asarray([10.0, 3.0]).reshape(1, 2, 1, 1),
        log_decay=jnp.asarray([-9.0, g]).reshape(1, 2, 1),
        sinks=jnp.asarray([b]),
    )
    expected = [10 / (1 + np.exp(b)), (10 * np.exp(g) + 3) / (1 + np.exp(g) + np.exp(b))]
    np.testing.assert_allclose(out.ravel(), expected, rtol=1e-14)


@pytest.mark.parametrize("dtype, strength", [(jnp.float32, 1e3), (jnp.float32, 1e-4), (jnp.bfloat16, 1.0)])
def test_decay_keeps_its_digits_over_many_chunks(dtype, strength):
    """1300 tokens after strong decays: differences of cumulative sums of 1e6 would be off by 0.06, these are not."""
    inputs = draw(1300, batch=1)
    rng = np.random.default_rng(1)
    sizes = rng.uniform(size=(1, 1300, 4)) * (rng.uniform(size=(1, 1300, 4)) < 0.5)
    inputs["log_decay"] = -jnp.asarray(strength * sizes)
    inputs = jax.tree.map(lambda x: x.astype(dtype), inputs)
    actual = compiled("chunked", None)(inputs, None, jnp.ones((1, 1300, 4, 3), dtype))
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: x.astype(jnp.float64), inputs)
        expected = compiled("parallel", None)(wide, None, jnp.ones((1, 1300, 4, 3)))
    eps = float(jnp.finfo(dtype).eps)
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(actual)):
        # Scores of size 5 rounded once, weights and values once; a gradient adds up to T such terms at random.
        a, b = np.asarray(a), np.asarray(b, np.float64)
        assert np.abs(b - a).max() <= 16 * np.sqrt(1300) * eps * max(np.abs(a).max(), 1)


@pytest.mark.parametrize("window", [None, 100])
def test_many_chunks(window, x64):
    """1100 tokens: three chunks, the last one short; a window that lets some chunks be passed over."""
    inputs = draw(1100, batch=1)
    segment_ids = jnp.asarray([[1] * 700 + [2] * 400])
    cotangent = jnp.ones((1, 1100, 4, 3))
    expected = compiled("parallel", window)(inputs, segment_ids, cotangent)
    actual = compiled("chunked", window)(inputs, segment_ids, cotangent)
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(actual)):
        np.testing.assert_allclose(b, a, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("implementation", [None, "recurrent", "parallel", "chunked"])
def test_equals_jax_nn(implementation):
    inputs = jax.tree.map(lambda x: x.astype(jnp.float32), draw(33))
    inputs["value"] = jnp.concatenate([inputs["value"], inputs["value"][..., :2]], -1)  # jax.nn wants V = K
    expected = jax.nn.dot_product_attention(
        inputs["query"], inputs["key"], inputs["value"], is_causal=True, local_window_size=(9, 0)
    )
    actual = causal_attention(**inputs, window=10, implementation=implementation)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def test_window_larger_than_the_text_is_no_window(x64):
    inputs = draw(12)
    np.testing.assert_allclose(causal_attention(**inputs, window=50), causal_attention(**inputs), rtol=1e-12)


def test_no_second_derivative():
    inputs = jax.tree.map(lambda x: x.astype(jnp.float32), draw(6))
    slope = lambda x: (jax.grad(lambda x: (causal_attention(**{**inputs, "key": x}) ** 2).sum())(x) ** 2).sum()
    with pytest.raises(NotImplementedError, match="second derivative"):
        jax.grad(slope)(inputs["key"])
