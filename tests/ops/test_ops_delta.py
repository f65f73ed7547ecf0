"""delta_attention: every form against the recurrence that defines it, and the recurrence against NumPy."""

import functools

import chex
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from support.ops_cases import CASES, Case, call, case_id, draw_inputs, inverse_norm, poison, segment_rows

from deltaformer_jax import delta_attention, delta_values


@functools.cache
def compiled(case, implementation):
    """(output, gradients) of a case, compiled once for all segments and values."""

    @jax.jit
    def run(inputs, segment_ids, cotangent):
        out, pullback = jax.vjp(lambda inputs: call(case, inputs, implementation, segment_ids), inputs)
        return out, pullback(cotangent)[0]

    return run


def tolerance(case, inputs, segment_ids, dtype):
    """A bound on the difference of two correct evaluations, relative to the largest number compared.

    Each of u's entries sums at most T terms, so a form errs by about T roundings, magnified by ‖M⁻¹‖ in the forward and
    once more in the backward, where M⁻ᵀ is applied to what holds u. Scores up to |s| enter through exp, whose relative
    error is |s| roundings; 16 covers these scores, both stages and the constant.
    """
    norm = inverse_norm(case, inputs, segment_ids)
    return 16 * case.time * float(jnp.finfo(dtype).eps) * norm**2


@pytest.mark.parametrize("implementation", ["parallel", "chunked"])
@pytest.mark.parametrize("case", CASES, ids=case_id)
@hypothesis.settings(max_examples=6)
@hypothesis.given(data=st.data())
def test_forms_agree_with_the_recurrence(case, implementation, data):
    """Values and all gradients, in float64, over packed rows with NaN in their padding."""
    with jax.enable_x64(True):
        segment_ids = data.draw(segment_rows(case.time))
        inputs = draw_inputs(case, data.draw(st.integers(0, 2**16)), jnp.float64)
        bound = tolerance(case, inputs, segment_ids, jnp.float64)
        rng = np.random.default_rng(1)
        cotangent = jnp.asarray(rng.standard_normal((2, case.time, case.heads, case.value_dim)))
        poisoned = poison(inputs, segment_ids)
        expected = compiled(case, "recurrent")(poisoned, segment_ids, poison(cotangent, segment_ids))
        actual = compiled(case, implementation)(poisoned, segment_ids, poison(cotangent, segment_ids))
        chex.assert_tree_all_finite(expected)
        for name, a, b in zip(["out", *sorted(inputs)], jax.tree.leaves(expected), jax.tree.leaves(actual)):
            error = np.abs(a - b).max()
            assert error <= bound * max(np.abs(a).max(), 1), (
                f"{name}: {error:.1e} > {bound:.1e} · {np.abs(a).max():.1e}"
            )
            hidden = np.where((segment_ids == 0).reshape(*segment_ids.shape, *[1] * (b.ndim - 2)), b, 0)
            np.testing.assert_array_equal(hidden, 0, err_msg=f"{name} at padding")


# Of the cases without round those that differ in their products; the others on demand.
DIFFERENT = [0, 1, 3, 4, 6, 9, 11]
ON_DEMAND = [pytest.param(CASES[i], marks=pytest.mark.rare) for i in (2, 5, 7, 8, 10, 13, 14)]


@pytest.mark.parametrize("case", [*(CASES[i] for i in (*DIFFERENT, 12)), *ON_DEMAND], ids=case_id)
def test_without_segments_equals_one_segment(case, x64):
    inputs = draw_inputs(case, 5, jnp.float64)
    one = np.ones((2, case.time), np.int32)
    run = jax.jit(lambda inputs: [call(case, inputs, "chunked", segment_ids) for segment_ids in (None, one)])
    chex.assert_trees_all_close(*run(inputs), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [pytest.param(jnp.float32, marks=pytest.mark.long), jnp.bfloat16])
@pytest.mark.parametrize("case", [*(CASES[i] for i in DIFFERENT), *ON_DEMAND], ids=case_id)
def test_narrow_dtypes_stay_within_their_rounding(case, dtype):
    """chunked in float32 and bfloat16 against the float64 recurrence on the same (rounded) inputs.

    `round` is left to its own test: a score at a step's edge may fall on either side of it.
    """
    narrow = draw_inputs(case, 7, dtype)
    ones = np.ones((2, case.time), np.int32)
    cotangent = jnp.asarray(np.random.default_rng(1).standard_normal((2, case.time, case.heads, case.value_dim)), dtype)
    actual = compiled(case, "chunked")(narrow, ones, cotangent)
    assert all(x.dtype == dtype for x in jax.tree.leaves(actual))
    with jax.enable_x64(True):
        wide, wide_cotangent = jax.tree.map(lambda x: x.astype(jnp.float64), (narrow, cotangent))
        expected = compiled(case, "recurrent")(wide, ones, wide_cotangent)
    # Operands are rounded tile by tile and sums are float32, so no factor T: a few roundings of each operand of the
    # four products a gradient passes through, magnified by ‖M⁻¹‖ once forward and once backward.
    bound = 8 * float(jnp.finfo(dtype).eps) * inverse_norm(case, wide) ** 2
    for name, a, b in zip(["out", *sorted(narrow)], jax.tree.leaves(expected), jax.tree.leaves(actual)):
        error = np.abs(np.asarray(a) - np.asarray(b, np.float64)).max() / max(np.abs(a).max(), 1)
        assert error <= bound, f"{name}: {error:.1e} > {bound:.1e}"


def literal_softmax(scores, visible):
    weights = np.where(visible, np.exp(np.where(visible, scores, 0)), 0)
    total = weights.sum(-1, keepdims=True)
    return weights / np.where(total > 0, total, 1)


@pytest.mark.parametrize("implementation", ["recurrent", "parallel", "chunked"])
def test_matrix_identity(implementation, x64):
    """O = P₂ (I + diag(β) A)⁻¹ diag(α) V, every matrix written out in NumPy."""
    case = Case(time=33, chunk=8, alpha=True, write_query="heads")
    inputs = draw_inputs(case, 3, jnp.float64)
    out = call(case, inputs, implementation)
    q, k, v, w, alpha, beta = (np.asarray(inputs[n]) for n in ("query", "key", "value", "write_query", "alpha", "beta"))
    strict, causal = np.tri(33, k=-1) > 0, np.tri(33) > 0
    for b in range(2):
        for h in range(2):
            a = literal_softmax(w[b, :, h] @ k[b, :, h].T / 2, strict)
            p = literal_softmax(q[b, :, h] @ k[b, :, h].T / 2, causal)
            u = np.linalg.inv(np.eye(33) + np.diag(beta[b, :, h]) @ a) @ np.diag(alpha[b, :, h]) @ v[b, :, h]
            np.testing.assert_allclose(out[b, :, h], p @ u, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("implementation", ["recurrent", "parallel", "chunked"])
def test_linear_similarities_are_delta_net(implementation, x64):
    """κ₁ = κ₂ = linear, w = k, α = β, write scale 1: S ← S + β (v − Sᵀk) kᵀ step by step in NumPy."""
    rng = np.random.default_rng(0)
    b, t, h, width, value_width = 2, 40, 2, 6, 5
    q, k, v = (rng.standard_normal((b, t, h, n)) for n in (width, width, value_width))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    beta = 1 / (1 + np.exp(-rng.standard_normal((b, t, h))))
    expected = np.zeros_like(v)
    for i, j in np.ndindex(b, h):
        state = np.zeros((width, value_width))
        for n in range(t):
            state += beta[i, n, j] * np.outer(k[i, n, j], v[i, n, j] - k[i, n, j] @ state)
            expected[i, n, j] = 0.7 * q[i, n, j] @ state
    out = delta_attention(
        *map(jnp.asarray, (q, k, v)),
        alpha=jnp.asarray(beta),
        beta=jnp.asarray(beta),
        write_similarity="linear",
        read_similarity="linear",
        write_scale=1.0,
        read_scale=0.7,
        chunk_size=16,
        implementation=implementation,
    )
    np.testing.assert_allclose(out, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("write_query", ["key", "query"])
@pytest.mark.parametrize("implementation", ["recurrent", "parallel", "chunked"])
def test_beta_zero_is_softmax_attention(implementation, write_query, x64):
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((2, 30, h, 8))) for h in (4, 2, 2))
    beta = jnp.zeros((2, 30, 2 if write_query == "key" else 4))
    out = delta_attention(q, k, v, beta=beta, write_query=write_query, chunk_size=8, implementation=implementation)
    for b, h in np.ndindex(2, 4):
        p = literal_softmax(np.asarray(q[b, :, h] @ k[b, :, h // 2].T) / np.sqrt(8), np.tri(30) > 0)
        np.testing.assert_allclose(out[b, :, h], p @ v[b, :, h // 2], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("time", [600, 1000])
def test_semantics_of_the_authors_code(time, x64):
    """w = q, softmax twice, raw β, at lengths past 512 that 512 does not divide: values and gradients against NumPy.

    These are the settings of the flash-linear-attention port. A raw projection gives β of either sign and above 1.
    """
    rng = np.random.default_rng(time)
    q, k, v = (rng.standard_normal((1, time, 1, 8)) for _ in range(3))
    beta = 0.5 * rng.standard_normal((1, time, 1))
    cotangent = rng.standard_normal((1, time, 1, 8))
    arguments = tuple(map(jnp.asarray, (q, k, v, beta)))
    run = jax.jit(
        lambda q, k, v, beta, d: (lambda out, pull: (out, pull(d)))(
            *jax.vjp(lambda q, k, v, beta: delta_attention(q, k, v, beta=beta, write_query="query"), q, k, v, beta)
        )
    )
    out, gradients = run(*arguments, jnp.asarray(cotangent))

    q, k, v, beta, dout = q[0, :, 0], k[0, :, 0], v[0, :, 0], beta[0, :, 0], cotangent[0, :, 0]
    scale = 8**-0.5
    a, p = (literal_softmax(q @ k.T * scale, np.tri(time, k=d) > 0) for d in (-1, 0))
    inverse = np.linalg.inv(np.eye(time) + beta[:, None] * a)
    u = inverse @ v
    np.testing.assert_allclose(out[0, :, 0], p @ u, rtol=1e-10, atol=1e-11)
    g = inverse.T @ (p.T @ dout)
    dp, da = dout @ u.T, -beta[:, None] * (g @ u.T)
    dscores = p * (dp - (p * dp).sum(1, keepdims=True)) + a * (da - (a * da).sum(1, keepdims=True))
    expected = (dscores @ k * scale, dscores.T @ q * scale, g, -(g * (a @ u)).sum(1))
    for name, actual, wanted in zip(("query", "key", "value", "beta"), gradients, expected):
        np.testing.assert_allclose(actual[0, :, 0], wanted, rtol=1e-9, atol=1e-10, err_msg=name)


@pytest.mark.parametrize("implementation", ["recurrent", "parallel", "chunked"])
@pytest.mark.parametrize("case", [CASES[1], CASES[7], CASES[8]], ids=case_id)
def test_delta_values_is_the_write_alone(case, implementation, x64):
    """Reading with β = 0 and a one-hot match is u itself; here: delta_values against u kept in the cache."""
    inputs = draw_inputs(case, 2, jnp.float64)
    _, cache = call(case, inputs, implementation, return_cache=True)
    del inputs["query"]
    inputs.setdefault("write_query", "key")
    u = delta_values(
        **inputs, write_similarity=case.write, write_scale=case.write_scale, implementation=implementation, chunk_size=8
    )
    np.testing.assert_allclose(u, cache.value, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("implementation", ["parallel", "chunked"])
def test_delta_values_gradients(implementation, x64):
    case = Case(heads=4, kv_heads=2, write_query="heads", alpha=True, value_dim=3)
    inputs = draw_inputs(case, 2, jnp.float64)
    del inputs["query"]
    segment_ids = np.asarray([[1] * 12 + [2] * 9, [0] * 3 + [4] * 10 + [0] * 8])

    def gradients(implementation):
        run = lambda inputs: delta_values(
            **inputs, segment_ids=segment_ids, chunk_size=8, implementation=implementation
        )
        out, pullback = jax.vjp(run, poison(inputs, segment_ids))
        return out, pullback(jnp.cos(jnp.arange(out.size, dtype=jnp.float64)).reshape(out.shape))

    chex.assert_trees_all_close(gradients(implementation), gradients("recurrent"), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("implementation", ["recurrent", "parallel", "chunked"])
def test_packed_documents_equal_separate_ones(implementation, x64):
    case = Case(heads=4, kv_heads=2, time=24, chunk=5)
    inputs = draw_inputs(case, 4, jnp.float64, batch=1)
    packed = call(case, inputs, implementation, np.asarray([[7] * 10 + [0] * 2 + [3] * 9 + [0] * 3]))
    for rows in (slice(0, 10), slice(12, 21)):
        alone = call(case, jax.tree.map(lambda x, rows=rows: x[:, rows], inputs), implementation)
        np.testing.assert_allclose(packed[:, rows], alone, rtol=1e-12, atol=1e-13)


def test_one_compilation_serves_all_document_lengths():
    case = Case(time=16)
    inputs = draw_inputs(case, 0, jnp.float32)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def run(inputs, segment_ids):
        return call(case, inputs, None, segment_ids)

    for length in (1, 5, 16):
        run(inputs, jnp.asarray([[1] * length + [0] * (16 - length)] * 2))


def test_tied_pass_survives_a_dominant_diagonal(x64):
    """s_ii a thousand above every other score: s must not be lost to a shared maximum, nor β's gradient."""
    rng = np.random.default_rng(0)
    q = np.eye(12)[None, :, None, :] * 60.0
    k = q + 0.1 * rng.standard_normal(q.shape)
    v = rng.standard_normal((1, 12, 1, 3))
    beta = jnp.asarray(rng.uniform(size=(1, 12, 1)))

    def one_pass(form, q, k, v, beta):
        return delta_attention(q, k, v, beta=beta, write_query="query", chunk_size=4, implementation=form)

    results = [
        jax.vjp(
            functools.partial(one_pass, form),
            *map(jnp.asarray, (q, k, v)),
            beta,
        )
        for form in ("recurrent", "chunked")
    ]
    (expected, pull), (actual, pull_chunked) = results
    np.testing.assert_allclose(actual, expected, rtol=1e-10)
    chex.assert_trees_all_close(pull_chunked(actual), pull(actual), rtol=1e-9, atol=1e-11)


def test_residuals_are_inputs_outputs_and_rows():
    """Between forward and backward `chunked` keeps q, k, w, v, u, o, α, β and numbers per row, nothing larger."""
    b, t, h, g, k, v, chunk = 1, 96, 4, 2, 8, 6, 32
    for write_query in ("key", "query", "heads"):
        case = Case(
            heads=h, kv_heads=g, key_dim=k, value_dim=v, time=t, chunk=chunk, write_query=write_query, alpha=True
        )
        inputs = draw_inputs(case, 0, jnp.float32, batch=b)
        _, pullback = jax.vjp(lambda inputs, case=case: call(case, inputs, "chunked"), inputs)
        wide = sorted(tuple(x.shape) for x in jax.tree.leaves(pullback) if x.ndim == 4)
        rows = [x for x in jax.tree.leaves(pullback) if x.ndim != 4]
        u_heads = case.write_heads
        allowed = [(b, t, h, k), (b, t, g, k), (b, t, g, v), (b, t, u_heads, v), (b, t, h, v)]
        if write_query == "heads":
            allowed.append((b, t, h, k))
        assert wide == sorted(allowed), write_query
        # α, β and at most three numbers a row and head.
        assert all(x.size <= b * t * h for x in rows) and len(rows) <= 5, [x.shape for x in rows]


@pytest.mark.parametrize("write_query", ["key", "query"])
def test_chunked_memory_is_linear_in_time(write_query):
    """The compiled forward and backward of [1, T, 4, 64] float32: at T = 8192 at most 160 MB of temporaries, where one
    T×T matrix a head would be 1 GB, and at 16384 at most 2.1 times that."""

    def temporaries(time):
        x, gate = (jax.ShapeDtypeStruct((1, time, 4, *rest), jnp.float32) for rest in ((64,), ()))
        run = lambda q, k, v, b: delta_attention(q, k, v, beta=b, write_query=write_query).sum()
        program = jax.jit(jax.grad(run, argnums=(0, 1, 2, 3))).lower(x, x, x, gate).compile()
        return program.memory_analysis().temp_size_in_bytes

    short = temporaries(8192)
    assert short <= 160e6
    assert temporaries(16384) <= 2.1 * short


def test_second_derivatives(x64):
    """They work by definition and in the parallel form, agree, and are refused by the hand-written backward."""
    case = Case(time=6, chunk=3)
    inputs = draw_inputs(case, 0, jnp.float64, batch=1)

    def curvature(implementation):
        loss = lambda v: (call(case, {**inputs, "value": v}, implementation) ** 2).sum()
        slope = lambda k: (
            jax.grad(lambda k: (call(case, {**inputs, "key": k}, implementation) ** 2).sum())(k) ** 2
        ).sum()
        both = lambda k, v: (jax.grad(slope)(k), jax.grad(lambda v: (jax.grad(loss)(v) ** 2).sum())(v))
        return jax.jit(both)(inputs["key"], inputs["value"])

    chex.assert_trees_all_close(curvature("parallel"), curvature("recurrent"), rtol=1e-9, atol=1e-10)
    with pytest.raises(NotImplementedError, match="second derivative"):
        curvature("chunked")


@pytest.mark.parametrize("write_query", ["key", "query"])
def test_two_inverse_blocks_under_a_batch_compile(write_query):
    """16 rows of 128 tokens: inverting a chunk's two blocks as one batch of products aborted XLA's CPU compiler."""
    q, k = jax.ShapeDtypeStruct((16, 128, 4, 32), jnp.float32), jax.ShapeDtypeStruct((16, 128, 2, 32), jnp.float32)
    run = lambda q, k, v: delta_attention(q, k, v, write_query=write_query).sum()
    jax.jit(jax.grad(run, argnums=(0, 1, 2))).lower(q, k, k).compile()


def test_parallel_leaves_lapack_alone():
    """Two of jaxlib's batched triangular solves at once wait for each other on two threads: there must be none."""
    x = jax.random.normal(jax.random.key(0), (1, 70, 2, 4))

    def loss(x):
        return delta_attention(x, x, x, implementation="parallel").sum()

    program = jax.jit(jax.value_and_grad(loss)).lower(x).compile().as_text()
    assert 'custom_call_target="lapack' not in program and "triangular-solve(" not in program
