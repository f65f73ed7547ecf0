"""The Triton kernels' arithmetic, run by Triton's interpreter on the CPU, against the recurrence in float64: values and
all gradients. What a kernel should fill starts as NaN; products round as tensor cores do."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.ops_cases import Case, call, case_id, draw_inputs, inverse_norm

pytest.importorskip("triton", reason="Triton is in the dependency group `kernels`, on Linux")

from support.triton_worker import Worker

pytestmark = pytest.mark.long

# The definition runs once: what XLA would spend on making it fast is more than it takes.
QUICKLY = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}

# Small tiles, so that few tokens make several blocks, halves of blocks, and heads that wait for each other.
HALVED = (
    ("write_forward", (32, 16, 4, 1, 2, 3)),
    ("read_forward", (32, 16, 4, 1)),
    ("read_backward", (16, 32, 4, 1)),
    ("write_backward", (16, 32, 4, 1, 2, 3)),
)
WHOLE = (
    ("write_forward", (16, 16, 4, 1, 1, 16)),
    ("read_forward", (16, 16, 4, 1)),
    ("read_backward", (16, 16, 4, 1)),
    ("write_backward", (16, 16, 4, 1, 1, 16)),
)

_case = lambda *similarities, **more: Case(*similarities, **{"time": 40, "key_dim": 24, "value_dim": 16} | more)

# (case, tiles, segments). The rare ones join what others have one by one: for changes of the kernels.
CASES = [
    pytest.param(_case(alpha=True), HALVED, False, marks=pytest.mark.rare),
    (_case(heads=4, kv_heads=2, alpha=True), HALVED, True),
    (_case(heads=4, kv_heads=2, write_query="heads"), WHOLE, True),
    (_case(heads=4, kv_heads=2, write_query="kv_heads", beta="none", time=64, key_dim=16), HALVED, False),
    (_case(write_query="query", alpha=True), HALVED, False),
    pytest.param(_case(write_query="query", heads=4, kv_heads=2, beta="none"), HALVED, True, marks=pytest.mark.rare),
    (_case(write_query="query", heads=4, kv_heads=1, beta="zero", time=31), WHOLE, True),
    pytest.param(_case(write_query="query", write_scale=0.3, read_scale=0.7), HALVED, False, marks=pytest.mark.rare),
    (_case("linear", "linear", write_scale=0.05, alpha=True), HALVED, True),
    pytest.param(
        _case("linear", write_query="heads", heads=4, kv_heads=2, write_scale=0.05, time=37),
        HALVED,
        False,
        marks=pytest.mark.rare,
    ),
    (_case("relu", "exp", write_scale=0.05, beta="one"), HALVED, True),
    pytest.param(_case("exp", "relu", write_scale=0.05, heads=4), HALVED, False, marks=pytest.mark.rare),
    (_case("round", "round", write_scale=0.0625, read_scale=0.0625, alpha=True), HALVED, True),
    pytest.param(_case("softmax", "linear", beta="zero", write_query="query"), WHOLE, False, marks=pytest.mark.rare),
    (_case(time=1), WHOLE, False),
]
TWO_BYTE = [
    (_case(heads=4, kv_heads=2, alpha=True), HALVED, True),
    (_case(write_query="query"), HALVED, True),
    (_case("softmax", "linear"), WHOLE, False),
]
# A write without a normaliser, whose u is kept in two parts: scores so large that roundings grow, widths of several
# steps of the solve.
PAIRS = [
    pytest.param(_case("linear", write_scale=0.2, alpha=True), HALVED, False, marks=pytest.mark.rare),
    (_case("linear", "linear", write_scale=0.2, value_dim=72, time=37), HALVED, True),
    (_case("relu", write_query="heads", heads=4, kv_heads=2, write_scale=0.3), WHOLE, True),
    pytest.param(_case("exp", write_scale=0.05, value_dim=40, beta="one"), HALVED, False, marks=pytest.mark.rare),
    pytest.param(_case("linear", "relu", write_scale=0.1, beta="none", time=33), HALVED, False, marks=pytest.mark.rare),
]


@pytest.fixture(scope="module")
def interpreter():
    worker = Worker()
    yield worker
    worker.close()


def _kappa(similarity, scale, width):
    return similarity, width**-0.5 if scale is None else scale


def _segments(case, seed=0):
    """Some documents a row, of lengths that fit no tile."""
    rng = np.random.default_rng(seed)
    return np.sort(rng.integers(1, 4, (2, case.time)), axis=1).astype(np.int32)


def _inputs(case, dtype):
    inputs = draw_inputs(case, 0, jnp.float64)
    if case.write == "round":
        # Scores that are exact in float32, halves between two roundings among them: no rounding may fall otherwise.
        inputs = {
            name: jnp.round(x * 8) / 8 if name in ("query", "key", "write_query") else x for name, x in inputs.items()
        }
    return {name: x.astype(dtype).astype(jnp.float64) for name, x in inputs.items()}


def check(interpreter, case, tiles, segmented, dtype, unit, inner=None):
    """`unit`: the rounding of arrays and results; `inner`: of what is between, `unit` unless given, which grows."""
    inner = unit if inner is None else inner
    segments = _segments(case) if segmented else None
    with jax.enable_x64(True):
        inputs = _inputs(case, dtype)
        tied = case.tied and case.write_scale == case.read_scale
        rng = np.random.default_rng(1)
        shape = (2, case.time, case.heads, case.value_dim)
        dout = jnp.asarray(rng.standard_normal(shape)).astype(dtype).astype(jnp.float64)

        @functools.partial(jax.jit, compiler_options=QUICKLY)
        def definition(inputs, dout):
            out, pull = jax.vjp(lambda x: call(case, x, "recurrent", segments), inputs)
            return out, pull(dout)[0]

        expected, gradients = definition(inputs, dout)
        # How much a rounding error grows: forward through (I + βA)⁻¹, backward through its transpose.
        growth = max(inverse_norm(case, inputs, segments), 1.0)
    cast = lambda x: None if x is None else np.asarray(x.astype(dtype))
    write_query = inputs.get("write_query", inputs["query"] if case.write_query == "query" and not tied else None)
    write = _kappa(case.write, case.write_scale, case.key_dim)
    read = None if tied else _kappa(case.read, case.read_scale, case.key_dim)
    arrays = [inputs["query"], write_query, inputs["key"], inputs["value"], inputs.get("alpha"), inputs.get("beta")]
    du = np.zeros((2, case.time, case.write_heads, case.value_dim), np.dtype(dtype))
    out, u, found = interpreter(
        "forward_and_backward", (write, read, tied), tiles, [*map(cast, arrays), segments], cast(dout), du
    )
    names = ("query", "write_query", "key", "value", "alpha", "beta")
    found = dict(zip(names, (None if x is None else np.asarray(x, np.float64) for x in found)))
    if write_query is inputs["query"]:
        # The op's caller adds the two uses of one array.
        found["query"] = found["query"] + found.pop("write_query")
    # Values take a rounding of the weights, of u and of the result, each magnified; gradients those of G and dS too,
    # and a score's derivative sums over the width.
    bound = max(unit, inner * growth)
    _close(out, expected, 3 * bound, "out")
    for name, expected_gradient in gradients.items():
        _close(found[name], expected_gradient, 8 * bound, name)
    assert u.dtype == out.dtype == np.dtype(dtype)


def _close(found, expected, bound, name):
    expected = np.asarray(expected)
    error = np.max(np.abs(np.asarray(found, np.float64) - expected))
    assert error <= bound * max(np.max(np.abs(expected)), 1.0), (name, error)


_id = lambda x: case_id(x) if isinstance(x, Case) else None


@pytest.mark.parametrize("case, tiles, segmented", CASES, ids=_id)
def test_float32(interpreter, case, tiles, segmented):
    # A sum of T terms of float32, whose products are made of three TF32 products each: 2^-24 at best, 2^-21 at worst.
    check(interpreter, case, tiles, segmented, jnp.float32, 2.0**-21)


@pytest.mark.parametrize("case, tiles, segmented", TWO_BYTE, ids=_id)
def test_bfloat16(interpreter, case, tiles, segmented):
    check(interpreter, case, tiles, segmented, jnp.bfloat16, 2.0**-8)


@pytest.mark.parametrize("case, tiles, segmented", PAIRS, ids=_id)
def test_pairs(interpreter, case, tiles, segmented):
    # Parts of 2^-17, products of parts of 2^-16 and sums of such: what grows is that, not the arrays' rounding.
    check(interpreter, case, tiles, segmented, jnp.bfloat16, 2.0**-8, 2.0**-15)


def test_float16(interpreter):
    check(interpreter, _case(write_query="heads"), HALVED, False, jnp.float16, 2.0**-11)
