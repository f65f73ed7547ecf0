"""Scalings of the rotary embedding: their frequencies, the layers that take them, and what is refused."""

import re

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support.model_cases import make_model, random_tokens

from deltaformer_jax.config import Config, DataConfig, Mixer, ModelConfig
from deltaformer_jax.config.checks import check
from deltaformer_jax.config.remarks import remarks
from deltaformer_jax.config.rope_scaling import frequencies, magnitude, parse
from deltaformer_jax.layers.mixers.softmax_attention import SoftmaxAttention
from deltaformer_jax.layers.rotary import rotate


def test_none_is_as_it_was():
    x, positions = np.random.default_rng(0).normal(size=(1, 5, 2, 8)), np.arange(5)[None]
    x = jnp.asarray(x, jnp.float32)
    np.testing.assert_array_equal(rotate(x, positions, 1e4), rotate(x, positions, 1e4, scaling="none"))
    assert frequencies(1e4, 8) == tuple(1e4 ** (-2 * i / 8) for i in range(4)) and magnitude(parse("none")) == 1


@pytest.mark.parametrize(
    "text, expected",
    [
        ("linear:4", [0.25, 0.07905694, 0.025, 0.007905695, 0.0025, 0.0007905695, 0.00025, 7.905695e-05]),
        ("yarn:4,64", [1.0, 0.2371708, 0.05, 0.007905695, 0.0025, 0.0007905695, 0.00025, 7.905695e-05]),
        ("llama3:8,1,4,64", [1.0, 0.2443846, 0.01304226, 0.003952847, 0.00125, 0.0003952847, 0.000125, 3.952847e-05]),
    ],
)
def test_frequencies_of_another_implementation(text, expected):
    """By transformers 5.24's ROPE_INIT_FUNCTIONS: base 1e4, 16 features, in float32."""
    np.testing.assert_allclose(frequencies(1e4, 16, parse(text)), expected, rtol=4e-7)


def test_factors_of_cosines():
    assert magnitude(parse("yarn:4,64")) == pytest.approx(1.138629436111989, rel=1e-15)  # transformers 5.24
    assert magnitude(parse("llama3:8,1,4,64")) == magnitude(parse("linear:4")) == 1


@pytest.mark.parametrize("width", [4, 32, 128])
def test_ntk_takes_the_slowest_pair_of_linear(width):
    scaled, linear, plain = (frequencies(1e4, width, parse(text)) for text in ("ntk:8", "linear:8", "none"))
    assert scaled[-1] == pytest.approx(linear[-1], rel=1e-12) and scaled[0] == plain[0] == 1


@pytest.mark.parametrize("text", ["linear:1", "ntk:1", "yarn:1,100", "llama3:1,1,4,100"])
def test_a_factor_of_1_changes_nothing(text):
    np.testing.assert_allclose(frequencies(1e4, 16, parse(text)), frequencies(1e4, 16), rtol=1e-15)
    assert magnitude(parse(text)) == 1


def test_rotation_by_the_definition():
    """linear:s is the rotation at positions / s; yarn's turns pairs by its angles and lengthens them."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 6, 1, 8)), jnp.float32)
    positions = jnp.arange(6)[None]
    np.testing.assert_allclose(rotate(x, 4 * positions, 1e3, scaling="linear:4"), rotate(x, positions, 1e3), atol=1e-6)
    pairs = np.asarray(x[0, :, 0, :4]) + 1j * np.asarray(x[0, :, 0, 4:])
    turned = 1.138629436111989 * pairs * np.exp(1j * np.arange(6)[:, None] * frequencies(1e3, 8, parse("yarn:4,32")))
    found = rotate(x, positions, 1e3, scaling="yarn:4,32")[0, :, 0]
    np.testing.assert_allclose(found, np.concatenate([turned.real, turned.imag], axis=-1), atol=2e-6)
    half = rotate(x, positions, 1e3, 0.5, "linear:2")
    np.testing.assert_array_equal(half[..., 4:], x[..., 4:])
    np.testing.assert_array_equal(half[..., :4], rotate(x[..., :4], positions, 1e3, scaling="linear:2"))


@pytest.mark.parametrize("mixer", ["softmax_attention", "delta_former"])
def test_models_with_a_scaling(mixer):
    """linear:2 is the model at half the positions; and decoding with a cache is the whole call."""
    fields = dict(
        mixers=(mixer,), implementation="parallel", write_query="projected" if mixer == "delta_former" else ""
    )
    tokens = random_tokens((1, 6))
    fields = {name: value for name, value in fields.items() if value}
    plain, scaled = make_model(**fields), make_model(**fields, rope_scaling="linear:2")
    positions = jnp.arange(6)[None]
    expected, _ = plain(tokens, positions=positions)
    found, _ = scaled(tokens, positions=2 * positions)
    np.testing.assert_allclose(found, expected, atol=2e-5)
    whole, _ = scaled(tokens)
    cache, pieces = scaled.init_cache(1, 8), []
    for piece in (tokens[:, :4], tokens[:, 4:]):
        logits, cache = scaled(piece, cache=cache)
        pieces.append(logits)
    np.testing.assert_allclose(jnp.concatenate(pieces, axis=1), whole, atol=2e-5)


@pytest.mark.parametrize(
    "text, message",
    [
        ("linear", "must be none or one of linear:S, ntk:S, yarn:S,ORIGINAL, llama3:S,LOW,HIGH,ORIGINAL, with numbers"),
        ("dynamic:2", "must be none or one of"),
        ("yarn:4", "must be none or one of"),
        ("linear:nan", "must be none or one of"),
        ("linear:0.5", "the factor 0.5 must be at least 1"),
        ("yarn:4,0", "the original context 0 must be at least 1 token"),
        ("llama3:8,4,1,8192", "the factors 4 and 1 must be positive, the second the larger"),
    ],
)
def test_what_is_refused(text, message):
    for mixers, given in ((("softmax_attention",), text), ((Mixer("softmax_attention", rope_scaling=text),), "none")):
        with pytest.raises(ValueError, match=re.escape(f"model.rope_scaling = {text!r}: {message}")):
            check(Config(model=ModelConfig(mixers=mixers, rope_scaling=given)))


def test_a_layer_without_rotation_has_nothing_to_scale():
    sizes = dict(num_heads=1, num_kv_heads=1, head_dim=8, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"rope_scaling='linear:2': there is no rotary embedding"):
        SoftmaxAttention(8, rope_base=None, rope_scaling="linear:2", **sizes)
    with pytest.raises(ValueError, match="needs at least 4 rotated features, not 2"):
        SoftmaxAttention(8, rotary_fraction=0.25, rope_scaling="ntk:2", **sizes)


def test_the_bound_is_that_of_the_scaled_frequencies():
    model = ModelConfig(mixers=("softmax_attention",), head_dim=64, rope_scaling="linear:4")
    config = lambda length: Config(model=model, data=DataConfig(path="x", sequence_length=length))
    assert not remarks(config(2048))  # 725 · 4 = 2900 is the first distance; between multiples of 4 it may be sooner
    (line,) = remarks(config(2900))
    assert line.startswith("model.rope_base = 10000, scaled by linear:4: at ")
