"""None follows the platform the program is compiled for; a named kernel runs there or is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deltaformer_jax import causal_attention, delta_attention, gated_delta_rule, gated_linear_attention
from pallas_kernels.tpu import splash

SEGMENTS = np.asarray([[1] * 100 + [2] * 150 + [0] * 50, [0] * 20 + [3] * 280], np.int32)


def draw(dtype=jnp.bfloat16, value_dim=64):
    rng = np.random.default_rng(0)
    sizes = dict(query=(4, 64), key=(2, 64), value=(2, value_dim))
    return {name: jnp.asarray(rng.standard_normal((2, 300, *size)), dtype) for name, size in sizes.items()}


def lowered(function, platform, *arguments):
    """The program's text, for a platform that need not be here."""
    return jax.export.export(jax.jit(function), platforms=[platform])(*arguments).mlir_module()


def kernels(text):
    return text.count("tpu_custom_call")


def test_on_tpu_the_baseline_is_splash_attention():
    forward = lambda x: causal_attention(**x, segment_ids=SEGMENTS)
    gradient = jax.grad(lambda x: forward(x).astype(jnp.float32).sum())
    assert kernels(lowered(forward, "tpu", draw())) == 1
    assert kernels(lowered(gradient, "tpu", draw())) == 3  # forward, dQ, and dK with dV
    assert kernels(lowered(forward, "cpu", draw())) == 0


@pytest.mark.parametrize(
    "change",
    [dict(log_decay=jnp.zeros((2, 300, 4))), dict(sinks=jnp.zeros(4)), dict(implementation="chunked")],
    ids=lambda change: next(iter(change)),
)
def test_what_splash_lacks_is_chunked(change):
    assert kernels(lowered(lambda x: causal_attention(**x, **change), "tpu", draw())) == 0


@pytest.mark.parametrize("inputs", [draw(jnp.float32), draw(value_dim=32)], ids=["float32", "two widths"])
def test_inputs_that_splash_does_not_take_are_chunked(inputs):
    assert kernels(lowered(lambda x: causal_attention(**x), "tpu", inputs)) == 0
    with pytest.raises(NotImplementedError, match=r"implementation='splash': splash attention .*; use None or"):
        causal_attention(**inputs, implementation="splash")


@pytest.mark.parametrize("window", [None, 70])
@pytest.mark.parametrize("segment_ids", [None, SEGMENTS], ids=["one document", "packed and padded"])
def test_splash_attention_is_causal_attention(window, segment_ids):
    """Its arithmetic, interpreted, at a length that is no multiple of its tiles, with grouped queries."""
    inputs = draw()
    expected = causal_attention(**inputs, window=window, segment_ids=segment_ids, implementation="parallel")
    run = lambda q, k, v: splash.attend(q, k, v, segment_ids, scale=64**-0.5, window=window, interpret=True)
    actual = np.asarray(jax.jit(run)(*inputs.values()), np.float32)
    if segment_ids is not None:
        actual = np.where((segment_ids != 0)[..., None, None], actual, 0)
    # q · scale, the weights and the output are rounded to bfloat16: four roundings of values below 4.
    np.testing.assert_allclose(actual, np.asarray(expected, np.float32), rtol=0, atol=4 * 4 * 2**-8)


def test_grouped_queries_in_bfloat16_with_64_bit_numbers(x64):
    """Every platform's kernels are traced, so that one of them that fails must be left out on all of them."""
    out = jax.jit(lambda x: causal_attention(**x))(draw())
    expected = causal_attention(**draw(), implementation="parallel")
    np.testing.assert_allclose(out.astype(float), expected.astype(float), rtol=0, atol=2**-7)  # an ulp at 2


def test_named_kernels_are_refused_elsewhere():
    with pytest.raises(NotImplementedError, match="'splash' runs on tpu only: use None or 'chunked'"):
        causal_attention(**draw(), implementation="splash")
    with pytest.raises(NotImplementedError, match=r"'cudnn': .* needs an NVIDIA device .*; use None or 'chunked'"):
        causal_attention(**draw(), implementation="cudnn")
    assert kernels(lowered(lambda x: causal_attention(**x, implementation="splash"), "tpu", draw())) == 1


X = jnp.ones((2, 40, 2, 32))
GATE = jnp.full((2, 40, 2), 0.5)
FOR_TPU = {
    "delta_attention": lambda x: delta_attention(x, x, x, beta=GATE, segment_ids=jnp.ones((2, 40), jnp.int32)),
    "one pass": lambda x: delta_attention(x, x, x, write_query="query"),
    "rounded": lambda x: delta_attention(x, x, x, write_similarity="round", read_similarity="exp"),
    "mapped": jax.vmap(lambda x: delta_attention(x[None], x[None], x[None])),
    "gated_delta_rule": lambda x: gated_delta_rule(x, x, x, beta=GATE, log_decay=-GATE)[0],
    "a decay a channel": lambda x: gated_linear_attention(x, x, x, log_decay=-x)[0],
}


@pytest.mark.parametrize("function", FOR_TPU.values(), ids=FOR_TPU)
def test_on_tpu_the_kernels_are_taken_and_lower_where_no_device_is_known(function):
    gradient = jax.grad(lambda x: function(x).sum())
    assert kernels(lowered(gradient, "tpu", X)) == 2
    assert kernels(lowered(gradient, "cpu", X)) == 0


def test_a_cache_is_filled_by_the_kernels_and_gone_on_from_without_them():
    prefill = lambda x: delta_attention(x, x, x, return_cache=True)
    assert kernels(lowered(prefill, "tpu", X)) == 1
    cache = jax.eval_shape(prefill, X)[1]
    decode = lambda x, cache: delta_attention(x, x, x, cache=cache)[0]
    assert kernels(lowered(decode, "tpu", X[:, :1], cache)) == 0


@pytest.mark.parametrize("differentiated", [False, True], ids=["value", "gradient"])
def test_named_on_another_platform_is_refused(differentiated):
    function = lambda x: delta_attention(x, x, x, implementation="pallas_tpu").sum()
    with pytest.raises(NotImplementedError, match="implementation='pallas_tpu' runs on tpu only: use None or"):
        lowered(jax.grad(function) if differentiated else function, "cpu", X)
    with pytest.raises(NotImplementedError, match="one dtype of bfloat16, float32"):
        jax.eval_shape(function, jax.ShapeDtypeStruct((1, 8, 1, 8), jnp.float16))
