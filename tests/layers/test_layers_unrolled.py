"""model.unroll_layers: another program of the same function."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deltaformer_jax import LanguageModel, ModelConfig
from deltaformer_jax.config.files import packaged_config
from deltaformer_jax.decoding.generate import decode_step
from deltaformer_jax.model_parts import params_of

CONFIG = ModelConfig(
    vocab_size=32, d_model=16, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=8, implementation="parallel"
)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(32, size=(2, 12)))
SEGMENTS = jnp.asarray(np.sort(np.random.default_rng(1).integers(0, 3, (2, 12)), axis=1))


def model_of(**fields):
    return LanguageModel(dataclasses.replace(CONFIG, **fields), rngs=nnx.Rngs(0))


def value_and_gradient(model):
    def loss(model):
        return jnp.mean(jax.nn.logsumexp(model(TOKENS, segment_ids=SEGMENTS)[0], -1))

    return jax.jit(nnx.value_and_grad(loss))(model)


@pytest.mark.parametrize("remat", ["none", pytest.param("products", marks=pytest.mark.long), "block"])
def test_values_and_gradients_are_those_of_the_scan(remat):
    scanned, unrolled = (model_of(remat=remat, unroll_layers=flag) for flag in (False, True))
    jax.tree.map(np.testing.assert_array_equal, params_of(scanned), params_of(unrolled))
    (value, gradient), (other, another) = map(value_and_gradient, (scanned, unrolled))
    # The same operations, fused otherwise: a few roundings of float32.
    np.testing.assert_allclose(value, other, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(another), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * float(jnp.max(jnp.abs(a))))


def test_the_program_has_no_loop_over_layers():
    def loops(model):
        return str(jax.jit(lambda model: model.hidden(TOKENS)[0]).trace(model).jaxpr)

    scanned, unrolled = (loops(model_of(unroll_layers=flag)) for flag in (False, True))
    assert "length=2" in scanned and scanned.count("length=2") > unrolled.count("length=2")


def test_decoding_is_not_changed():
    def text(flag):
        graphdef, params = nnx.split(model_of(unroll_layers=flag))
        cache = nnx.merge(graphdef, params).init_cache(2, 32)
        token = jnp.zeros(2, jnp.int32)
        lowered = decode_step.lower(graphdef, params, token, cache, jax.random.key(0), 0, 0.0, None, top_k=0)
        return lowered.as_text()

    assert text(False) == text(True)


def test_it_is_off_in_every_config():
    assert not packaged_config("deltaformer_340m").model.unroll_layers and not CONFIG.unroll_layers
