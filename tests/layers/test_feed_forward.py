"""Feed-forward layers by name, each against the sum over its entries in float64."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.special import softmax

from deltaformer_jax import causal_attention
from deltaformer_jax.config import Mixer, ModelConfig
from deltaformer_jax.config.checks import check_model
from deltaformer_jax.interop import save_pretrained
from deltaformer_jax.layers.feed_forward import FEED_FORWARDS
from deltaformer_jax.model import LanguageModel, num_parameters

X = np.random.default_rng(0).normal(size=(2, 5, 12)).astype(np.float32)
gelu = lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
silu = lambda x: x / (1 + np.exp(-x))
relu = lambda x: np.maximum(x, 0)
# Name -> the weight of each entry from x·(each of its keys).
WEIGHTS = {
    "swiglu": lambda gate, up: silu(gate) * up,
    "geglu": lambda gate, up: gelu(gate) * up,
    "relu": relu,
    "relu2": lambda x: relu(x) ** 2,
    "gelu": gelu,
    "memory linear": lambda x: x,
    "memory relu": relu,
    "memory exp": np.exp,
    "memory softmax": lambda x: softmax(x, axis=-1),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_it_is_the_sum_over_its_entries(name):
    kind, *similarity = name.split()
    more = {"feed_forward_similarity": similarity[0]} if similarity else {}
    layer = FEED_FORWARDS[kind](12, 20, rngs=nnx.Rngs(0), **more)
    own = dict(nnx.to_flat_state(nnx.state(layer)))
    by_name = {path[-1]: np.asarray(leaf[...], np.float64) for path, leaf in own.items()}
    keys = [by_name[key] for key in ("gate", "up", "keys") if key in by_name]
    values = by_name["values" if kind == "memory" else "down"]
    weights = WEIGHTS[name](*(np.einsum("btd,dn->btn", X.astype(np.float64), key) for key in keys))
    expected = np.einsum("btn,nd->btd", weights, values)
    np.testing.assert_allclose(jax.jit(layer)(X), expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
    assert layer.flops_per_token(7) == 2 * 12 * 20 * (len(keys) + 1)


def test_a_softmax_memory_is_attention_over_pairs_that_every_token_sees():
    """A token that attends to the N pairs before it, and to itself with a score so low that it has no weight."""
    layer = FEED_FORWARDS["memory"](12, 20, rngs=nnx.Rngs(0))
    keys, values = layer.keys[...].T, layer.values[...]
    x = X[0, 0]
    query = jnp.concatenate([jnp.zeros((20, 12)), x[None]])[None, :, None]
    key = jnp.concatenate([keys, -1e4 * x[None]])[None, :, None]
    value = jnp.concatenate([values, jnp.ones((1, 12))])[None, :, None]
    read = causal_attention(query, key, value, scale=1.0, implementation="parallel")[0, -1, 0]
    np.testing.assert_allclose(layer(x[None, None])[0, 0], read, rtol=2e-6, atol=2e-6)


def test_a_model_by_name_and_an_entry_of_its_own():
    config = ModelConfig(
        vocab_size=32,
        d_model=16,
        num_layers=4,
        num_heads=2,
        num_kv_heads=2,
        head_dim=8,
        mixers=("delta_former", Mixer("delta_net", feed_forward="memory", feed_forward_similarity="relu", mlp_dim=24)),
        feed_forward="relu2",
    )
    check_model(config)
    model = LanguageModel(config, rngs=nnx.Rngs(0))
    one, two = (block.mlp for block in model.blocks)
    assert type(one) is FEED_FORWARDS["relu2"] and one.mlp_dim == 64
    assert type(two) is FEED_FORWARDS["memory"] and two.mlp_dim == 24 and two.similarity.weight(-1.0) == 0
    logits, _ = model(np.zeros((1, 4), np.int32))
    assert np.isfinite(logits).all()


def test_two_products_have_the_parameters_of_three():
    count = lambda name: num_parameters(
        LanguageModel(ModelConfig(vocab_size=32, d_model=192, num_layers=1, feed_forward=name), rngs=nnx.Rngs(0))
    )
    assert count("swiglu") == count("geglu") == count("relu") == count("memory")


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(feed_forward="swigul"), "model.feed_forward = 'swigul'"),
        (dict(feed_forward_similarity="round"), "model.feed_forward_similarity = 'round'"),
        (dict(mixers=(Mixer("delta_net", feed_forward="none"),)), "delta_net, feed_forward = 'none'"),
    ],
)
def test_what_is_refused(fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        LanguageModel(ModelConfig(vocab_size=32, **fields), rngs=nnx.Rngs(0))


def test_it_is_not_written_as_another_packages_model(tmp_path):
    config = ModelConfig(vocab_size=32, d_model=16, num_layers=1, head_dim=8, mixers=("softmax_attention",))
    for fields in (dict(feed_forward="geglu"), dict(feed_forward="memory")):
        other = dataclasses.replace(config, **fields)
        with pytest.raises(ValueError, match=f"model.feed_forward = '{fields['feed_forward']}'"):
            save_pretrained(LanguageModel(other, rngs=nnx.Rngs(0)), other, tmp_path / "out", model_type="llama")
