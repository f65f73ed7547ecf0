"""The loss and the step: values, padding, accumulation, donation."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support import training_cases as cases

from deltaformer_jax.config import ModelConfig
from deltaformer_jax.model import LanguageModel, num_parameters
from deltaformer_jax.model_parts import ModelParts, merge, model_parts, new_params, params_of
from deltaformer_jax.sharding.mesh import batch_sharding, make_mesh
from deltaformer_jax.training.loss import MAX_LOGITS, batch_nats, summed_nats, token_nats
from deltaformer_jax.training.program import Program
from deltaformer_jax.training.step import loss_and_gradient


@pytest.fixture(scope="module")
def built():
    """A program, and the parameters it begins with."""
    config = cases.small_config("", model__vocab_size=64, mesh__data=1)
    program = Program(config, make_mesh(config.mesh, jax.devices()[:1]))
    return program, program.create_state(0).params


def ragged_batch(rows=8, length=32, seed=0):
    """Rows with from 1 to `length` real tokens, in one to three documents."""
    draw = np.random.default_rng(seed)
    segments = np.zeros((rows, length), np.int32)
    for row, real in enumerate(np.linspace(1, length, rows).astype(int)):
        segments[row, :real] = np.sort(draw.integers(1, 4, real))
    tokens, targets = draw.integers(0, 64, (2, rows, length), dtype=np.int32)
    return {"tokens": tokens, "targets": targets, "segment_ids": segments}


@functools.cache
def compiled(accumulation_steps):
    return jax.jit(
        lambda graph, params, batch: loss_and_gradient(
            ModelParts(graph, None, None, None), params, batch, accumulation_steps
        ),
        static_argnums=0,
    )


def compute(parts, params, batch, accumulation_steps):
    return compiled(accumulation_steps)(parts.graphdef, params, batch)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.uint16, np.uint32])
def test_targets_of_every_integer_type(dtype):
    """A vocabulary of more words than the type counts to: the gradient, too, is that of int32."""
    logits = jnp.asarray(np.random.default_rng(0).standard_normal((1, 5, 300)), jnp.float32)
    targets, mask = np.array([[0, 1, 100, 127, 44]]), np.ones((1, 5), bool)
    nats = lambda kind: jax.value_and_grad(lambda x: token_nats(x, targets.astype(kind), mask).sum())(logits)
    jax.tree.map(np.testing.assert_array_equal, nats(dtype), nats(np.int32))


def test_token_nats_is_minus_log_softmax():
    draw = np.random.default_rng(0)
    logits, targets = draw.normal(size=(2, 5, 7)).astype(np.float32), draw.integers(0, 7, (2, 5))
    mask = draw.random((2, 5)) < 0.5
    wide = logits.astype(np.float64)
    chosen = np.take_along_axis(wide - np.log(np.exp(wide).sum(-1, keepdims=True)), targets[..., None], -1)[..., 0]
    np.testing.assert_allclose(token_nats(logits, targets, mask), np.where(mask, -chosen, 0), rtol=1e-5, atol=1e-6)


def test_what_is_masked_reaches_neither_value_nor_gradient():
    logits = jnp.zeros((1, 3, 4)).at[0, 1].set(jnp.nan)
    mask = jnp.array([[True, False, True]])
    targets = jnp.array([[1, 10_000, 2]])
    value, gradient = jax.value_and_grad(lambda x: token_nats(x, targets, mask).sum())(logits)
    np.testing.assert_allclose(value, 2 * np.log(4), rtol=1e-6)
    assert np.all(np.asarray(gradient[0, 1]) == 0) and np.all(np.isfinite(gradient))


def test_bfloat16_logits_are_read_in_float32():
    logits = jnp.array([[[300.0, 301.0]]], jnp.bfloat16)
    assert token_nats(logits, jnp.array([[0]]), jnp.array([[True]])).dtype == jnp.float32


def test_accumulation_is_weighted_by_tokens(built):
    parts, params = built[0].parts, built[1]
    batch = ragged_batch()
    whole, gradient, _ = compute(parts, params, batch, 1)
    cut, cut_gradient, _ = compute(parts, params, batch, 4)
    np.testing.assert_allclose(whole, cut, rtol=1e-6)

    # The two differ in the order of a sum over tokens: by at most n eps times the sum of its terms' absolute values,
    # which are the gradients of each token's nats and cancel in some parameters by more than in others.
    def nats_of(params):
        return batch_nats(parts.graphdef, params, batch)

    terms = jax.jit(jax.jacrev(nats_of))(params)
    for a, b, term in zip(*map(jax.tree.leaves, (gradient, cut_gradient, terms)), strict=True):
        bound = np.finfo(np.float32).eps * jnp.abs(term).sum((0, 1))  # n terms, divided by n tokens
        assert np.all(jnp.abs(a - b) <= bound), float((jnp.abs(a - b) / bound).max())
    # A mean of the parts' means is another number here: the test would see it.
    nats = jax.jit(nats_of)(params)
    means = [nats[i::4].sum() / (batch["segment_ids"][i::4] > 0).sum() for i in range(4)]
    assert abs(np.mean(means) - float(whole)) > 1e-3


def test_loss_is_the_models(built):
    parts, params = built[0].parts, built[1]
    batch = ragged_batch()
    forward = jax.jit(lambda params: merge(parts, params)(batch["tokens"], segment_ids=batch["segment_ids"])[0])
    logits = forward(params)
    wide = np.asarray(logits, np.float64)
    wide -= np.log(np.exp(wide - wide.max(-1, keepdims=True)).sum(-1, keepdims=True)) + wide.max(-1, keepdims=True)
    nats = -np.take_along_axis(wide, batch["targets"][..., None], -1)[..., 0]
    expected = nats[batch["segment_ids"] > 0].mean()
    np.testing.assert_allclose(compute(parts, params, batch, 1)[0], expected, rtol=1e-5)


def test_step_learns_donates_and_counts(built):
    program, _ = built
    state = program.create_state(0)
    assert num_parameters(program.parts.params) == sum(leaf.size for leaf in jax.tree.leaves(state.params))
    batch = jax.device_put(ragged_batch(), batch_sharding(program.mesh))
    old, losses = state, []
    for n in range(8):
        state, metrics = program.train_step(state, batch)
        assert all(isinstance(value, jax.Array) and value.dtype == jnp.float32 for value in metrics.values())
        losses.append(float(metrics["loss"]))
        assert int(state.step) == n + 1
    assert losses[-1] < losses[0] - 0.3
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old.params))
    assert float(metrics["learning_rate"]) == pytest.approx(
        3e-3 * (0.1 + 0.9 * (1 + np.cos(np.pi * 4 / 17)) / 2), rel=1e-5
    )


def test_a_batch_of_padding_changes_nothing_but_by_decay(built):
    parts, params = built[0].parts, built[1]
    batch = {name: np.zeros((8, 32), np.int32) for name in ("tokens", "targets", "segment_ids")}
    loss, gradient, metrics = compute(parts, params, batch, 1)
    assert float(loss) == 0 and metrics == {}
    assert all(np.all(np.asarray(leaf) == 0) for leaf in jax.tree.leaves(gradient))


def test_logits_in_pieces_are_the_logits_at_once(built):
    """Values and gradients, with a length that the pieces don't divide, a loss mask and NaN-free padding."""
    parts, params = built[0].parts, built[1]
    batch = {**ragged_batch(length=30), "loss_mask": np.random.default_rng(1).random((8, 30)) < 0.7}
    weights = jnp.asarray(np.random.default_rng(2).normal(size=(8, 30)), jnp.float32)

    def total(params, max_logits):
        return jnp.sum(weights * batch_nats(parts.graphdef, params, batch, max_logits=max_logits))

    whole = jax.jit(jax.value_and_grad(lambda params: total(params, 2**26)))(params)
    pieces = jax.jit(jax.value_and_grad(lambda params: total(params, 8 * 128 * 4)))(params)  # 4 positions of 30
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(pieces)):
        # The same terms, added in another order.
        np.testing.assert_allclose(b, a, rtol=1e-5, atol=2e-5 * np.abs(a).max())


@pytest.mark.parametrize("tied, dtype", [(True, "float32"), (False, "bfloat16")])
def test_the_sum_of_nats_in_pieces_has_the_gradient_of_the_sum(tied, dtype):
    """`summed_nats`, whose gradient is made in its forward pass, beside `batch_nats`, in pieces and at once."""
    sizes = dict(model__vocab_size=256, model__num_layers=1, model__implementation="parallel")
    config = cases.small_config("", **sizes, model__tie_embeddings=tied, model__compute_dtype=dtype)
    parts = model_parts(config.model)
    params = jax.jit(lambda key: new_params(config.model, LanguageModel, key))(jax.random.key(0))
    batch = {**ragged_batch(length=30), "loss_mask": np.random.default_rng(1).random((8, 30)) < 0.7}

    def total(function, max_logits):
        whole = lambda params: 3.0 * jnp.sum(function(parts.graphdef, params, batch, max_logits=max_logits))
        return jax.jit(jax.value_and_grad(whole))(params)

    at_once = total(batch_nats, 2**26)
    # The same terms added in another order; in bfloat16, hidden states whose gradients are rounded before or after the
    # factor 3, 2^-8 relative to each.
    near = 2e-5 if dtype == "float32" else 2**-6
    summed = lambda *given, **more: summed_nats(*given, **more)[0]
    for found in (total(summed, 2**26), total(summed, 8 * 128 * 4)):  # the second: 4 positions of 30
        for a, b in zip(jax.tree.leaves(at_once), jax.tree.leaves(found), strict=True):
            np.testing.assert_allclose(b, a, rtol=near, atol=near * np.abs(a).max())


class Biased(LanguageModel):
    def logits(self, x):
        return super().logits(x) + jnp.linspace(0.0, 3.0, self.embedding.vocab_size)


def test_a_model_with_logits_of_its_own_is_trained_on_those():
    config = cases.small_config("", model__vocab_size=256, model__num_layers=1, model__implementation="parallel")
    parts, plain, batch = model_parts(config.model, Biased), model_parts(config.model), ragged_batch()
    params = jax.jit(lambda key: new_params(config.model, Biased, key))(jax.random.key(0))
    at_once = jnp.sum(batch_nats(parts.graphdef, params, batch))
    for cut in ({}, {"max_logits": 8 * 256 * 4}):  # the second: 4 positions of 32
        np.testing.assert_allclose(summed_nats(parts.graphdef, params, batch, **cut)[0], at_once, rtol=1e-6)
    assert abs(float(at_once) / float(jnp.sum(batch_nats(plain.graphdef, params, batch))) - 1) > 0.01


def test_masked_tokens_do_not_count(built):
    parts, params, batch = built[0].parts, built[1], ragged_batch()
    mask = np.random.default_rng(1).random((8, 32)) < 0.5
    loss, _, _ = compute(parts, params, {**batch, "loss_mask": mask}, 1)
    nats = np.asarray(batch_nats(parts.graphdef, params, batch))
    tokens = (mask & (batch["segment_ids"] > 0)).sum()
    np.testing.assert_allclose(loss, (nats * mask).sum() / tokens, rtol=1e-5)


def test_a_large_vocabulary_never_has_all_its_logits_at_once():
    """128k words, 8192 tokens: the logits alone are 4.3 GB; its gradient needs 0.6 GB of temporaries."""
    config = cases.small_config("", model__vocab_size=131_072, model__num_layers=1, model__implementation="chunked")
    parts = model_parts(config.model)
    batch = {name: jax.ShapeDtypeStruct((4, 2048), jnp.int32) for name in ("tokens", "targets", "segment_ids")}
    gradient = lambda params, batch: loss_and_gradient(parts, params, batch, 1)[1]
    memory = jax.jit(gradient).lower(parts.params, batch).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 3 * 4 * MAX_LOGITS


@contextlib.contextmanager
def strict():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


SETTINGS = {
    "strict promotion": strict,
    "x64": lambda: jax.enable_x64(True),
    "debug_nans": lambda: jax.debug_nans(True),
    **{name: lambda name=name: jax.default_matmul_precision(name) for name in ("bfloat16", "tensorfloat32", "highest")},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_step_under_every_setting(built, settings):
    """The whole step, optimiser and guard included: the state keeps its dtypes, and the loss its value. On a CPU every
    precision multiplies in float32."""
    config = cases.small_config("", model__vocab_size=64, mesh__data=1)
    batch = ragged_batch()
    loss = compute(built[0].parts, built[1], batch, 1)[0]
    with settings():
        program = Program(config, make_mesh(config.mesh, jax.devices()[:1]))
        state = program.create_state(0)
        dtypes = jax.tree.map(lambda leaf: leaf.dtype, state)
        after, metrics = program.train_step(state, batch)
        assert jax.tree.map(lambda leaf: leaf.dtype, after) == dtypes
        assert {str(dtype) for dtype in jax.tree.leaves(dtypes)} <= {"float32", "int32", "bool"}
        np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_a_normalised_head_in_pieces(tied):
    """The nats and gradient of pieces of the logits are those of all at once; a scaled head has the same nats."""
    config = ModelConfig(
        vocab_size=32, d_model=16, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=16, normalise_head=True,
        mixers=("softmax_attention",), implementation="parallel", tie_embeddings=tied,
    )  # fmt: skip
    parts, params = model_parts(config), params_of(LanguageModel(config, rngs=nnx.Rngs(0)))
    draw = np.random.default_rng(0)
    batch = {name: draw.integers(0, 32, (2, 6)).astype(np.int32) for name in ("tokens", "targets")}
    batch["segment_ids"] = np.ones((2, 6), np.int32)
    sums = lambda most: jax.jit(
        jax.value_and_grad(lambda params: summed_nats(parts.graphdef, params, batch, max_logits=most)[0])
    )
    whole, gradient = sums(2**26)(params)
    pieces, of_pieces = sums(2 * 128 * 2)(params)
    np.testing.assert_allclose(pieces, whole, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6), of_pieces, gradient)
    if not tied:
        params["embedding"]["head"] = 7.0 * params["embedding"]["head"]
        np.testing.assert_allclose(sums(2**26)(params)[0], whole, rtol=1e-6)
