"""Models of every mixer under JAX's stricter settings: traced with gradients, caches and segments, nothing refused; and
run under each, with the values of the default settings."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support.model_cases import MIXERS

from deltaformer_jax import LanguageModel
from deltaformer_jax.config import ModelConfig
from deltaformer_jax.data.tokenizer import ByteTokenizer


def model(mixer, **fields):
    sizes = dict(d_model=16, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=8, mlp_dim=8)
    return LanguageModel(ModelConfig(vocab_size=257, mixers=(mixer,), **sizes, **fields), rngs=nnx.Rngs(0))


@contextlib.contextmanager
def strict():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@contextlib.contextmanager
def both():
    with strict(), jax.enable_x64(True):
        yield


@pytest.mark.parametrize(
    ("dtype", "settings"),
    [
        pytest.param("bfloat16", both, id="bfloat16-strict-x64"),
        pytest.param("bfloat16", strict, id="bfloat16-strict", marks=pytest.mark.rare),
        pytest.param("float32", lambda: jax.enable_x64(True), id="float32-x64", marks=pytest.mark.rare),
        pytest.param("float32", strict, id="float32-strict", marks=pytest.mark.rare),
        pytest.param("bfloat16", lambda: jax.enable_x64(True), id="bfloat16-x64", marks=pytest.mark.rare),
    ],
)
@pytest.mark.parametrize(
    "mixer",
    # DeltaNet is Gated DeltaNet without its decay, traced by the same code.
    [pytest.param(name, marks=[pytest.mark.rare] * (name == "delta_net")) for name in MIXERS],
)
def test_nothing_is_promoted_unsaid(mixer, dtype, settings):
    """The shapes and dtypes of logits, caches and gradients are those without the settings."""

    def shapes():
        graphdef, params = nnx.split(model(MIXERS[mixer], compute_dtype=dtype))
        tokens = jnp.ones((2, 12), jnp.int32)
        segment_ids = jnp.asarray([[1] * 5 + [2] * 4 + [0] * 3, [0] * 2 + [1] * 10], jnp.int32)

        def total(params):
            merged = nnx.merge(graphdef, params)
            logits, _ = merged(tokens, segment_ids=segment_ids)
            _, cache = merged(tokens, segment_ids=jnp.minimum(segment_ids, 1), cache=merged.init_cache(2, 16))
            more, cache = merged(tokens[:, :1], cache=cache)
            return logits.sum() + more.sum(), (logits, more, cache)

        return jax.tree.flatten(jax.eval_shape(jax.grad(total, has_aux=True), params))

    expected = shapes()
    with settings():
        assert shapes() == expected


@contextlib.contextmanager
def checked(precision):
    """Strict, without a NaN anywhere, and at one of the precisions that JAX knows: others are names for these three."""
    with strict(), jax.debug_nans(True), jax.default_matmul_precision(precision):
        yield


PRECISIONS = "bfloat16", "tensorfloat32", "float32", "F32_F32_F32"
SETTINGS = {"x64": lambda: jax.enable_x64(True)} | {name: functools.partial(checked, name) for name in PRECISIONS}


@functools.cache
def run_with(setting):
    """(logits, gradients) of a model that has every mixer once, over two documents and padding."""
    with SETTINGS[setting]() if setting else contextlib.nullcontext():
        sizes = dict(d_model=16, num_layers=len(MIXERS), num_heads=2, num_kv_heads=2, head_dim=8, mlp_dim=8)
        config = ModelConfig(vocab_size=257, mixers=tuple(MIXERS.values()), chunk_size=4, **sizes)
        graphdef, params = nnx.split(LanguageModel(config, rngs=nnx.Rngs(0)))
        segment_ids = np.asarray([[1] * 5 + [2] * 4 + [0] * 3, [0] * 2 + [1] * 10], np.int32)
        tokens = np.arange(24, dtype=np.int32).reshape(2, 12)

        def total(params):
            logits, _ = nnx.merge(graphdef, params)(tokens, segment_ids=segment_ids)
            return jnp.mean(jnp.where(segment_ids[..., None] > 0, logits, 0.0) ** 2), logits

        (_, logits), gradients = jax.jit(jax.value_and_grad(total, has_aux=True))(params)
        return logits, gradients


@pytest.mark.rare  # One program of every mixer takes a minute to compile; their ops run so in test_ops_settings.py.
@pytest.mark.parametrize("setting", SETTINGS)
def test_every_mixer_runs_under_the_setting_with_the_same_values(setting):
    """A CPU multiplies in float32 at every precision. So nothing but the order of sums may differ."""
    expected = jax.tree.leaves(run_with(None))
    actual = jax.tree.leaves(run_with(setting))
    assert [x.dtype for x in actual] == [x.dtype for x in expected]
    for x, y in zip(actual, expected, strict=True):
        scale = np.abs(y).max()
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-4 * scale)


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.int8, jnp.uint16, jnp.int16, jnp.uint32])
def test_integers_of_every_type_are_the_same_tokens(dtype):
    """What ByteTokenizer gives is uint8, in which 257 is 1."""
    language_model = model("delta_former")
    tokens = ByteTokenizer().encode_array("hello world")[None]
    ids = np.asarray([[1] * 6 + [2] * 5])
    call = jax.jit(lambda tokens, ids: language_model(tokens, segment_ids=ids)[0])
    expected = call(tokens.astype(np.int32), ids.astype(np.int32))
    np.testing.assert_array_equal(call(tokens.astype(dtype), ids.astype(dtype)), expected)
    positions = np.arange(11)[None]
    found = language_model(tokens.astype(np.int32), positions=positions.astype(dtype))[0]
    np.testing.assert_array_equal(found, language_model(tokens.astype(np.int32), positions=positions)[0])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(tokens=np.zeros((1, 4), np.float32)), ValueError, "tokens must be integers"),
        (dict(segment_ids=np.zeros((1, 4), bool)), TypeError, "segment_ids must be integers; it has dtype bool"),
        (dict(positions=np.zeros((1, 4), np.float32)), TypeError, "positions must be integers; it has dtype float32"),
        (
            dict(positions=np.zeros((1, 3), int)),
            ValueError,
            r"positions must have tokens' shape \(1, 4\); it has \(1, 3\)",
        ),
    ],
)
def test_other_types_and_shapes_are_refused(change, error, message):
    arguments = dict(tokens=np.zeros((1, 4), np.int32)) | change
    with pytest.raises(error, match=message):
        model("delta_former")(**arguments)
