"""causal_attention: every form against the definition, and the definition against jax.nn."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from ops_cases import poison, segment_rows

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


def draw(time, seed=0, heads=4, kv_heads=2, batch=2):
    rng = np.random.default_rng(seed)
    shapes = dict(query=(heads, 5), key=(kv_heads, 5), value=(kv_heads, 3))
    return {name: jnp.asarray(rng.standard_normal((batch, time, *shape))) for name, shape in shapes.items()}


@pytest.mark.parametrize("implementation", ["parallel", "chunked"])
@pytest.mark.parametrize("window", [None, 1, 6])
@hypothesis.settings(max_examples=6)
@hypothesis.given(data=st.data())
def test_forms_agree(window, implementation, data):
    with jax.enable_x64(True):
        segment_ids = data.draw(segment_rows(19))
        inputs = poison(draw(19, data.draw(st.integers(0, 99))), segment_ids)
        cotangent = jnp.cos(jnp.arange(2 * 19 * 4 * 3.0)).reshape(2, 19, 4, 3)
        expected = compiled("recurrent", window)(inputs, segment_ids, cotangent)
        actual = compiled(implementation, window)(inputs, segment_ids, cotangent)
        for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(actual)):
            # Convex combinations of at most T terms: T roundings, and no magnification.
            np.testing.assert_allclose(b, a, rtol=0, atol=16 * 19 * np.finfo(float).eps * max(np.abs(a).max(), 1))


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
