"""None follows the platform the program is compiled for; a named kernel runs there or is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deltaformer_jax import causal_attention
from deltaformer_jax.ops.attention_kernels import splash_attention

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
    assert kernels(lowered(forward, "cuda", draw())) == 0  # no NVIDIA device is here to ask for cuDNN's version


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
    run = lambda q, k, v: splash_attention(q, k, v, segment_ids, scale=64**-0.5, window=window, interpret=True)
    actual = np.asarray(jax.jit(run)(*inputs.values()), np.float32)
    if segment_ids is not None:
        actual = np.where((segment_ids != 0)[..., None, None], actual, 0)
    # q · scale, the weights and the output are rounded to bfloat16: four roundings of values below 4.
    np.testing.assert_allclose(actual, np.asarray(expected, np.float32), rtol=0, atol=4 * 4 * 2**-8)


def test_named_kernels_are_refused_elsewhere():
    with pytest.raises(NotImplementedError, match="'splash' runs on tpu only: use None or 'chunked'"):
        causal_attention(**draw(), implementation="splash")
    with pytest.raises(NotImplementedError, match=r"'cudnn': .* no NVIDIA device is here; use None or 'chunked'"):
        causal_attention(**draw(), implementation="cudnn")
    assert kernels(lowered(lambda x: causal_attention(**x, implementation="splash"), "tpu", draw())) == 1
