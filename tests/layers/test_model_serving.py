"""The language model with caches, padding and packed documents gives the logits of the whole document by itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support.layers_cases import PLAN, PLAN_LENGTHS, feed
from support.model_cases import (
    LENGTH,
    MODELS,
    ROWS,
    VOCABULARY,
    forward,
    forward_segments,
    loss_and_gradient,
    make_model,
    random_tokens,
)

from deltaformer_jax import LanguageModel, Mixer, ModelConfig
from deltaformer_jax.decoding.generate import decode_step, with_weights_in

NEAR = dict(rtol=2e-4, atol=2e-4)  # float32, logits of size 1


@pytest.mark.parametrize("fields", MODELS.values(), ids=MODELS)
def test_prefill_and_decode(fields):
    model, tokens = make_model(**fields), random_tokens((ROWS, LENGTH))
    expected = forward(model, tokens)
    assert expected.shape == (ROWS, LENGTH, VOCABULARY) and expected.dtype == jnp.float32
    call = jax.jit(lambda block, ids, cache: model(block, segment_ids=ids, cache=cache))
    outputs, cache = feed(call, model.init_cache(ROWS, LENGTH), tokens, PLAN, padding=2**31 - 1)
    for row, length in enumerate(PLAN_LENGTHS):
        np.testing.assert_allclose(outputs[row], expected[row, :length], **NEAR)
    assert len(cache) == len(model.blocks)
    for of_mixer in cache:
        np.testing.assert_array_equal(of_mixer.length, np.tile(PLAN_LENGTHS, (model.periods, 1)))


@pytest.mark.parametrize("fields", MODELS.values(), ids=MODELS)
def test_packed_documents_and_padding(fields):
    """Logits are each document's own; neither loss nor gradients look at the tokens in the padding."""
    model, documents = make_model(**fields), random_tokens((3, 5))
    tokens, ids = np.zeros((ROWS, LENGTH), np.int32), np.zeros((ROWS, LENGTH), np.int32)
    places = [(0, slice(1, 6)), (0, slice(6, 11)), (1, slice(4, 9))]
    for number, (place, document) in enumerate(zip(places, documents)):
        tokens[place], ids[place] = document, 7 - number
    packed = forward_segments(model, tokens, ids)
    for number, place in enumerate(places):
        row = np.zeros((ROWS, LENGTH), np.int32)
        row[0, :5] = documents[number]  # what comes after it, it doesn't see
        np.testing.assert_allclose(packed[place], forward(model, row)[0, :5], **NEAR)
    loss, gradient = loss_and_gradient(model, tokens, ids)
    tokens[ids == 0] = [-5, 2**31 - 1, VOCABULARY, 0, 1, 2, 3, 4, 127]
    loss_again, gradient_again = loss_and_gradient(model, tokens, ids)
    assert np.isfinite(loss) and loss == loss_again
    jax.tree.map(np.testing.assert_array_equal, gradient, gradient_again)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_an_empty_row_changes_nothing():
    """Rows of padding alone, as in the last batch of an evaluation, reach neither loss nor gradient."""
    model, tokens = make_model(), random_tokens((ROWS, LENGTH))
    ids = np.array([[1] * 6 + [0] * 6, [0] * 12], np.int32)
    halves = np.array([[1] * 6 + [0] * 6, [2] * 6 + [0] * 6], np.int32)
    with_empty = loss_and_gradient(model, tokens, ids)
    twice = loss_and_gradient(model, tokens[[0, 0]], halves)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), with_empty, twice)


def test_positions_shift_nothing_but_the_rotation():
    """And `logits` of `hidden` are the call's."""
    model, tokens = make_model(), random_tokens((ROWS, LENGTH))
    steps = jnp.broadcast_to(jnp.arange(LENGTH), tokens.shape)
    placed = jax.jit(lambda steps: model.logits(model.hidden(tokens, positions=steps)[0]))
    np.testing.assert_allclose(placed(steps), forward(model, tokens), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(placed(steps + 50), placed(steps), rtol=1e-2, atol=1e-3)
    assert np.abs(placed(3 * steps) - placed(steps)).max() > 1e-2


def test_wrong_tokens():
    model = make_model()
    with pytest.raises(ValueError, match=r"tokens must be integers \[batch, length\]"):
        model(jnp.zeros((2, 3)))
    with pytest.raises(ValueError, match="segment_ids must have tokens' shape"):
        model(random_tokens((2, 3)), segment_ids=np.ones((2, 4), np.int32))


ATTENTION = {
    "DeltaFormer": {"mixers": ("delta_former",)},
    "softmax attention": {"mixers": ("softmax_attention",)},
    "window": {"mixers": (Mixer("softmax_attention", window=200),)},
    "forgetting": {"mixers": (Mixer("softmax_attention", forget_gate=True, sinks=True),)},
    "hybrid": {"mixers": ("gated_delta_net", "delta_former")},
}


@pytest.mark.parametrize("fields", ATTENTION.values(), ids=ATTENTION)
def test_a_decoding_step_copies_one_layers_cache_at_a_time(fields):
    """The donated caches are the ones that come back. Beside them the step allocates the cache of one layer, cut out of
    the stack, and that layer's scores, [B, heads, slots]: 1/64 of its cache for heads of 32."""
    config = ModelConfig(
        vocab_size=VOCABULARY, d_model=32, num_layers=8, num_heads=2, num_kv_heads=2, head_dim=32, mlp_dim=32, **fields
    )
    model = LanguageModel(config, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(model)
    cache = model.init_cache(2, 4096)
    arguments = (graphdef, params, jnp.zeros(2, jnp.int32), cache, jax.random.key(0), 1, 0.0, None)
    memory = decode_step.lower(*arguments, top_k=0).compile().memory_analysis()
    caches = sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
    attention_layers = 8 // len(fields["mixers"])
    assert memory.alias_size_in_bytes >= caches
    assert memory.temp_size_in_bytes < 1.5 * caches / attention_layers


def test_weights_in_the_compute_dtype_change_no_product():
    """The logits are the same bits: d_model is a power of four, so that √d_model scales the embedding exactly."""
    config = ModelConfig(
        vocab_size=VOCABULARY,
        d_model=64,
        num_layers=3,
        num_heads=2,
        num_kv_heads=2,
        head_dim=32,
        mixers=("delta_former", "gated_delta_net", "gated_linear_attention"),
        compute_dtype="bfloat16",
    )
    model, tokens = LanguageModel(config, rngs=nnx.Rngs(0)), random_tokens((ROWS, LENGTH))
    half = with_weights_in(model, "bfloat16")
    dtypes = {str(leaf.dtype) for leaf in jax.tree.leaves(half)}
    assert dtypes == {"bfloat16", "float32"}
    assert num_bytes(half) < 0.55 * num_bytes(model)
    np.testing.assert_array_equal(half(tokens)[0], model(tokens)[0])


def num_bytes(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
