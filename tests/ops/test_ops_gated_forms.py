"""The gated ops: chunks against the recurrence that defines them, and that against NumPy."""

import functools

import chex
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from support.gated_cases import CASES, Case, call, case_id, draw_cotangents, draw_inputs, poison
from support.ops_cases import padded_rows, segment_rows

from deltaformer_jax import delta_attention, gated_delta_rule

FORMS = ["recurrent", "chunked"]


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

    With unit keys and β ≤ 2 every transition is a contraction, so that a rounding made at one of T steps is not
    magnified by the later ones, forward or backward; inside a chunk the inverse's entries are at most β and add up to
    1 + 2 C along a row. 16 covers the operations of a step and the products a gradient passes through.
    """
    return 16 * case.time * (1 + 2 * min(case.chunk, case.time)) * float(jnp.finfo(dtype).eps)


@pytest.mark.parametrize("case", CASES, ids=case_id)
@hypothesis.settings(max_examples=6)
@hypothesis.given(data=st.data())
def test_chunks_agree_with_the_recurrence(case, data):
    """Values, final states and all gradients, in float64, over packed rows with NaN in their padding."""
    with jax.enable_x64(True):
        segment_ids = data.draw(st.one_of(segment_rows(case.time), padded_rows(case.time)))
        inputs = draw_inputs(case, data.draw(st.integers(0, 2**16)), jnp.float64)
        dout, dstate = draw_cotangents(case, jnp.float64)
        poisoned = poison(inputs, segment_ids)
        cotangents = (poison({"": dout}, segment_ids)[""], dstate)
        expected = compiled(case, "recurrent")(poisoned, segment_ids, cotangents)
        actual = compiled(case, "chunked")(poisoned, segment_ids, cotangents)
        chex.assert_tree_all_finite(expected)
        names = ["output", "final_state", *sorted(inputs)]
        for name, a, b in zip(names, jax.tree.leaves(expected), jax.tree.leaves(actual), strict=True):
            np.testing.assert_allclose(
                b, a, rtol=0, atol=tolerance(case, jnp.float64) * max(np.abs(a).max(), 1), err_msg=name
            )
            if name not in ("final_state", "initial_state"):
                np.testing.assert_array_equal(np.asarray(b)[segment_ids == 0], 0, err_msg=f"{name} at padding")


def literal(case, inputs, segment_ids):
    """The definition in NumPy: loops over rows, heads and tokens."""
    x = {name: np.asarray(value, np.float64) for name, value in inputs.items()}
    batch, time, heads, width = x["query"].shape
    value_heads, value_width = x["value"].shape[2:]
    scale = width**-0.5 if case.scale is None else case.scale
    out = np.zeros((batch, time, value_heads, value_width))
    final = np.zeros((batch, value_heads, width, value_width))
    for b, h in np.ndindex(batch, value_heads):
        state = x["initial_state"][b, h].copy() if case.state else np.zeros((width, value_width))
        previous = None
        for t in range(time):
            segment = segment_ids[b, t]
            if segment == 0:
                continue
            if previous not in (None, segment):
                state = np.zeros_like(state)
            previous = segment
            q, k = (x[name][b, t, h * heads // value_heads] for name in ("query", "key"))
            if "log_decay" in x:
                state = np.exp(x["log_decay"][b, t, h]).reshape(-1, 1) * state
            u = x["value"][b, t, h]
            if case.delta:
                u = (x["beta"][b, t, h] if "beta" in x else 1.0) * (u - state.T @ k)
            state = state + np.outer(k, u)
            out[b, t, h] = scale * (state.T @ q)
        final[b, h] = state
    return out, final


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_the_recurrence_matches_numpy(case, x64):
    third = case.time // 3
    segment_ids = np.zeros((2, case.time), np.int32)
    segment_ids[0, 2:third] = 5
    segment_ids[0, third : 2 * third] = 1
    segment_ids[1, 1:] = 2
    inputs = draw_inputs(case, 3, jnp.float64)
    cotangents = draw_cotangents(case, jnp.float64)
    actual, _ = compiled(case, "recurrent")(poison(inputs, segment_ids), segment_ids, cotangents)
    for a, b in zip(literal(case, inputs, segment_ids), actual):
        np.testing.assert_allclose(b, a, rtol=0, atol=tolerance(case, jnp.float64) * max(np.abs(a).max(), 1))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("case", [CASES[1], CASES[4], CASES[6], CASES[10]], ids=case_id)
def test_narrow_dtypes_stay_within_their_rounding(case, dtype):
    """chunked in float32 and bfloat16 against the float64 recurrence on the same (rounded) inputs.

    Whatever the dtype, sums and states are float32, whose independent roundings at T steps add up like √T; a narrow
    result is rounded once, at the end.
    """
    inputs, cotangents = draw_inputs(case, 7, dtype), draw_cotangents(case, dtype)
    actual = compiled(case, "chunked")(inputs, None, cotangents)
    state, gradients = actual[0][1], dict(actual[1])
    assert state.dtype == jnp.float32
    assert all(x.dtype == inputs[name].dtype for name, x in gradients.items())
    with jax.enable_x64(True):
        inputs, cotangents = jax.tree.map(lambda x: x.astype(jnp.float64), (inputs, cotangents))
        expected = compiled(case, "recurrent")(inputs, None, cotangents)
    bound = 16 * np.sqrt(case.time) * float(jnp.finfo(jnp.float32).eps)
    for name, a, b in zip(["output", "final_state", *sorted(inputs)], *map(jax.tree.leaves, (expected, actual))):
        rounding = float(jnp.finfo(b.dtype).eps) / 2
        error = np.abs(np.asarray(a) - np.asarray(b, np.float64))
        allowed = rounding * np.abs(np.asarray(a)) + bound * max(np.abs(a).max(), 1)
        assert np.all(error <= allowed), f"{name}: {(error - allowed).max():.1e} too much"


@pytest.mark.parametrize("case, implementation", [(CASES[1], "recurrent"), (CASES[2], None), (CASES[10], None)])
def test_decoding_equals_the_forward(case, implementation, x64):
    """A prompt, with padding on its left, then one token after another from the state: the whole text in one call."""
    inputs = draw_inputs(case, 4, jnp.float64)
    segment_ids = np.ones((2, case.time), np.int32)
    segment_ids[1, :3] = 0
    inputs = poison(inputs, segment_ids)
    step = jax.jit(lambda inputs, ids: call(case, inputs, implementation, ids))
    expected, final = step(inputs, segment_ids)
    at = lambda tokens: {name: x[:, tokens] for name, x in inputs.items() if name != "initial_state"}
    state, prompt = inputs["initial_state"], case.time - 6
    out, state = step({**at(slice(0, prompt)), "initial_state": state}, segment_ids[:, :prompt])
    outputs = [out]
    for t in range(prompt, case.time):
        out, state = step({**at(slice(t, t + 1)), "initial_state": state}, jnp.asarray(segment_ids[:, t : t + 1]))
        outputs.append(out)
    bound = tolerance(case, jnp.float64)
    np.testing.assert_allclose(jnp.concatenate(outputs, axis=1), expected, rtol=0, atol=bound * np.abs(expected).max())
    np.testing.assert_allclose(state, final, rtol=0, atol=bound * np.abs(final).max())


@pytest.mark.parametrize("implementation", FORMS)
@pytest.mark.parametrize("time", [1, 5])
def test_a_row_of_padding_keeps_its_state(time, implementation, x64):
    """Decoding a batch of which one row has ended: its token is padding, its state stays."""
    case = Case(time=time)
    inputs = draw_inputs(case, 0, jnp.float64)
    segment_ids = np.repeat([[1], [0]], time, axis=1)
    run = jax.jit(lambda inputs, ids: call(case, inputs, implementation, ids))
    out, state = run(poison(inputs, segment_ids), segment_ids)
    np.testing.assert_array_equal(out[1], 0)
    np.testing.assert_array_equal(state[1], inputs["initial_state"][1])


@pytest.mark.parametrize("case", [CASES[2], CASES[9]], ids=case_id)
def test_packed_equals_separate(case, x64):
    """Two documents in a row, padding around them: the outputs of each alone; the first one's from the initial state,
    the second one's final state."""
    inputs = draw_inputs(case, 6, jnp.float64)
    first, second = slice(1, 10), slice(12, case.time - 1)
    segment_ids = np.zeros((2, case.time), np.int32)
    segment_ids[:, first], segment_ids[:, second] = 1, 2
    run = jax.jit(lambda inputs, ids=None: call(case, inputs, "chunked", ids))
    out, final = run(poison(inputs, segment_ids), segment_ids)
    alone = lambda part: {name: x[:, part] for name, x in inputs.items() if name != "initial_state"}
    expected_first, _ = run({**alone(first), "initial_state": inputs["initial_state"]})
    expected_second, expected_final = run(alone(second))
    for a, b in ((expected_first, out[:, first]), (expected_second, out[:, second]), (expected_final, final)):
        np.testing.assert_allclose(b, a, rtol=0, atol=tolerance(case, jnp.float64) * max(np.abs(a).max(), 1))


@pytest.mark.parametrize("case", [CASES[0], CASES[9]], ids=case_id)
def test_without_segments_equals_one_segment(case, x64):
    inputs = draw_inputs(case, 5, jnp.float64)
    cotangents = draw_cotangents(case, jnp.float64)
    ones = np.ones((2, case.time), np.int32)
    run = compiled(case, "chunked")
    chex.assert_trees_all_close(run(inputs, None, cotangents), run(inputs, ones, cotangents), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("implementation", FORMS)
def test_without_decay_equals_delta_attention(implementation, x64):
    """κ₁ = κ₂ = linear, w = k, α = β, a write scale of 1 and the same read scale: DeltaNet, written as attention."""
    case = Case(decay="none", time=45, chunk=16, key_dim=6, value_dim=5, state=False, scale=0.7)
    inputs = draw_inputs(case, 0, jnp.float64)
    out, _ = jax.jit(lambda inputs: call(case, inputs, implementation))(inputs)
    expected = delta_attention(
        inputs["query"],
        inputs["key"],
        inputs["value"],
        alpha=inputs["beta"],
        beta=inputs["beta"],
        write_similarity="linear",
        read_similarity="linear",
        write_scale=1.0,
        read_scale=0.7,
        implementation="parallel",
    )
    np.testing.assert_allclose(out, expected, rtol=0, atol=tolerance(case, jnp.float64) * np.abs(expected).max())


@pytest.mark.parametrize("delta", [True, False])
def test_one_decay_a_head_is_the_same_decay_of_every_channel(delta, x64):
    case = Case(delta=delta, time=40, chunk=16, value_heads=4)
    inputs = draw_inputs(case, 8, jnp.float64)
    wide = {**inputs, "log_decay": jnp.repeat(inputs["log_decay"][..., None], case.key_dim, axis=-1)}
    run = jax.jit(lambda inputs: call(case, inputs, None))
    chex.assert_trees_all_close(run(inputs), run(wide), rtol=1e-12, atol=1e-13)


def test_the_chunk_does_not_matter(x64):
    inputs = draw_inputs(Case(decay="channel", time=70), 9, jnp.float64)
    run = jax.jit(lambda inputs: [gated_delta_rule(**inputs, chunk_size=size) for size in (None, 1, 12, 1000)])
    results = run(inputs)
    for result in results[1:]:
        chex.assert_trees_all_close(result, results[0], rtol=1e-12, atol=1e-13)


def test_mapped_over_a_further_axis():
    """vmap, forward and backward, in float32: what a population of models does."""
    case = Case(decay="channel", time=40, chunk=16)
    inputs = [draw_inputs(case, seed, jnp.float32) for seed in (1, 2, 3)]
    cotangents = draw_cotangents(case, jnp.float32)

    def run(inputs):
        out, pullback = jax.vjp(lambda inputs: call(case, inputs, "chunked"), inputs)
        return out, pullback(cotangents)[0]

    actual = jax.jit(jax.vmap(run))(jax.tree.map(lambda *x: jnp.stack(x), *inputs))
    expected = [compiled(case, "chunked")(one, None, cotangents) for one in inputs]
    chex.assert_trees_all_close(actual, jax.tree.map(lambda *x: jnp.stack(x), *expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("delta", [True, False])
def test_second_derivatives(delta, x64):
    """The recurrence has them; chunked says that it has not."""
    case = Case(delta=delta, time=6, chunk=4, heads=1, value_heads=1, key_dim=2, value_dim=2)
    inputs = draw_inputs(case, 0, jnp.float64, batch=1)

    def slope(key, implementation):
        loss = lambda key: (call(case, {**inputs, "key": key}, implementation)[0] ** 2).sum()
        return (jax.grad(loss)(key) ** 2).sum()

    with pytest.raises(NotImplementedError, match=r"no second derivative: use implementation='recurrent'"):
        jax.grad(slope)(inputs["key"], "chunked")
    direction = jnp.asarray(np.random.default_rng(0).standard_normal(inputs["key"].shape))
    derivative = jnp.vdot(jax.grad(slope)(inputs["key"], "recurrent"), direction)
    h = 1e-5
    ahead, behind = (slope(inputs["key"] + step * direction, "recurrent") for step in (h, -h))
    np.testing.assert_allclose(derivative, (ahead - behind) / (2 * h), rtol=1e-6)
