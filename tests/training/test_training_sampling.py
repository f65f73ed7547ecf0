"""Sampling: what temperature 0, top-k, top-p and seeds promise; the cache gives what the full forward pass does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support import training_cases as cases

from deltaformer_jax import LanguageModel, ModelConfig
from deltaformer_jax.config import Mixer
from deltaformer_jax.decoding.generate import choose, generate, generate_batch
from deltaformer_jax.model_parts import ModelParts, merge
from deltaformer_jax.sharding.mesh import make_mesh
from deltaformer_jax.training.program import Program


@pytest.fixture(scope="module")
def model():
    # Layers of both kinds; a window shorter than prompt and answer.
    mixers = ("delta_former", Mixer("softmax_attention", window=8))
    config = cases.small_config("", model__vocab_size=64, model__mixers=mixers, model__kv_shift=True)
    program = Program(config, make_mesh(config.mesh, jax.devices()[:1]))
    return program.parts, program.create_state(config.run.seed).params


@pytest.mark.parametrize("length", [1, 5, 16, 19])
def test_temperature_0_is_the_argmax_of_the_full_forward(model, length):
    parts, params = model
    prompt = np.random.default_rng(length).integers(0, 64, length).tolist()
    tokens = prompt + list(generate(merge(parts, params), prompt, 12, temperature=0.0))
    # The whole text in one call, padded to one shape for every prompt.
    padded, real = np.zeros((2, 1, 32), np.int32)
    padded[0, : len(tokens)], real[0, : len(tokens)] = tokens, 1
    logits = np.asarray(_forward(parts.graphdef, params, padded, real))[0]
    for i in range(length, len(tokens)):
        best = logits[i - 1].max()
        # Two summation orders may differ in a near tie: the token taken is the best within rounding.
        assert logits[i - 1, tokens[i]] >= best - 1e-4
    assert len(tokens) == length + 12 and len(set(tokens[length:])) > 1


def _full(graphdef, params, tokens, real):
    return merge(ModelParts(graphdef, None, None, None), params)(tokens, segment_ids=real)[0]


_forward = jax.jit(_full, static_argnums=0)


def test_seeds(model):
    parts, params = model

    def text(**options):
        return list(generate(merge(parts, params), [1, 2, 3], 12, **options))

    assert text(seed=1) == text(seed=1) != text(seed=2)
    assert text(top_k=1, seed=1) == text(temperature=0.0)
    # A longer text begins as a shorter one.
    longer = list(generate(merge(parts, params), [1, 2, 3], 13, seed=1))
    assert longer[:12] == text(seed=1)


def test_draws_follow_the_softmax_of_the_top_k():
    logits = jnp.tile(jnp.array([[0.0, 1.0, 2.0, 3.0, -1.0]]), (20_000, 1))
    keys = jax.random.split(jax.random.key(0), len(logits))
    drawn = np.asarray(jax.jit(lambda keys: choose(logits, keys, jnp.float32(0.5), 3))(keys))
    share = np.bincount(drawn, minlength=5) / len(drawn)
    weights = np.exp(np.array([-np.inf, 1, 2, 3, -np.inf]) / 0.5)
    np.testing.assert_allclose(share, weights / weights.sum(), atol=0.01)
    assert share[0] == share[4] == 0
    assert drawn.dtype == np.int32
    everything = np.asarray(choose(logits, keys, jnp.float32(5.0), 0))
    assert set(everything) == set(range(5)) == set(np.asarray(choose(logits, keys, jnp.float32(5.0), 99)))


_choose = jax.jit(choose, static_argnums=3)


@pytest.mark.parametrize(
    ("top_k", "top_p", "kept"),
    [
        (0, 0.01, [2]),
        (0, 0.5, [2]),  # the first alone makes exactly a half
        (0, 0.51, [2, 0]),
        (0, 0.75, [2, 0]),
        (0, 0.76, [2, 0, 1, 4]),  # 1 and 4 are even
        (0, 0.99, [2, 0, 1, 4, 3]),
        (0, 1.0, [2, 0, 1, 4, 3]),
        (2, 0.6, [2]),  # of the two kept by top_k the first is two thirds
        (2, 0.7, [2, 0]),
        (1, 0.9, [2]),
    ],
)
def test_draws_are_of_the_fewest_likeliest_that_sum_to_top_p(top_k, top_p, kept):
    shares = np.array([1 / 4, 1 / 12, 1 / 2, 1 / 12, 1 / 12])
    shares[3] = 0.01
    shares[[1, 4]] = (0.25 - 0.01) / 2
    heat = 2.0
    logits = jnp.tile(jnp.asarray(np.log2(shares) * np.log(2) * heat, jnp.float32), (20_000, 1))
    keys = jax.random.split(jax.random.key(1), len(logits))
    drawn = np.asarray(_choose(logits, keys, jnp.float32(heat), top_k, jnp.float32(top_p)))
    expected = np.zeros(5)
    expected[kept] = shares[kept] / shares[kept].sum()
    found = np.bincount(drawn, minlength=5) / len(drawn)
    np.testing.assert_allclose(found, expected, atol=0.02)
    assert (found[expected == 0] == 0).all()


def test_prompts_of_different_lengths_in_one_batch(model):
    """Each row goes on as its prompt does alone, at temperature 0 and with the row's own draws."""
    parts, params = model
    draw = np.random.default_rng(0)
    prompts = [draw.integers(0, 64, length).tolist() for length in (5, 1, 19, 16, 33)]
    rows = np.stack(list(generate_batch(merge(parts, params), prompts, 12, temperature=0.0)), axis=1)
    assert rows.shape == (5, 12) and rows.dtype == np.int32
    padded, real = np.zeros((2, 5, 48), np.int32)
    for i, prompt in enumerate(prompts):
        padded[i, : len(prompt) + 12], real[i, : len(prompt) + 12] = [*prompt, *rows[i]], 1
    logits = np.asarray(_forward(parts.graphdef, params, padded, real))
    for i, prompt in enumerate(prompts):
        for j in range(12):
            before = logits[i, len(prompt) + j - 1]
            assert before[rows[i, j]] >= before.max() - 1e-4

    drawn = np.stack(list(generate_batch(merge(parts, params), prompts, 12, seed=3)), axis=1)
    assert drawn[0].tolist() == list(generate(merge(parts, params), prompts[0], 12, seed=3))
    others = np.stack(list(generate_batch(merge(parts, params), [*prompts[:2], prompts[4]], 12, seed=3)), axis=1)
    np.testing.assert_array_equal(others[:2], drawn[:2])
    same = np.stack(list(generate_batch(merge(parts, params), [prompts[0]] * 2, 12, seed=3)), axis=1)
    assert (same[0] != same[1]).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": 0}, "tokens = 0"),
        ({"temperature": -0.1}, "temperature = -0.1"),
        ({"temperature": float("nan")}, "temperature = nan"),
        ({"top_k": -1}, "top_k = -1"),
        ({"seed": -1}, "seed = -1"),
        ({"top_p": 0.0}, "top_p = 0.0"),
        ({"top_p": 1.1}, "top_p = 1.1"),
        ({"top_p": float("nan")}, "top_p = nan"),
        ({"prompt": []}, "prompt"),
    ],
)
def test_errors_come_at_the_call(model, options, message):
    parts, params = model
    options = {"prompt": [1], "tokens": 3, **options}
    with pytest.raises(ValueError, match=message):
        generate(merge(parts, params), options.pop("prompt"), options.pop("tokens"), **options)


@pytest.mark.parametrize("token", [-1, 10**6])
def test_an_id_outside_the_vocabulary_is_refused(token):
    model = LanguageModel(ModelConfig(vocab_size=17, d_model=16, num_layers=1, head_dim=8), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=rf"prompts\[1\] has the id {token}: ids must be from 0 to 16"):
        generate_batch(model, [[0, 3], [1, token]], 3)


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16", "int64"])
def test_prompts_of_every_integer_type(model, dtype):
    """Compared in uint8, the vocabulary's 256 or 257 would be 0 or 1."""
    wide = LanguageModel(ModelConfig(vocab_size=257, d_model=16, num_layers=1, head_dim=8), rngs=nnx.Rngs(0))
    ids = [0, 5, 100]
    expected = list(generate(wide, ids, 3, temperature=0.0))
    for array in (np.array(ids, dtype), *([] if dtype == "int64" else [jnp.array(ids, dtype)])):
        assert list(generate(wide, array, 3, temperature=0.0)) == expected


@pytest.mark.parametrize("prompt", [[1.5, 2.5], np.ones(3, np.float32), [True, False], [[1, 2], [3, 4]]])
def test_prompts_that_are_no_lists_of_integers_are_refused(model, prompt):
    parts, params = model
    with pytest.raises(TypeError, match=r"prompts\[0\] must be a list of integers; it is"):
        generate(merge(parts, params), prompt, 3)
