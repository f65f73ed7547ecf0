"""Layers that only fill their caches while a prompt is read, and run for what is generated (ShortGPT's generation)."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support.model_cases import random_tokens

from deltaformer_jax import decoding
from deltaformer_jax.config import ModelConfig
from deltaformer_jax.decoding.generate import generate_batch
from deltaformer_jax.model import LanguageModel

MIXERS = ("delta_former", "gated_delta_net", "softmax_attention", "delta_net")
CONFIG = ModelConfig(
    vocab_size=32, d_model=16, num_layers=4, num_heads=2, num_kv_heads=1, head_dim=8, mlp_dim=24, mixers=MIXERS
)
IDS = np.array([[0, 0] + [1] * 10, [1] * 9 + [0] * 3], np.int32)
SKIPPED = np.array([True, False, True, True])


@pytest.fixture(scope="module")
def model():
    return LanguageModel(CONFIG, rngs=nnx.Rngs(0))


@jax.jit
def layer_by_layer(model, tokens, ids, cache, skipped):
    """The definition: every block runs, and what it makes of the stream is not used where it is skipped."""
    x, after = model.embedding(tokens, ids), []
    for layer, (block, of_layer) in enumerate(zip(model.blocks, cache)):
        block, of_layer = jax.tree.map(lambda stack: stack[0], (block, of_layer))
        y, of_layer, _ = block(x, segment_ids=ids, cache=of_layer)
        x = jnp.where(skipped[layer], x, y)
        after.append(jax.tree.map(lambda leaf: leaf[None], of_layer))
    return model.final_norm(x), tuple(after)


def hidden(model, tokens, ids, cache, skipped):
    return jax.jit(lambda *a: a[0].hidden(a[1], segment_ids=a[2], cache=a[3], skipped=a[4]))(
        model, tokens, ids, cache, skipped
    )


@pytest.mark.parametrize("skipped", [SKIPPED, np.zeros(4, bool)])
def test_a_skipped_layer_leaves_the_stream_and_fills_its_cache(model, skipped):
    tokens, empty = random_tokens((2, 12)) % 32, model.init_cache(2, 16)
    x, cache = hidden(model, tokens, IDS, empty, skipped)
    expected, filled = layer_by_layer(model, tokens, IDS, empty, skipped)
    # Roundings of numbers of size 1 to 4, by two programs.
    chex.assert_trees_all_close((x, cache), (expected, filled), atol=4e-6)
    for of_layer, memory in zip(cache, MIXERS):
        assert of_layer.length.tolist() == [[10, 9]], memory
    token = random_tokens((2, 1)) % 32
    one = lambda cache: jax.jit(lambda model, cache: model(token, cache=cache))(model, cache)[0]
    np.testing.assert_allclose(one(cache), one(filled), atol=4e-6)


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_cache_alone_costs_less(mixer):
    """Compiled, the cache of 64 tokens takes no query, no read, no output product and no feed-forward layer."""
    config = ModelConfig(
        vocab_size=32, d_model=32, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=16, mlp_dim=96, mixers=(mixer,)
    )
    model = LanguageModel(config, rngs=nnx.Rngs(0))
    block, cache = jax.tree.map(lambda stack: stack[0], (model.blocks[0], model.init_cache(1, 64)[0]))
    x = jnp.ones((1, 64, 32))

    def flops(part):
        compiled = jax.jit(lambda block, x, cache: part(block(x, cache=cache))).lower(block, x, cache).compile()
        return compiled.cost_analysis()["flops"]

    forward, output = 2 * 64 * 3 * 32 * 96, 2 * 64 * 32 * 32
    assert flops(lambda both: both[1]) < flops(lambda both: both) - forward - output


def test_generating():
    """Nothing skipped is the default; something skipped is the model with these layers skipped for the prompt alone."""
    config = ModelConfig(
        vocab_size=32, d_model=16, num_layers=2, num_heads=1, num_kv_heads=1, head_dim=16, mixers=("softmax_attention",)
    )
    model, layers = LanguageModel(config, rngs=nnx.Rngs(0)), [1]
    prompts = [[0, 5, 3, 9], [0, 1]]
    greedy = dict(temperature=0.0, top_k=0)
    tokens = lambda **more: np.stack([*generate_batch(model, prompts, 3, **greedy, **more)], axis=1).tolist()
    assert tokens() == tokens(skip_in_prefill=())
    real = (np.arange(4) < np.array([[4], [2]])).astype(np.int32)
    padded = np.array([[0, 5, 3, 9], [0, 1, 0, 0]], np.int32)
    x, cache = hidden(model, padded, real, model.init_cache(2, 8), np.array([False, True]))
    found = [model.logits(x)[np.arange(2), [3, 1]].argmax(-1)]
    step = jax.jit(lambda token, cache: model(token, cache=cache))
    for _ in range(2):
        logits, cache = step(found[-1][:, None], cache)
        found.append(logits[:, 0].argmax(-1))
    assert tokens(skip_in_prefill=layers) == np.stack(found, axis=1).tolist() != tokens()
    one_by_one = decoding.generate(model, prompts, max_tokens=3, **greedy, skip_in_prefill=np.array(layers))
    assert [completion.tokens for completion in one_by_one] == tokens(skip_in_prefill=layers)


@pytest.mark.parametrize(
    "layers, message",
    [
        ([4], "skip_in_prefill = 4: give layers from 0 to 3"),
        ([-1], "skip_in_prefill = -1: give layers from 0 to 3"),
        ([1, 1], "skip_in_prefill = [1, 1]: give each layer once"),
        (["a"], "skip_in_prefill = 'a': give a whole number, layers from 0 to 3"),
        ("1", "skip_in_prefill is one text"),
    ],
)
def test_wrong_layers(model, layers, message):
    for call in (
        lambda: decoding.generate(model, [[0]], max_tokens=1, skip_in_prefill=layers),
        lambda: generate_batch(model, [[0]], 1, skip_in_prefill=layers),
    ):
        with pytest.raises((ValueError, TypeError), match=re.escape(message)):
            call()


def test_wrong_switches(model):
    tokens = jnp.zeros((1, 2), jnp.int32)
    with pytest.raises(ValueError, match="give their cache too"):
        model.hidden(tokens, skipped=jnp.zeros(4, bool))
    with pytest.raises(ValueError, match=r"skipped must be booleans \[4\]"):
        model.hidden(tokens, cache=model.init_cache(1, 2), skipped=jnp.zeros(3, bool))
