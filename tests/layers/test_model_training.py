"""What training relies on: gradients, rematerialisation, precision, initialisation, the pytree."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support.model_cases import (
    LENGTH,
    MODELS,
    ROWS,
    SMALL,
    VOCABULARY,
    forward,
    loss_and_gradient,
    make_model,
    mean_loss,
    random_tokens,
)

from deltaformer_jax.config import ModelConfig
from deltaformer_jax.model import LanguageModel, num_parameters

AXES = {"vocab", "embed", "heads", "kv_heads", "head_dim", "mlp", "rank", "conv"}


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param(fields, id=name, marks=[] if name in ("three overrides", "memories") else pytest.mark.rare)
        for name, fields in MODELS.items()
    ],
)
def test_gradients_reach_every_parameter_and_survive_rematerialisation(fields):
    tokens, ids = random_tokens((ROWS, LENGTH)), np.ones((ROWS, LENGTH), np.int32)
    loss, gradient = loss_and_gradient(make_model(**fields), tokens, ids)
    for path, leaf in jax.tree.leaves_with_path(gradient):
        assert np.isfinite(leaf).all() and np.abs(leaf).max() > 0, jax.tree_util.keystr(path)
    loss_again, gradient_again = loss_and_gradient(make_model(**fields, remat="block"), tokens, ids)
    np.testing.assert_allclose(loss, loss_again, rtol=1e-6)
    # The same sums, perhaps fused otherwise.
    for plain, again in zip(jax.tree.leaves(gradient), jax.tree.leaves(gradient_again)):
        np.testing.assert_allclose(again, plain, rtol=1e-4, atol=1e-6)


def test_chunked_form_trains_as_the_parallel_one():
    """Its hand-written backward inside rematerialised blocks inside a scan."""
    tokens, ids = random_tokens((ROWS, LENGTH)), np.ones((ROWS, LENGTH), np.int32)
    fields = dict(mixers=("delta_former",), num_layers=2, remat="block")
    parallel = loss_and_gradient(make_model(**fields), tokens, ids)
    chunked = loss_and_gradient(make_model(**fields, implementation="chunked", chunk_size=8), tokens, ids)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), *_leaves(parallel, chunked))


def test_remat_changes_no_gradient():
    tokens, ids = random_tokens((ROWS, LENGTH)), np.ones((ROWS, LENGTH), np.int32)
    fields = dict(mixers=("delta_former",), num_layers=2, implementation="chunked", chunk_size=8)
    plain = loss_and_gradient(make_model(**fields), tokens, ids)
    for remat in ("operands", "products", "kernels"):
        again = loss_and_gradient(make_model(**fields, remat=remat), tokens, ids)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), *_leaves(plain, again))


def test_remat_from_none_to_block_keeps_less_and_less():
    """The numbers that the forward pass leaves to the backward pass. "block" keeps only each block's input."""

    def kept(remat):
        model = make_model(mixers=("delta_former",), remat=remat, implementation="chunked")
        tokens = random_tokens((2, 32))
        pullback = jax.eval_shape(lambda model: jax.vjp(lambda model: mean_loss(model, tokens), model)[1], model)
        return sum(leaf.size for leaf in jax.tree.leaves(pullback))

    none, operands, products, kernels, block = map(kept, ("none", "operands", "products", "kernels", "block"))
    assert block < kernels < products < operands < none and block < 0.5 * none
    assert kept("auto") == block


@pytest.mark.parametrize(
    "fields",
    [
        dict(mixers=("delta_former",)),
        dict(mixers=("delta_former",), write_query="query"),
        dict(mixers=("softmax_attention",)),
        dict(mixers=("gated_delta_net",)),
        dict(mixers=("retention",)),
    ],
    ids=["untied", "tied", "softmax", "gated delta rule", "gated linear attention"],
)
def test_remat_kernels_never_runs_an_op_forward_again(fields):
    """The loops of the lowered gradient are counted: the ops' forward and backward passes, and the scan over layers."""

    def loops(remat):
        model = make_model(**fields, num_layers=1, remat=remat, implementation="chunked")
        lowered = jax.jit(jax.grad(mean_loss)).lower(model, random_tokens((2, 32)))
        return lowered.as_text().count("stablehlo.while")

    assert loops("none") == loops("operands") == loops("products") == loops("kernels") < loops("block")


def test_layers_follow_the_pattern():
    model = make_model()
    assert [type(block.mixer).__name__ for block in model.blocks] == ["DeltaFormer", "SoftmaxAttention"]
    assert all(block.mlp.up.shape == (2, 16, 24) for block in model.blocks)


def test_scan_applies_layers_in_order():
    """The scanned stack equals the blocks called one after the other, of each period in turn."""
    model, tokens = make_model(), random_tokens((ROWS, LENGTH))
    x = model.embedding(tokens)
    apply = jax.jit(lambda block, x: block(x)[0])
    for period in range(model.periods):
        for stacked in model.blocks:
            x = apply(jax.tree.map(lambda leaf, period=period: leaf[period], stacked), x)
    np.testing.assert_allclose(model.logits(model.final_norm(x)), forward(model, tokens), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fields", MODELS.values(), ids=MODELS)
def test_axes_name_every_dimension(fields):
    """Without the leading axis over periods; names from one list, so that a table can map them to a mesh."""
    model = make_model(**fields)
    for path, parameter in nnx.to_flat_state(nnx.state(model)):
        axes = parameter.get_metadata()["axes"]
        stacked = path[0] == "blocks"
        assert len(axes) + stacked == parameter[...].ndim, path
        assert set(axes) <= AXES and parameter[...].dtype == jnp.float32
        if path[-1] == "scale":
            assert parameter.get_metadata()["decay"] is False


def test_split_and_merge():
    model, tokens = make_model(), random_tokens((ROWS, LENGTH))
    np.testing.assert_array_equal(forward(nnx.merge(*nnx.split(model)), tokens), forward(model, tokens))


def test_initial_values():
    """Built under jit, with the tree that eval_shape promises. Kernels have variance 1 / fan-in, those into the
    residual stream 1 / (2 layers) of that; no two layers or kernels are alike; the loss is that of a guess."""
    config = ModelConfig(vocab_size=256, d_model=128, num_layers=8, num_heads=4, num_kv_heads=2, head_dim=32)

    def build(key):
        return LanguageModel(config, rngs=nnx.Rngs(key))

    model = jax.jit(build)(jax.random.key(0))
    shapes = jax.eval_shape(build, jax.random.key(0))
    assert jax.tree.structure(shapes) == jax.tree.structure(model)
    assert num_parameters(shapes) == num_parameters(model)
    mixer, mlp = model.blocks[0].mixer, model.blocks[0].mlp
    for kernel, fan_in, factor in [
        (mixer.inputs.query, 128, 1),
        (mixer.output, 128, 16),
        (mlp.up, 128, 1),
        (mlp.down, mlp.mlp_dim, 16),
    ]:
        np.testing.assert_allclose(np.std(kernel[...]), (fan_in * factor) ** -0.5, rtol=0.03)
    assert np.abs(mlp.up[0] - mlp.up[1]).max() > 0.1 and np.abs(mlp.up[...] - mlp.gate[...]).max() > 0.1
    tokens = np.random.default_rng(0).integers(0, 256, (2, 32))
    np.testing.assert_allclose(np.std(model.embedding(tokens)), 0.02 * 128**0.5, rtol=0.03)
    assert abs(jax.jit(mean_loss)(model, tokens) - np.log(256)) < 0.3


@pytest.mark.parametrize("fields", MODELS.values(), ids=MODELS)
def test_bfloat16_compute(fields):
    """Each block adds to x a branch computed with a handful of roundings of 2^-9, and x is rounded after each: with 2 n
    branches of about x's size that is below 2 n · 2^-8 of the logits' norm, were all errors to add up."""
    tokens, ids = random_tokens((ROWS, LENGTH)), np.ones((ROWS, LENGTH), np.int32)
    exact = forward(make_model(**fields), tokens)
    model = make_model(**fields, compute_dtype="bfloat16")
    near = forward(model, tokens)
    assert near.dtype == jnp.float32 and jax.eval_shape(lambda: model.hidden(tokens)[0]).dtype == jnp.bfloat16
    branches = 2 * len(model.blocks) * model.periods
    error = np.linalg.norm(near - exact) / np.linalg.norm(exact)
    assert 1e-4 < error < branches * 2.0**-8
    if fields == {}:
        gradient = loss_and_gradient(model, tokens, ids)[1]
        assert all(leaf.dtype == jnp.float32 and np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_linen_bridge():
    """The model inside a Linen program: same logits from the same parameters."""
    config, tokens = ModelConfig(**SMALL), random_tokens((ROWS, LENGTH))
    linen = nnx.bridge.to_linen(LanguageModel, config)
    variables = jax.jit(linen.init)(jax.random.key(0), tokens)
    logits, cache = jax.jit(linen.apply)(variables, tokens)
    assert logits.shape == (ROWS, LENGTH, VOCABULARY) and cache is None
    model = make_model()
    flat = {_names(path): leaf for path, leaf in jax.tree.leaves_with_path(variables["params"])}
    leaves = [flat[_names(path)] for path, _ in jax.tree.leaves_with_path(model)]
    same = jax.tree.unflatten(jax.tree.structure(model), leaves)
    np.testing.assert_allclose(forward(same, tokens), logits, rtol=1e-5, atol=1e-6)


def _leaves(*trees):
    return [jax.tree.leaves(tree) for tree in trees]


def _names(path):
    """A parameter's place in either tree; the last key is the Param's own."""
    return tuple(re.findall(r"\w+", jax.tree_util.keystr(path))[:-1])
