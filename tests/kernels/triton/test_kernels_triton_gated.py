"""The gated ops' Triton kernels, run by Triton's interpreter on the CPU, against the recurrence in float64: values and
all gradients. What a kernel should fill starts as NaN; products round as tensor cores do."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.gated_cases import Case, call, case_id, draw_cotangents, draw_inputs

pytest.importorskip("triton", reason="Triton is in the dependency group `kernels`, on Linux")

from support.triton_worker import Worker

pytestmark = pytest.mark.long

# The definition runs once: what XLA would spend on making it fast is more than it takes.
QUICKLY = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}

_case = lambda **more: Case(**{"time": 36, "key_dim": 20, "value_dim": 24} | more)
_channel = lambda **more: _case(**{"decay": "channel", "heads": 1, "value_heads": 2} | more)

# (case, segments, strength of the decays). The rare ones join what others have one by one: for changes of the kernels.
CASES = [
    pytest.param(_case(), False, 1.0, marks=pytest.mark.rare),
    (_case(value_heads=4, scale=0.3, state=False), True, 1.0),
    pytest.param(_case(decay="none"), False, 1.0, marks=pytest.mark.rare),
    (_case(decay="none", beta="to_two", time=31), True, 1.0),
    (_case(beta="none", heads=1, value_heads=1, time=16), False, 1000.0),
    (_case(beta="zero", heads=1, value_heads=1, time=33), True, 1000.0),
    (_case(delta=False), True, 1.0),
    pytest.param(
        _case(delta=False, value_heads=4, scale=1.0, key_dim=16, value_dim=16), False, 1000.0, marks=pytest.mark.rare
    ),
    (_case(delta=False, decay="none", heads=1, value_heads=2, state=False), False, 1.0),
    pytest.param(_case(delta=False, decay="none", heads=1, time=20), True, 1.0, marks=pytest.mark.rare),
    (_case(time=1), False, 1.0),
    (_channel(), True, 1.0),
    (_channel(beta="none", value_heads=1, time=33, state=False), False, 1000.0),
    pytest.param(
        _channel(beta="to_two", value_heads=1, key_dim=16, value_dim=32, time=16), False, 1.0, marks=pytest.mark.rare
    ),
    (_channel(delta=False, scale=0.3, time=31), False, 1.0),
    (_channel(delta=False, value_heads=1), True, 1000.0),
    pytest.param(_channel(time=1), False, 1.0, marks=pytest.mark.rare),
]
TWO_BYTE = [
    (_case(value_heads=4), True, 1.0),
    (_case(delta=False), False, 1.0),
    (_case(decay="none"), False, 1.0),
    (_channel(value_heads=1), True, 1.0),
    (_channel(delta=False, value_heads=1), True, 1000.0),
]

SEGMENTS = [[1] * 9 + [0] * 5 + [2] * 14 + [5] * 1 + [3] * 7, [0] * 7 + [4] * 29]
NAMES = ("query", "key", "value", "beta", "log_decay", "initial_state")


@pytest.fixture(scope="module")
def interpreter():
    worker = Worker()
    yield worker
    worker.close()


def check(interpreter, case, segmented, strength, dtype, unit, chunk=16, gates=None, plan=None):
    """`gates`: the decays, in place of drawn ones. `plan`: of Settings."""
    ids = np.asarray(SEGMENTS, np.int32)[:, : case.time] if segmented else None
    with jax.enable_x64(True):
        inputs = draw_inputs(case, 0, jnp.float64, strength=strength)
        inputs |= {} if gates is None else {"log_decay": jnp.asarray(gates)}
        inputs = {name: x.astype(dtype).astype(jnp.float64) for name, x in inputs.items()}
        cotangents = [x.astype(dtype).astype(jnp.float64) for x in draw_cotangents(case, jnp.float64)]

        @functools.partial(jax.jit, compiler_options=QUICKLY)
        def definition(inputs, cotangents):
            out, pull = jax.vjp(lambda x: call(case, x, "recurrent", ids), inputs)
            return out, pull(tuple(cotangents))[0]

        expected, gradients = definition(inputs, cotangents)
    real = np.ones((2, case.time), bool) if ids is None else ids != 0
    resets = None
    if segmented:
        before = np.concatenate([np.zeros_like(ids[:, :1]), ids[:, :-1]], 1)
        starts = real & (ids != before)
        resets = starts & (np.cumsum(starts, 1) > 1)

    def given(name):
        if name not in inputs:
            return None
        x = np.asarray(inputs[name])
        if name == "initial_state":
            return x.astype(np.float32)
        return np.where(real.reshape(*real.shape, *[1] * (x.ndim - 2)), x, 0).astype(dtype)

    arrays = [given(name) for name in NAMES]
    if arrays[-1] is None:
        arrays[-1] = np.zeros(expected[1].shape, np.float32)
    dout = np.where(real[..., None, None], np.asarray(cotangents[0]), 0).astype(dtype)
    scale = case.key_dim**-0.5 if case.scale is None else case.scale
    settings = (scale, case.delta, 90, chunk, (16, 4, 1), plan)
    out, final, found = interpreter(
        "gated_forward_and_backward", settings, [*arrays, resets], dout, np.asarray(cotangents[1], np.float32)
    )
    assert out.dtype == np.dtype(dtype) and final.dtype == np.float32
    # Errors add up over the tokens of a chunk and its neighbours; keys of unit length make no system grow.
    _close(out, expected[0], 4 * unit, "out")
    _close(final, expected[1], 4 * unit, "final state")
    for name, gradient in zip(NAMES, found):
        if name in gradients:
            if name != "initial_state":
                # What comes back to padding ends with the op, which had put zeros there.
                gradient = np.where(real.reshape(*real.shape, *[1] * (gradient.ndim - 2)), gradient, 0)
            _close(gradient, gradients[name], 8 * unit, name)


def _close(found, expected, bound, name):
    expected = np.asarray(expected)
    error = np.max(np.abs(np.asarray(found, np.float64) - expected))
    assert error <= bound * max(np.max(np.abs(expected)), 1.0), (name, error, np.max(np.abs(expected)))


_id = lambda x: case_id(x) if isinstance(x, Case) else None


@pytest.mark.parametrize("case, segmented, strength", CASES, ids=_id)
def test_float32(interpreter, case, segmented, strength):
    # Three TF32 products for one: 2^-21 at worst.
    check(interpreter, case, segmented, strength, jnp.float32, 2.0**-21)


@pytest.mark.parametrize("case, segmented, strength", TWO_BYTE, ids=_id)
def test_bfloat16(interpreter, case, segmented, strength):
    check(interpreter, case, segmented, strength, jnp.bfloat16, 2.0**-8)


def test_float16(interpreter):
    check(interpreter, _channel(value_heads=1, time=20), False, 1.0, jnp.float16, 2.0**-11)


@pytest.mark.parametrize("delta", [True, False])
def test_strong_gates_between_weak_ones(interpreter, delta):
    # In a chunk of the size of the table's. A difference of sums of all gates would be off by 2^-24 of 1000s.
    case = _channel(delta=delta, value_heads=1, key_dim=16, value_dim=16, time=80)
    gates = np.full((2, case.time, 1, case.key_dim), -1.0 / 700)
    gates[:, ::7, :, ::2] = gates[:, 3::29] = -1000.0
    check(interpreter, case, False, 1.0, jnp.float32, 2.0**-21, 64, gates)


# The walk (gated/walk/). All gates, grouped values and V ≠ K in one; each of the others leaves something out.
WALKS = [
    (_case(heads=1, value_heads=2, time=33), True, 1.0),
    (_case(decay="none", beta="none", heads=1, value_heads=1, state=False), False, 1.0),
    pytest.param(
        _case(heads=1, value_heads=1, key_dim=16, value_dim=16, time=32), False, 1000.0, marks=pytest.mark.rare
    ),
    (_case(delta=False, heads=1, value_heads=1, time=31), True, 1.0),
    (_channel(time=33), True, 1.0),
    (_channel(delta=False, value_heads=1, time=31), False, 1.0),
]


@pytest.mark.parametrize("case, segmented, strength", WALKS, ids=_id)
def test_walk(interpreter, case, segmented, strength):
    check(interpreter, case, segmented, strength, jnp.float32, 2.0**-21, plan="walk")


def test_walk_in_bfloat16(interpreter):
    check(interpreter, *WALKS[0], jnp.bfloat16, 2.0**-8, plan="walk")


def test_walk_with_strong_gates_between_weak_ones(interpreter):
    # As above, for differences of sums of two parts. Their rounding, 2^-47 of 2 · 1000 at worst, is far below the unit.
    case = _case(heads=1, value_heads=1, key_dim=16, value_dim=16, time=80)
    gates = np.full((2, case.time, 1), -1.0 / 700)
    gates[:, 3::29] = -1000.0
    check(interpreter, case, False, 1.0, jnp.float32, 2.0**-21, 64, gates, plan="walk")


def test_sums_of_gates_have_twice_the_digits():
    from pallas_kernels.triton.gated.walk.launches import sums_of_gates

    gates = -np.exp(np.random.default_rng(0).normal(size=(1, 2, 128)) * 4).astype(np.float32)
    gates[0, 0, 5] = -np.inf
    parts = np.asarray(jax.jit(sums_of_gates, static_argnums=1)(gates, 64), np.float64)
    exact = np.cumsum(np.maximum(gates.astype(np.float64), -1e4).reshape(1, 2, 2, 64), axis=3)
    # Six levels of sums of two parts, 2^-46 at worst each; float64's own sums are closer.
    assert np.max(np.abs(parts.sum(axis=3) - exact) / -exact) < 6 * 2.0**-46
