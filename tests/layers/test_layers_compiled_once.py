"""Mixers, models and generation called again outside jit: nothing is traced or compiled a second time."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from support.compiled import counted
from support.model_cases import MIXERS

from deltaformer_jax import LanguageModel, generate
from deltaformer_jax.config import ModelConfig


def model(mixer):
    sizes = dict(d_model=16, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=8, mlp_dim=8)
    return LanguageModel(ModelConfig(vocab_size=64, mixers=(mixer,), **sizes), rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in ("delta_former", "gated_delta_net") else pytest.mark.rare)
        for name in MIXERS
    ],
)
def test_a_mixers_second_call(name):
    """A whole text, a prompt into a cache and one token more."""
    mixer = jax.tree.map(lambda x: x[0], model(MIXERS[name]).blocks[0]).mixer
    x, segment_ids = jnp.ones((2, 9, 16)), jnp.asarray([[1] * 7 + [0] * 2, [0] * 3 + [1] * 6])

    def calls():
        out, _ = mixer(x, segment_ids=segment_ids)
        _, cache = mixer(x, segment_ids=segment_ids, cache=mixer.init_cache(2, 16))
        return out, mixer(x[:, :1], cache=cache)

    calls()
    with counted() as again:
        jax.block_until_ready(calls())
    assert not again


def test_a_models_second_call_and_texts():
    language_model = model("delta_former")

    def calls(seed):
        logits, _ = language_model(jnp.ones((1, 12), jnp.int32))
        texts = [list(generate(language_model, [1, 2, 3], 4, seed=seed, top_p=0.5 + seed / 10))]
        return logits, texts, list(generate(language_model, [5, 3], 4, temperature=0.1 + seed))

    calls(1)
    with counted() as again:
        calls(2)
    assert not again
