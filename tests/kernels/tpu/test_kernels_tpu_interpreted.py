"""The Pallas kernels for TPU, interpreted on the CPU through the op: values and all gradients against the recurrence in
float64, NaN in the padding."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu
from support.ops_cases import CASES, Case, call, case_id, draw_inputs

from deltaformer_jax.ops.common import dispatch
from pallas_kernels.tpu.delta import api as delta

pytestmark = pytest.mark.long

CHUNK = 128  # the smallest tile

# Two chunks, the second one short; documents that begin, end and lie inside chunks; padding on all sides.
TIME = 150
SEGMENTS = np.asarray([[1] * 60 + [2] * 90, [0] * 7 + [3] * 10 + [0] * 3 + [4] * 120 + [0] * 10], np.int32)


@pytest.fixture
def interpreted(monkeypatch):
    """The op with `implementation="pallas_tpu"` on this machine; settings are those given, in tests' tiles."""

    def switch(**settings):
        monkeypatch.setattr(dispatch, "only_on", lambda platform, message, function, *arrays: function(*arrays))
        settings = {"chunk": CHUNK, "interpret": True} | settings
        monkeypatch.setattr(delta, "Settings", functools.partial(delta.Settings, **settings))

    return switch


def values_and_gradients(case, inputs, implementation, segment_ids, weights):
    """The output, and the gradients of all inputs for a random cotangent."""

    def total(inputs):
        out = call(case, inputs, implementation, segment_ids)
        return jnp.sum(out.astype(weights.dtype) * weights), out

    (_, out), gradients = jax.jit(jax.value_and_grad(total, has_aux=True))(inputs)
    return {"out": out} | gradients


def compare(case, dtype, segment_ids, digits):
    """Errors are measured by each array's largest number, in units of `digits`' last place times the T terms that a row
    sums up: a score's, a weight's and a product's rounding, forward and back."""
    inputs = draw_inputs(case, 0, dtype)
    # In eighths scores are exact, and rounding them (the similarity "round") is not a matter of their last digit.
    for name in {"query", "key", "write_query"} & set(inputs):
        inputs[name] = jnp.round(inputs[name] * 8) / 8
    real = np.ones(inputs["key"].shape[:2], bool) if segment_ids is None else segment_ids != 0
    weights = np.random.default_rng(1).standard_normal((*real.shape, case.heads, case.value_dim))
    poisoned = {
        name: jnp.where(real.reshape(*real.shape, *[1] * (x.ndim - 2)), x, jnp.nan) for name, x in inputs.items()
    }
    found = values_and_gradients(case, poisoned, "pallas_tpu", segment_ids, jnp.asarray(weights, jnp.float32))
    with jax.enable_x64(True):
        wide = {name: jnp.asarray(np.asarray(x, np.float64)) for name, x in inputs.items()}
        expected = values_and_gradients(case, wide, "recurrent", segment_ids, jnp.asarray(weights))
        expected = {name: np.asarray(x) for name, x in expected.items()}
    for name, x in found.items():
        assert x.dtype == dtype
        error = np.abs(np.asarray(x, np.float64) - expected[name])
        assert np.max(error) <= digits * np.max(np.abs(expected[name])), name


def at_length(case, time=TIME):
    return dataclasses.replace(case, time=time)


# Every similarity and every write query, grouped heads, V != K, gates or none.
SOME = [CASES[i] for i in (1, 3, 5, 6, 9, 10, 11, 12)]


@pytest.mark.parametrize("case", SOME, ids=case_id)
def test_float32(case, interpreted):
    interpreted()
    compare(at_length(case), jnp.float32, SEGMENTS, digits=TIME * 2.0**-24)


@pytest.mark.parametrize("case", [CASES[4]], ids=case_id)
def test_one_document_a_row(case, interpreted):
    interpreted()
    compare(at_length(case, 2 * CHUNK), jnp.float32, None, digits=2 * CHUNK * 2.0**-24)


@pytest.mark.parametrize("case", [CASES[4], Case(write_query="query")], ids=case_id)
def test_chunks_of_several_tiles(case, interpreted):
    interpreted(chunk=2 * CHUNK)
    compare(at_length(case, 3 * CHUNK), jnp.float32, None, digits=3 * CHUNK * 2.0**-24)


@pytest.mark.parametrize("case", [CASES[1], CASES[2]], ids=case_id)
def test_bfloat16(case, interpreted):
    """A rounding of an operand does not add up over T, as those of a sum do: they have no common sign."""
    interpreted()
    compare(at_length(case), jnp.bfloat16, SEGMENTS, digits=4 * 2.0**-8)


@pytest.mark.parametrize("streamed", [False, True], ids=["resident", "streamed"])
@pytest.mark.parametrize("case", [Case(heads=4, value_dim=3, alpha=True), Case(write_query="query")], ids=case_id)
def test_no_races_and_nothing_read_that_was_not_written(case, streamed, interpreted):
    """Four chunks, in an interpreter of memories, copies and semaphores, whose fresh memory holds NaN."""
    interpreted(streamed=streamed, interpret=pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan"))
    segment_ids = np.concatenate([SEGMENTS, SEGMENTS + 10 * (SEGMENTS > 0), np.full((2, 150), 40, np.int32)], axis=1)
    compare(at_length(case, 450), jnp.float32, segment_ids, digits=450 * 2.0**-24)
    assert not interpret_pallas_call.races.races_found
