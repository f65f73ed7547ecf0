"""Shift-FFN's editor against its formula token by token in float64; a model with it against one without."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support.layers_cases import LENGTH, PLAN, PLAN_LENGTHS, ROWS, feed, normal, randomise
from support.model_cases import SMALL, forward, make_model, random_tokens

from deltaformer_jax.config import Mixer, ModelConfig
from deltaformer_jax.config.checks import check_model
from deltaformer_jax.layers.feed_forward.shift_editor import ShiftEditor
from deltaformer_jax.model import LanguageModel, num_parameters

D, RANK = 6, 3


def by_formula(editor, h, ids):
    """h̃ of rows h [B,T,d], token by token; padding unchanged."""
    kernels = (editor.information, editor.gate_of_previous, editor.gate_of_current, editor.out)
    to_information, previous, current, out = (np.asarray(kernel[...]) for kernel in kernels)
    gate = np.concatenate([previous, current])
    edited = h.copy()
    for row, ids_of_row in enumerate(ids):
        before, document = np.zeros(D), 0
        for t in np.flatnonzero(ids_of_row):
            if ids_of_row[t] != document:
                before, document = np.zeros(D), ids_of_row[t]
            passed = (before @ to_information) * np.maximum(np.concatenate([before, h[row, t]]) @ gate, 0)
            edited[row, t] = h[row, t] + passed @ out
            before = h[row, t]
    return edited


def test_it_is_the_formula_and_decoding_goes_on_from_it():
    """Packed rows with NaN in their padding, values and gradients; then prefill, padded prompts and single tokens."""
    with jax.enable_x64(True):
        editor = randomise(lambda: ShiftEditor(D, RANK, dtype=jnp.float64, rngs=nnx.Rngs(0)), jnp.float64)
        assert num_parameters(editor) == 4 * D * RANK and editor.flops_per_token() == 8 * D * RANK
        h, ids = normal((ROWS, LENGTH, D)), np.zeros((ROWS, LENGTH), np.int32)
        ids[0, 1:6], ids[0, 6:10], ids[1, 3:] = 7, 4, 2
        weight = normal((ROWS, LENGTH, D), seed=1) * (ids != 0)[..., None]

        def summed(editor, h):
            y = editor(h, segment_ids=jnp.asarray(ids))[0]
            return jnp.sum(jnp.where(weight != 0, weight * y, 0)), y

        with_gradients = jax.jit(jax.value_and_grad(summed, argnums=(0, 1), has_aux=True))
        (_, y), gradients = with_gradients(editor, jnp.asarray(np.where((ids != 0)[..., None], h, np.nan)))
        np.testing.assert_allclose(y[ids != 0], by_formula(editor, h, ids)[ids != 0], rtol=1e-12, atol=1e-12)
        # A derivative along a random direction, by central differences: errors of size ε² and 1e-16/ε, ε = 1e-5.
        direction = normal(h.shape, seed=2)
        sums = [np.sum(weight * by_formula(editor, h + step * direction, ids)) for step in (1e-5, -1e-5)]
        along = np.sum(np.where((ids != 0)[..., None], gradients[1] * direction, 0))
        np.testing.assert_allclose(along, (sums[0] - sums[1]) / 2e-5, rtol=1e-8)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
        assert all(np.any(leaf != 0) for leaf in jax.tree.leaves(gradients))

        call = jax.jit(lambda block, ids, previous: editor(block, segment_ids=ids, previous=previous))
        parts, _ = feed(call, jnp.zeros((ROWS, 2 * RANK)), h, PLAN, padding=np.nan)
        for row, length in enumerate(PLAN_LENGTHS):
            alone = np.arange(LENGTH)[None] < length
            np.testing.assert_allclose(parts[row], by_formula(editor, h[row : row + 1], alone)[0, :length], rtol=1e-12)


def test_it_starts_as_the_model_without_it():
    """Bit for bit, with 4 d r more parameters and 8 d r more operations a layer. Without it nothing is new."""
    fields = SMALL | dict(mixers=("delta_former",), num_layers=2, ffn_shift_rank=RANK)
    config = ModelConfig(**fields)
    check_model(config)
    edited = LanguageModel(config, rngs=nnx.Rngs(0))
    plain = LanguageModel(dataclasses.replace(config, ffn_shift_rank=0), rngs=nnx.Rngs(0))
    tokens, width = random_tokens((ROWS, LENGTH)), config.d_model
    np.testing.assert_array_equal(forward(edited, tokens), forward(plain, tokens))
    assert num_parameters(edited) - num_parameters(plain) == 2 * 4 * width * RANK
    assert edited.flops_per_token(9) - plain.flops_per_token(9) == 2 * 8 * width * RANK
    names = lambda model: {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(model)}
    assert names(plain) < names(edited) and all("editor" in name for name in names(edited) - names(plain))


def test_beside_experts_and_with_norms_behind():
    """A rank of an entry's own: the cache of prompts in pieces holds what the whole document needs."""
    own = dict(ffn_shift_rank=3, feed_forward="moe", norm_placement="post")
    model = make_model(mixers=(Mixer("softmax_attention", **own),), num_experts=3, num_layers=1)
    tokens = random_tokens((ROWS, LENGTH))
    expected = forward(model, tokens)
    call = jax.jit(lambda block, ids, cache: model(block, segment_ids=ids, cache=cache))
    plan = [((4, 2), 4, "left"), ((0, 3), 4, "right"), ((4, 4), 4, "right")]
    outputs, cache = feed(call, model.init_cache(ROWS, LENGTH), tokens, plan, padding=2**31 - 1)
    for row, length in enumerate((8, 9)):
        np.testing.assert_allclose(outputs[row], expected[row, :length], rtol=2e-4, atol=2e-4)  # as in serving's tests
        np.testing.assert_array_equal(cache[0].length[:, row], length)


def test_a_rank_below_zero():
    with pytest.raises(ValueError, match=r"model\.ffn_shift_rank = -1: must be at least 0"):
        LanguageModel(ModelConfig(vocab_size=32, ffn_shift_rank=-1), rngs=nnx.Rngs(0))
