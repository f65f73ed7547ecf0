"""Layers switched off and removed, and how much each changes the residual stream."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support.model_cases import make_model, random_tokens

from deltaformer_jax.config import ModelConfig
from deltaformer_jax.model import LanguageModel
from deltaformer_jax.model_parts import model_parts, params_of
from deltaformer_jax.surgery import block_influence, remove_layers
from deltaformer_jax.surgery.influence import _cosine_and_ratio

ROWS, LENGTH = 2, 12
CONFIG = ModelConfig(
    vocab_size=32,
    d_model=16,
    num_layers=4,
    num_heads=2,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=24,
    mixers=("delta_former", "gated_delta_net"),
    implementation="recurrent",
)
IDS = np.array([[0, 0] + [1] * 6 + [2] * 4, [1] * 9 + [0] * 3], np.int32)


@pytest.fixture(scope="module")
def model():
    return LanguageModel(CONFIG, rngs=nnx.Rngs(0))


def built(config, params):
    return nnx.merge(model_parts(config).graphdef, nnx.State(params))


def states(model, tokens, **more):
    return np.asarray(jax.jit(lambda model, tokens, more: model.hidden(tokens, **more)[0])(model, tokens, more))


def test_all_layers_active_is_the_model_bit_for_bit(model):
    tokens = random_tokens((ROWS, LENGTH)) % 32
    plain = states(model, tokens, segment_ids=IDS)
    np.testing.assert_array_equal(states(model, tokens, segment_ids=IDS, active=jnp.ones(4, bool)), plain)
    without = model.final_norm(model.embedding(tokens, IDS))
    np.testing.assert_allclose(states(model, tokens, segment_ids=IDS, active=jnp.zeros(4, bool)), without, atol=1e-6)
    x, seen = model.look(tokens, lambda before, after, real: (), segment_ids=IDS)
    np.testing.assert_array_equal(x, plain)
    assert seen == ()


@pytest.mark.parametrize("removed, mixers", [([1, 3], 1), ([0, 1], 2), ([2], 3), ([], 2)])
def test_a_layer_that_is_not_active_is_a_layer_removed(model, removed, mixers):
    """One program with switches: bit for bit the shorter model, which keeps its pattern where it can."""
    tokens = random_tokens((ROWS, LENGTH)) % 32
    config, params = remove_layers(CONFIG, params_of(model), removed)
    assert (config.num_layers, len(config.mixers)) == (4 - len(removed), mixers)
    shorter = built(config, params)
    active = jnp.asarray([layer not in removed for layer in range(4)])
    np.testing.assert_array_equal(
        states(model, tokens, segment_ids=IDS, active=active), states(shorter, tokens, segment_ids=IDS)
    )


def test_switches_in_decoding(model):
    """Token by token with a cache: the shorter model's states, and a cache that a layer without part leaves alone."""
    tokens, removed = random_tokens((ROWS, 6)) % 32, [0, 3]
    shorter = built(*remove_layers(CONFIG, params_of(model), removed))
    active = jnp.asarray([layer not in removed for layer in range(4)])
    one = jax.jit(lambda model, token, cache, active: model.hidden(token, cache=cache, active=active))
    ours, theirs = model.init_cache(ROWS, 8), shorter.init_cache(ROWS, 8)
    start = jax.tree.map(np.asarray, ours)
    for t in range(6):
        x, ours = one(model, tokens[:, t : t + 1], ours, active)
        y, theirs = one(shorter, tokens[:, t : t + 1], theirs, None)
        # XLA may fuse the two programs otherwise: a few roundings of numbers of size 1 to 4.
        np.testing.assert_allclose(x, y, atol=2e-6)
    for entry, layer in ((0, 0), (1, 1)):  # layers 0 and 3
        own = jax.tree.map(lambda leaf, layer=layer: np.asarray(leaf[layer]), (ours[entry], start[entry]))
        jax.tree.map(np.testing.assert_array_equal, *own)


def test_switches_in_unrolled_layers_and_their_gradient():
    """The gradient of a layer that is not active is 0, that of the others the shorter model's."""
    config = dataclasses.replace(CONFIG, mixers=("delta_former",), num_layers=2, unroll_layers=True)
    model, tokens = LanguageModel(config, rngs=nnx.Rngs(1)), random_tokens((ROWS, LENGTH)) % 32
    total = lambda model, active: jnp.sum(model.hidden(tokens, active=active)[0] ** 2)
    gradient = params_of(jax.jit(jax.grad(total))(model, jnp.array([False, True])))
    shorter = built(*remove_layers(config, params_of(model), [0]))
    expected = params_of(jax.jit(jax.grad(lambda model: total(model, None)))(shorter))
    scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected))
    jax.tree.map(lambda x: np.testing.assert_array_equal(x[0], 0), gradient["blocks"][0])
    kept = jax.tree.map(lambda x: x[1:], gradient["blocks"][0])
    # Sums of products in another order.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * scale), kept, expected["blocks"][0])


def test_block_influence_of_layers_that_add_nothing_and_that_turn_around(model):
    """A layer whose outputs are 0 has BI 0. The others as the formula says, padding left out."""
    params = params_of(model)
    mixer = dict(params["blocks"][0]["mixer"])
    mixer["output"] = jnp.zeros_like(mixer["output"])
    mlp = dict(params["blocks"][0]["mlp"]) | {"down": jnp.zeros_like(params["blocks"][0]["mlp"]["down"])}
    blocks = {**params["blocks"], 0: {**params["blocks"][0], "mixer": mixer, "mlp": mlp}}
    silent = built(CONFIG, {**params, "blocks": blocks})
    tokens = random_tokens((ROWS, LENGTH)) % 32
    batches = [{"tokens": tokens, "segment_ids": IDS}, {"tokens": tokens[:1]}]
    found = block_influence(silent, batches)
    np.testing.assert_allclose(found["bi"][[0, 2]], 0, atol=1e-6)
    np.testing.assert_array_equal(found["relative_magnitude"][[0, 2]], 0)

    def pairs(before, after, real):
        return before, after

    cosines, ratios = [], []
    for batch in batches:
        ids = np.asarray(batch.get("segment_ids", np.ones_like(batch["tokens"])))
        before, after = (np.asarray(x, np.float64)[:, ids != 0] for x in silent.look(**batch, see=pairs)[1])
        norms = [np.linalg.norm(x, axis=-1) for x in (before, after, after - before)]
        cosines.append((before * after).sum(-1) / (norms[0] * norms[1]))
        ratios.append(norms[2] / norms[1])
    np.testing.assert_allclose(found["bi"], 1 - np.concatenate(cosines, 1).mean(1), atol=1e-6)
    np.testing.assert_allclose(found["relative_magnitude"], np.concatenate(ratios, 1).mean(1), rtol=1e-5)
    x = model.embedding(tokens, IDS)
    cosine, ratio = _cosine_and_ratio(x, -x, IDS != 0)
    np.testing.assert_allclose([1 - cosine / (IDS != 0).sum(), ratio / (IDS != 0).sum()], 2, rtol=1e-6)


def test_settings_that_only_removed_mixers_take_go_back_to_their_defaults():
    hybrid = dataclasses.replace(CONFIG, mixers=("softmax_attention", "delta_net"), window=5, kv_shift=True)
    params = params_of(LanguageModel(hybrid, rngs=nnx.Rngs(0)))
    config, left = remove_layers(hybrid, params, [0, 2])
    assert config == dataclasses.replace(CONFIG, num_layers=2, mixers=("delta_net",))
    built(config, left)  # a model is refused whose mixers do not take what its config sets
    assert remove_layers(hybrid, params, [0])[0].window == 5


@pytest.mark.parametrize(
    "layers, message",
    [
        ([4], "4 is not one of the model's 0 to 3"),
        ([-1], "-1 is not"),
        ([1, 1], "removed once"),
        ([float("nan")], "nan is not"),
        (range(4), "give at most 3"),
    ],
)
def test_wrong_layers_are_named(layers, message):
    with pytest.raises(ValueError, match=f"layers.*{message}"):
        remove_layers(CONFIG, None, layers)


def test_wrong_switches_are_named():
    model = make_model()
    for active in (jnp.ones(3, bool), jnp.ones(2)):
        with pytest.raises(ValueError, match=r"active must be booleans \[4\], one for each layer; it is"):
            model.hidden(random_tokens((1, 4)), active=active)
    with pytest.raises(ValueError, match="batches: they hold no real token"):
        block_influence(model, [])
