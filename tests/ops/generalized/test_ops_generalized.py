"""The generalized delta rule: chunks against the recurrence, that against NumPy, and the rules that it contains."""

import dataclasses
import functools

import chex
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from support import gated_cases
from support.gated_cases import case_id, draw_cotangents, poison
from support.ops_cases import padded_rows, segment_rows

from deltaformer_jax import gated_delta_rule, gated_linear_attention, generalized_delta_rule


@dataclasses.dataclass(frozen=True)
class Case(gated_cases.Case):
    """Static settings of one call. `erase`: "shared", like the keys, or "own", of every value head."""

    decay: str = "channel"
    erase: str = "shared"


# Both kinds of decay, both kinds of erase heads, grouped values, V != K. Chunk sizes: no power of two, no divisor of
# T, and small enough for several groups of chunks. Chunks longer than T and no decay are in tests of their own.
CASES = [
    Case(),
    Case(value_heads=4, key_dim=5, value_dim=3, erase="own", chunk=7, scale=0.3),
    Case(decay="head", heads=1, value_heads=3, time=50, chunk=3, state=False),
]


def draw_inputs(case, seed, dtype, batch=2, strength=1.0):
    """The arguments of a case: b a unit vector, a within its half space, so that no transition lengthens a vector."""
    inputs = gated_cases.draw_inputs(case, seed, dtype, batch, strength)
    del inputs["beta"]
    rng = np.random.default_rng(seed + 1)
    heads = case.value_heads if case.erase == "own" else case.heads
    erase = rng.standard_normal((batch, case.time, heads, case.key_dim))
    erase /= np.linalg.norm(erase, axis=-1, keepdims=True)
    inputs["erase_key"] = jnp.asarray(erase, dtype)
    inputs["erase_write"] = jnp.asarray(erase / (1 + np.exp(rng.standard_normal(erase.shape))), dtype)
    return inputs


def call(case, inputs, implementation, segment_ids=None):
    return generalized_delta_rule(
        **inputs, scale=case.scale, segment_ids=segment_ids, chunk_size=case.chunk, implementation=implementation
    )


# Independent roundings of float32 sums over T steps that magnify none of them add up like √T; 16 covers the operations
# of a step and the products a gradient passes through.
ROUNDINGS = 16 * float(jnp.finfo(jnp.float32).eps)


@functools.cache
def compiled(case, implementation):
    """((output, final state), gradients) of a case, compiled once for all segments and values."""

    @jax.jit
    def run(inputs, segment_ids, cotangents):
        out, pullback = jax.vjp(lambda inputs: call(case, inputs, implementation, segment_ids), inputs)
        return out, pullback(cotangents)[0]

    return run


def tolerance(case, dtype):
    """A bound on the difference of two correct evaluations, relative to the largest number compared.

    b is a unit vector, and a is it with every channel multiplied by a number in (0, 1): no transition lengthens a
    vector by more than a factor of 1.2, and a few in a row shorten. Roundings are thus not magnified beyond the factor
    16, which also covers the operations of a step; inside a chunk a row of the inverse adds up to less than 1 + 2 C.
    """
    return 16 * case.time * (1 + 2 * min(case.chunk, case.time)) * float(jnp.finfo(dtype).eps)


def assert_close(case, expected, actual, inputs, dtype=jnp.float64):
    names = ["output", "final_state", *sorted(inputs)]
    for name, a, b in zip(names, jax.tree.leaves(expected), jax.tree.leaves(actual), strict=True):
        bound = tolerance(case, dtype) if dtype == jnp.float64 else ROUNDINGS * np.sqrt(case.time)
        np.testing.assert_allclose(b, a, rtol=0, atol=bound * max(np.abs(a).max(), 1), err_msg=name)


@pytest.mark.parametrize("case", CASES, ids=case_id)
@hypothesis.settings(max_examples=5)
@hypothesis.given(data=st.data())
def test_chunks_agree_with_the_recurrence(case, data):
    """Values, final states and all gradients, in float64, over packed rows with NaN in their padding."""
    with jax.enable_x64(True):
        segment_ids = data.draw(st.one_of(segment_rows(case.time), padded_rows(case.time)))
        strength = data.draw(st.sampled_from([1.0, 1e3]))
        inputs = draw_inputs(case, data.draw(st.integers(0, 2**16)), jnp.float64, strength=strength)
        dout, dstate = draw_cotangents(case, jnp.float64)
        poisoned = poison(inputs, segment_ids)
        cotangents = (poison({"": dout}, segment_ids)[""], dstate)
        expected = compiled(case, "recurrent")(poisoned, segment_ids, cotangents)
        actual = compiled(case, "chunked")(poisoned, segment_ids, cotangents)
        chex.assert_tree_all_finite(expected)
        assert_close(case, expected, actual, inputs)
        for name, x in {"output": actual[0][0], **actual[1]}.items():
            if name != "initial_state":
                np.testing.assert_array_equal(np.asarray(x)[segment_ids == 0], 0, err_msg=f"{name} at padding")


def literal(case, inputs, segment_ids):
    """The definition in NumPy, with whole transition matrices: loops over rows, heads and tokens."""
    x = {name: np.asarray(value, np.float64) for name, value in inputs.items()}
    batch, time, _, width = x["query"].shape
    value_heads, value_width = x["value"].shape[2:]
    scale = width**-0.5 if case.scale is None else case.scale
    out = np.zeros((batch, time, value_heads, value_width))
    final = np.zeros((batch, value_heads, width, value_width))
    for row, h in np.ndindex(batch, value_heads):
        one = {name: y[row, :, h * y.shape[2] // value_heads] for name, y in x.items() if name != "initial_state"}
        q, k, v, b, a = (one[name] for name in ("query", "key", "value", "erase_key", "erase_write"))
        state, previous = x["initial_state"][row, h] if case.state else np.zeros((width, value_width)), None
        for t in np.flatnonzero(segment_ids[row]):
            state = state if previous in (None, segment_ids[row, t]) else np.zeros_like(state)
            previous = segment_ids[row, t]
            decay = np.exp(one["log_decay"][t]) * np.ones(width) if "log_decay" in x else np.ones(width)
            state = (np.diag(decay) - np.outer(a[t], b[t])) @ state + np.outer(k[t], v[t])
            out[row, t, h] = scale * (state.T @ q[t])
        final[row, h] = state
    return out, final


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_the_recurrence_matches_numpy(case, x64):
    third = case.time // 3
    segment_ids = np.zeros((2, case.time), np.int32)
    segment_ids[0, 2:third], segment_ids[0, third : 2 * third], segment_ids[1, 1:] = 5, 1, 2
    inputs = draw_inputs(case, 3, jnp.float64)
    cotangents = draw_cotangents(case, jnp.float64)
    actual, _ = compiled(case, "recurrent")(poison(inputs, segment_ids), segment_ids, cotangents)
    for a, b in zip(literal(case, inputs, segment_ids), actual):
        np.testing.assert_allclose(b, a, rtol=0, atol=tolerance(case, jnp.float64) * max(np.abs(a).max(), 1))


def test_the_rules_that_it_contains(x64):
    """a = β k and b = e^g k, or a = k and b = e^g β k with β v: the gated delta rule. a or b of 0: gated linear
    attention."""
    case = Case(value_heads=4, time=40, chunk=16, key_dim=6, value_dim=5, erase="own")
    inputs = draw_inputs(case, 8, jnp.float64)
    beta = jax.nn.sigmoid(jnp.asarray(np.random.default_rng(5).standard_normal((2, 40, 4))))

    @jax.jit
    def run(inputs):
        erased = {name: inputs.pop(name) for name in ("erase_key", "erase_write")}
        key = jnp.repeat(inputs["key"], 2, axis=2)
        decayed = jnp.exp(inputs["log_decay"]) * key
        rule = functools.partial(generalized_delta_rule, chunk_size=16)
        wide = {**inputs, "key": beta[..., None] * key, "query": jnp.repeat(inputs["query"], 2, axis=2)}
        scaled = {**inputs, "value": beta[..., None] * inputs["value"]}
        return [
            gated_delta_rule(**inputs, beta=beta),
            rule(**wide, erase_key=decayed, erase_write=beta[..., None] * key),
            rule(**scaled, erase_key=beta[..., None] * decayed, erase_write=key),
            gated_linear_attention(**inputs),
            rule(**inputs, **erased | {"erase_key": 0 * decayed}),
            rule(**inputs, **erased | {"erase_write": 0 * decayed}),
        ]

    found = run(dict(inputs))
    for one, others in ((0, (1, 2)), (3, (4, 5))):
        for other in others:
            chex.assert_trees_all_close(found[other], found[one], rtol=1e-12, atol=1e-12)


def test_decoding_equals_the_forward(x64):
    """A prompt in chunks of one token, padded on the left, then token after token; a row of padding keeps its state."""
    case = dataclasses.replace(CASES[1], chunk=1, decay="none")
    inputs = draw_inputs(case, 4, jnp.float64)
    segment_ids = np.ones((2, case.time), np.int32)
    segment_ids[1, :3] = segment_ids[1, -2:] = 0
    inputs = poison(inputs, segment_ids)
    step = jax.jit(lambda inputs, ids: call(case, inputs, None, ids))
    expected = step(inputs, segment_ids)
    at = lambda tokens: {name: x[:, tokens] for name, x in inputs.items() if name != "initial_state"}
    state, outputs = inputs["initial_state"], []
    for tokens in (slice(0, case.time - 4), *(slice(t, t + 1) for t in range(case.time - 4, case.time))):
        out, state = step({**at(tokens), "initial_state": state}, jnp.asarray(segment_ids[:, tokens]))
        outputs.append(out)
    chex.assert_trees_all_close((jnp.concatenate(outputs, axis=1), state), expected, rtol=1e-11, atol=1e-12)


def test_float32_with_gates_strong_and_weak():
    """−1e3 among −1e-3: differences of cumulative sums would be off by 0.004 and more; −1e3 alone forgets all."""
    case = Case(time=40, chunk=16)
    inputs, cotangents = draw_inputs(case, 0, jnp.float32), draw_cotangents(case, jnp.float32)
    strong = np.random.default_rng(1).uniform(size=inputs["log_decay"].shape) < 0.1
    inputs["log_decay"] = jnp.asarray(np.where(strong, -1e3, -1e-3), jnp.float32)
    actual = compiled(case, "chunked")(inputs, None, cotangents)
    with jax.enable_x64(True):
        exact = jax.tree.map(lambda x: x.astype(jnp.float64), (inputs, cotangents))
        expected = compiled(case, "recurrent")(exact[0], None, exact[1])
    assert_close(case, expected, actual, inputs, jnp.float32)
    gone = {**inputs, "log_decay": jnp.full_like(inputs["log_decay"], -1e3), "erase_key": inputs["erase_key"] * 0}
    (_, state), gradients = compiled(case, "chunked")(gone, None, cotangents)
    last = inputs["key"][:, -1, :, :, None] * inputs["value"][:, -1, :, None, :]
    np.testing.assert_allclose(state, last, rtol=1e-5, atol=1e-6)
    chex.assert_tree_all_finite(gradients)
    np.testing.assert_array_equal(gradients["log_decay"], 0)
    np.testing.assert_array_equal(gradients["initial_state"], 0)


def test_bfloat16_is_rounded_once():
    """Sums and states are float32 whatever the dtype; a narrow result is rounded once, at the end."""
    case = dataclasses.replace(CASES[0], chunk=64)
    inputs = draw_inputs(case, 7, jnp.bfloat16)
    run = jax.jit(lambda inputs: call(case, inputs, "chunked"))
    out, state = run(inputs)
    wide = {name: x.astype(jnp.float32) for name, x in inputs.items()}
    exact, exact_state = run(wide)
    assert (out.dtype, state.dtype) == (jnp.bfloat16, jnp.float32)
    np.testing.assert_array_equal(out, exact.astype(jnp.bfloat16))
    np.testing.assert_array_equal(state, exact_state)


def test_second_derivatives(x64):
    """A Hessian in one direction, forwards over backwards: the chunked form has it too."""
    case = Case(time=3, chunk=2, heads=1, value_heads=1, key_dim=2, value_dim=2)
    inputs = draw_inputs(case, 0, jnp.float64, batch=1)
    direction = draw_inputs(case, 1, jnp.float64, batch=1)

    def curvature(implementation):
        slope = jax.grad(lambda inputs: (call(case, inputs, implementation)[0] ** 2).sum())
        return jax.jit(lambda: jax.jvp(slope, (inputs,), (direction,))[1])()

    chex.assert_trees_all_close(curvature("chunked"), curvature("recurrent"), rtol=1e-10, atol=1e-11)


def test_memory_of_the_backward():
    """The law of generalized/chunked.py, in numbers of 4 bytes per head, without running anything."""
    length, chunk, width, heads = 4096, 16, 64, 2
    case = Case(time=length, key_dim=width, value_dim=width, chunk=chunk)
    array = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    names = ("query", "key", "value", "erase_key", "erase_write", "log_decay")
    inputs = {name: array(1, length, heads, width) for name in names} | {"initial_state": array(1, heads, width, width)}
    cotangents = array(1, length, heads, width), array(1, heads, width, width)
    memory = compiled(case, "chunked").lower(inputs, None, cotangents).compile().memory_analysis()
    chunks = length // chunk
    group = (chunks / 3) ** 0.5
    states = (chunks / group + group) * width**2
    tokens = group * chunk * ((9 * 4 + 20) * width + 12 * chunk + 6 * width)
    copies = 2 * 7 * length * width  # the arguments and the cotangent with heads first, and the gradients
    assert memory.temp_size_in_bytes < 4 * heads * (states + tokens + copies)


GOOD = {name: jnp.zeros((2, 6, 2, 8)) for name in ("query", "key", "erase_key", "erase_write")} | {
    "value": jnp.zeros((2, 6, 4, 5))
}


@pytest.mark.parametrize(
    "bad, error, message",
    [
        (dict(erase_key=jnp.zeros((2, 6, 3, 8))), ValueError, r"erase_key must have shape .*\(2, 6, 4, 8\) or, .*2, 8"),
        (dict(erase_write=jnp.zeros((2, 5, 4, 8))), ValueError, r"erase_write must have .*; it has \(2, 5, 4, 8\)"),
        (dict(erase_write=None), TypeError, "erase_write must be an array, not NoneType"),
        (dict(erase_key=np.zeros((2, 6, 4, 8), np.int32)), TypeError, "erase_key has dtype int32: cast it"),
        (dict(value=jnp.zeros((2, 6, 3, 5))), ValueError, "value has 3 heads: it must be a multiple of key's 2 heads"),
        (dict(log_decay=0.5), ValueError, "log_decay holds 0.5"),
        (dict(log_decay=jnp.zeros((2, 6, 2))), ValueError, r"log_decay must have shape .* = \(2, 6, 4\) or, .*4, 8\)"),
        (dict(initial_state=jnp.zeros((2, 2, 8, 5))), ValueError, r"initial_state must have shape .*\(2, 4, 8, 5\)"),
        (dict(chunk_size=0), ValueError, "chunk_size=0: it must be a positive integer"),
        (dict(implementation="parallel"), ValueError, "implementation='parallel' is unknown"),
        (dict(implementation="triton"), NotImplementedError, "implementation='triton': this op has no kernels"),
        (dict(implementation="pallas_tpu"), NotImplementedError, "'pallas_tpu': this op has no kernels of that name"),
    ],
)
def test_bad_input(bad, error, message):
    with pytest.raises(error, match=message):
        generalized_delta_rule(**{**GOOD, **bad})
