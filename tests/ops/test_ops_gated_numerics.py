"""The gated ops where arithmetic is hard: strong gates, long texts, β of 2, keys alike; what their backward keeps."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify
from support.gated_cases import Case, call, draw_cotangents, draw_inputs

from deltaformer_jax import gated_delta_rule, gated_linear_attention
from deltaformer_jax.ops.common.triangular import invert_blocks

EVERY = [(gated_delta_rule, "head"), (gated_delta_rule, "channel"), (gated_linear_attention, "channel")]
# Each op and each decay once, where a test is long.
EACH = [(gated_delta_rule, "channel"), (gated_linear_attention, "head")]
# Independent roundings of float32 sums over T steps that magnify none of them add up like √T; 16 covers the operations
# of a step and the products a gradient passes through.
ROUNDINGS = 16 * float(jnp.finfo(jnp.float32).eps)


@functools.cache
def compiled(case, implementation):
    @jax.jit
    def run(inputs, cotangents):
        out, pullback = jax.vjp(lambda inputs: call(case, inputs, implementation), inputs)
        return out, pullback(cotangents)[0]

    return run


def assert_float32_is_close(case, inputs):
    """chunked in float32 against the recurrence in float64, values and gradients."""
    cotangents = draw_cotangents(case, jnp.float32)
    actual = compiled(case, "chunked")(inputs, cotangents)
    with jax.enable_x64(True):
        inputs, cotangents = jax.tree.map(lambda x: x.astype(jnp.float64), (inputs, cotangents))
        expected = compiled(case, "recurrent")(inputs, cotangents)
    names = ["output", "final_state", *sorted(inputs)]
    for name, a, b in zip(names, jax.tree.leaves(expected), jax.tree.leaves(actual), strict=True):
        bound = ROUNDINGS * np.sqrt(case.time) * max(np.abs(a).max(), 1)
        np.testing.assert_allclose(b, a, rtol=0, atol=bound, err_msg=name)


@pytest.mark.parametrize("op, decay", EVERY)
def test_weak_gates_keep_their_digits_after_strong_ones(op, decay):
    """Gates of −1e3 among gates of −1e-3: differences of cumulative sums would be off by 0.004 and more."""
    case = Case(delta=op is gated_delta_rule, decay=decay, time=100, chunk=64)
    inputs = draw_inputs(case, 0, jnp.float32)
    rng = np.random.default_rng(1)
    shape = inputs["log_decay"].shape
    inputs["log_decay"] = jnp.asarray(np.where(rng.uniform(size=shape) < 0.1, -1e3, -1e-3), jnp.float32)
    assert_float32_is_close(case, inputs)


@pytest.mark.parametrize("op, decay", EVERY)
def test_the_strongest_gates_forget_everything(op, decay):
    """−1e3 at every step: e^−1000 is 0, each token sees itself only, and every gradient is finite."""
    case = Case(delta=op is gated_delta_rule, decay=decay, time=130, chunk=64, scale=1.0)
    inputs = draw_inputs(case, 0, jnp.float32)
    inputs["log_decay"] = jnp.full_like(inputs["log_decay"], -1e3)
    (out, state), gradients = compiled(case, "chunked")(inputs, draw_cotangents(case, jnp.float32))
    written = inputs["value"] * inputs["beta"][..., None] if case.delta else inputs["value"]
    expected = jnp.sum(inputs["query"] * inputs["key"], axis=-1, keepdims=True) * written
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)
    expected = inputs["key"][:, -1, :, :, None] * written[:, -1, :, None, :]
    np.testing.assert_allclose(state, expected, rtol=1e-5, atol=1e-6)
    chex.assert_tree_all_finite(gradients)
    np.testing.assert_array_equal(gradients["log_decay"], 0)
    np.testing.assert_array_equal(gradients["initial_state"], 0)


@pytest.mark.parametrize("decay", ["none", "channel"])
def test_reflections(decay):
    """β = 2 and unit keys: I − 2 k kᵀ reflects, and without decay a state keeps its length."""
    case = Case(decay=decay, beta="to_two", time=200, chunk=64, key_dim=8)
    inputs = draw_inputs(case, 2, jnp.float32)
    inputs["beta"] = jnp.full_like(inputs["beta"], 2.0)
    assert_float32_is_close(case, inputs)


def test_keys_alike():
    """Unit keys of mean cosine 0.9: a power series of A has terms of 1e26 here."""
    case = Case(time=128, chunk=128, key_dim=64)
    inputs = draw_inputs(case, 3, jnp.float32)
    key = inputs["key"] + jnp.full(64, 3 / 8, jnp.float32)[None, None, None]
    inputs["key"] = key / jnp.linalg.norm(key, axis=-1, keepdims=True)
    cosines = jnp.einsum("bihk,bjhk->bhij", inputs["key"], inputs["key"])
    assert cosines.mean() > 0.89
    inputs["log_decay"] = inputs["log_decay"] * 1e-3
    assert_float32_is_close(case, inputs)


@pytest.mark.parametrize("size", [1, 2, 8, 64])
def test_inverses_of_blocks(size, x64):
    a = np.random.default_rng(0).standard_normal((3, 2, size, size)) / 4
    expected = np.linalg.inv(np.eye(size) + np.tril(a, -1))
    np.testing.assert_allclose(invert_blocks(jnp.asarray(a)), expected, rtol=1e-9, atol=1e-9 * np.abs(expected).max())


@pytest.mark.parametrize("op, decay", EACH)
def test_65536_tokens(op, decay):
    """Documents, gates from −1e-4 to −1e3, β up to 2: finite, and the last document is right."""
    delta = op is gated_delta_rule
    case = Case(delta=delta, decay=decay, beta="to_two", time=65536, chunk=64, heads=1, value_heads=1, state=False)
    inputs = draw_inputs(case, 4, jnp.float32, batch=1)
    rng = np.random.default_rng(5)
    sizes = 10 ** rng.uniform(-4, 3, inputs["log_decay"].shape)
    inputs["log_decay"] = -jnp.asarray(sizes, jnp.float32)
    segment_ids = np.repeat(np.arange(1, 9), 8192)[None]

    @jax.jit
    def run(inputs):
        out, pullback = jax.vjp(lambda inputs: call(case, inputs, "chunked", segment_ids)[0], inputs)
        return out, pullback(out)[0]

    out, gradients = run(inputs)
    chex.assert_tree_all_finite((out, gradients))
    last = {name: x[:, -8192:] for name, x in inputs.items()}
    with jax.enable_x64(True):
        last = jax.tree.map(lambda x: x.astype(jnp.float64), last)
        expected, _ = jax.jit(lambda inputs: call(case, inputs, "recurrent"))(last)
    bound = ROUNDINGS * np.sqrt(8192) * np.abs(expected).max()
    np.testing.assert_allclose(out[:, -8192:], expected, rtol=0, atol=bound)


@pytest.mark.parametrize("implementation", ["chunked", "recurrent"])
def test_checkify_finds_an_overflowing_state(implementation):
    """‖k‖² β around 100: every token multiplies what the state has along k by −99, and float32 ends at 10^38."""
    rng = np.random.default_rng(0)
    query, key, value = (jnp.asarray(rng.standard_normal((1, 40, 1, 4)), jnp.float32) for _ in range(3))
    run = functools.partial(gated_delta_rule, implementation=implementation)
    checked = jax.jit(checkify.checkify(run, errors=checkify.nan_checks))
    error, _ = checked(query, 10 * key / jnp.linalg.norm(key, axis=-1, keepdims=True), value)
    assert "nan generated by primitive" in error.get()
    error, (out, _) = checked(query, key / jnp.linalg.norm(key, axis=-1, keepdims=True), value)
    assert error.get() is None and np.isfinite(out).all()


def backward_bytes(op, length, width, decay):
    """Temporaries of value and gradients, [1, T, 2, width] float32, without running anything."""
    case = Case(delta=op is gated_delta_rule, decay=decay, time=length, key_dim=width, value_dim=width, chunk=64)
    array = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    inputs = {name: array(1, length, 2, width) for name in ("query", "key", "value")}
    inputs["log_decay"] = array(1, length, 2, *([width] if decay == "channel" else []))
    if case.delta:
        inputs["beta"] = array(1, length, 2)
    inputs["initial_state"] = array(1, 2, width, width)
    cotangents = array(1, length, 2, width), array(1, 2, width, width)
    memory = compiled(case, "chunked").lower(inputs, cotangents).compile().memory_analysis()
    return memory.temp_size_in_bytes


@pytest.mark.parametrize("op, decay", EACH)
def test_memory_of_the_backward(op, decay):
    """The law of gated/chunked.py, for groups of G = √(n/3) of n = T/C chunks: 16 times the tokens, 4 times as much."""
    width, chunk, heads = 64, 64, 2
    sizes = {length: backward_bytes(op, length, width, decay) for length in (4096, 65536)}
    for length, size in sizes.items():
        chunks = length // chunk
        group = (chunks / 3) ** 0.5
        states = (chunks / group + 3 * group) * width * width
        rows = (12 if decay == "channel" else 8) * group * chunk * (chunk + 2 * width)
        assert size < 4 * heads * (states + rows)
    # A state for each chunk, to say nothing of more, would take 8 times as much.
    assert sizes[65536] < 4.5 * sizes[4096]
