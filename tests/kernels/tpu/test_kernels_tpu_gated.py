"""The gated ops' Pallas kernels for TPU, interpreted on the CPU through the op: values and all gradients against the
recurrence in float64, NaN in the padding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu
from support.gated_cases import Case, call, case_id, draw_cotangents, draw_inputs, poison

from deltaformer_jax.ops.common import dispatch
from pallas_kernels.tpu.gated import api as gated

pytestmark = pytest.mark.long

# Three groups, the last one short.
_case = lambda **more: Case(**{"time": 75, "heads": 1, "value_heads": 2, "key_dim": 24, "value_dim": 40} | more)
# Documents that begin, end and lie inside chunks and groups; padding on all sides.
SEGMENTS = np.asarray([[1] * 9 + [0] * 5 + [2] * 25 + [5] * 1 + [3] * 35, [0] * 7 + [4] * 58 + [0] * 10], np.int32)

# (case, segments, strength of the decays, chunks of a group)
CASES = [
    (_case(heads=2, value_heads=4, scale=0.3, time=150), True, 1.0, 2),
    (_case(decay="none", beta="to_two", state=False), True, 1.0, 1),
    (_case(decay="none", beta="none", time=64), False, 1.0, 1),
    (_case(beta="zero", value_heads=1), True, 1000.0, 1),
    (_case(decay="channel"), True, 1.0, 1),
    (_case(decay="channel", beta="none", value_heads=1), False, 1000.0, 1),
    (_case(delta=False), True, 1.0, 1),
    (_case(delta=False, decay="none", time=40), False, 1.0, 2),
    (_case(delta=False, decay="channel", scale=1.0), True, 1000.0, 1),
]
BFLOAT16 = [(_case(), True, 1.0, 1), (_case(delta=False, decay="channel", time=64), False, 1.0, 1)]


@pytest.fixture
def interpreted(monkeypatch):
    """The ops with `implementation="pallas_tpu"` on this machine; settings are those given, with tests' chunks."""

    def switch(**settings):
        monkeypatch.setattr(dispatch, "only_on", lambda platform, message, function, *arrays: function(*arrays))
        settings = {"chunk": 32, "chunks": 1, "interpret": True} | settings
        monkeypatch.setattr(gated, "Settings", functools.partial(gated.Settings, **settings))

    return switch


def results(case, inputs, implementation, segment_ids, cotangents):
    """{output, final state, and the gradient of each input}."""

    def run(inputs):
        (out, final), pull = jax.vjp(lambda x: call(case, x, implementation, segment_ids), inputs)
        return {"out": out, "final state": final} | pull(cotangents)[0]

    return jax.jit(run)(inputs)


def compare(case, segmented, strength, dtype, unit):
    """Errors are measured by each array's largest number (1 if that is less), in units of a rounding: about one for
    each of the products that a number goes through, some of them sums over the tokens of a chunk. Keys of unit length
    make no system grow."""
    segment_ids = np.pad(SEGMENTS, [(0, 0), (0, max(case.time - 75, 0))], "edge")[:, : case.time] if segmented else None
    inputs = draw_inputs(case, 0, dtype, strength=strength)
    cotangents = draw_cotangents(case, dtype)
    given = poison(inputs, segment_ids) if segmented else inputs
    found = results(case, given, "pallas_tpu", segment_ids, cotangents)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float64)), (inputs, cotangents))
        expected = results(case, wide[0], "recurrent", segment_ids, wide[1])
        expected = jax.tree.map(np.asarray, expected)
    assert found.keys() == expected.keys()
    for name, x in found.items():
        assert x.dtype == (jnp.float32 if name in ("final state", "initial_state") else dtype), name
        error = np.max(np.abs(np.asarray(x, np.float64) - expected[name]))
        bound = 16 if name in inputs else 8
        # A decay's gradient sums over a state's K V entries, which cancel: its terms are the measure.
        least = (case.key_dim * case.value_dim) ** 0.5 if name == "log_decay" else 1.0
        assert error <= bound * unit * max(np.max(np.abs(expected[name])), least), (name, error)


_id = lambda x: case_id(x) if isinstance(x, Case) else None


@pytest.mark.parametrize("case, segmented, strength, chunks", CASES, ids=_id)
def test_float32(case, segmented, strength, chunks, interpreted):
    interpreted(chunks=chunks)
    compare(case, segmented, strength, jnp.float32, 2.0**-24)


@pytest.mark.parametrize("case, segmented, strength, chunks", BFLOAT16, ids=_id)
def test_bfloat16(case, segmented, strength, chunks, interpreted):
    interpreted(chunks=chunks)
    compare(case, segmented, strength, jnp.bfloat16, 2.0**-9)


@pytest.mark.parametrize("case", [_case(), _case(delta=False, decay="channel")], ids=case_id)
def test_no_races_and_nothing_read_that_was_not_written(case, interpreted):
    """In an interpreter of memories, copies and semaphores, whose fresh memory holds NaN."""
    interpreted(interpret=pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan"))
    compare(case, True, 1.0, jnp.float32, 2.0**-24)
    assert not interpret_pallas_call.races.races_found


def test_the_kernels_own_chunks(interpreted):
    """One group of what `chunk_rows` and `chunks_of_a_group` choose, and one token."""
    interpreted(chunk=0, chunks=0)
    compare(_case(delta=False, time=70), False, 1.0, jnp.float32, 2.0**-24)
    compare(_case(delta=False, time=1), False, 1.0, jnp.float32, 2.0**-24)


def test_vmap_folds_the_batch(interpreted):
    interpreted()
    case = _case(time=40, delta=False)
    inputs = jax.tree.map(lambda x: jnp.stack([x, x[::-1]]), draw_inputs(case, 0, jnp.float32))

    def gradients(inputs):
        return jax.grad(lambda x: sum(jnp.sum(y**2) for y in call(case, x, "pallas_tpu")))(inputs)

    apart = [gradients(jax.tree.map(lambda x, i=i: x[i], inputs)) for i in range(2)]
    expected = jax.tree.map(lambda *x: np.stack(x), *apart)
    jax.tree.map(np.testing.assert_array_equal, jax.vmap(gradients)(inputs), expected)


DELTA, LINEAR = Case(time=64), Case(time=64, delta=False, decay="channel")


def test_named_it_is_refused_elsewhere_and_what_it_lacks_is_said():
    inputs = draw_inputs(DELTA, 0, jnp.float32)
    with pytest.raises(NotImplementedError, match="implementation='pallas_tpu' runs on tpu only: use None or"):
        call(DELTA, inputs, "pallas_tpu")
    with pytest.raises(NotImplementedError, match="'pallas_tpu': its kernels take one dtype of bfloat16, float32"):
        call(DELTA, draw_inputs(DELTA, 0, jnp.float16), "pallas_tpu")
    wide = Case(time=8, key_dim=264)
    with pytest.raises(NotImplementedError, match=r"'pallas_tpu': .* widths up to 256; .*; use None or"):
        call(wide, draw_inputs(wide, 0, jnp.float32), "pallas_tpu")


@pytest.mark.parametrize("case", [DELTA, LINEAR], ids=["delta", "linear"])
def test_chosen_for_a_tpu_and_nowhere_else(case):
    """Lowered for platforms that are not here: the kernels are in the TPU's program alone."""
    inputs = draw_inputs(case, 0, jnp.float32)

    def kernels(function, platform):
        lowered = jax.jit(function).trace(inputs).lower(lowering_platforms=(platform,))
        return lowered.as_text().count("@tpu_custom_call")

    def loss(inputs):
        out, final = call(case, inputs, None)
        return out.sum() + final.sum()

    assert kernels(loss, "tpu") == 1 and kernels(jax.grad(loss), "tpu") == 2
    assert kernels(jax.grad(loss), "cpu") == 0


def test_no_second_derivative():
    gradient = jax.grad(lambda x: call(DELTA, x, "pallas_tpu")[0].sum())
    twice = jax.grad(lambda x: gradient(x)["query"].sum())
    with pytest.raises(NotImplementedError, match="hand-written backward pass and no second derivative"):
        jax.eval_shape(twice, draw_inputs(DELTA, 0, jnp.float32))


def test_inside_shard_map_that_keeps_account_of_axes_none_is_chunked():
    """Kernels do not say which axes their outputs vary over; where nothing asks for it they are chosen."""
    mesh = jax.make_mesh((2,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.PartitionSpec("rows")
    inputs = draw_inputs(DELTA, 0, jnp.float32)

    def lowered(check):
        step = jax.grad(lambda x: call(DELTA, x, None)[0].sum())
        mapped = jax.shard_map(step, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=check)
        return jax.jit(mapped).trace(inputs).lower(lowering_platforms=("tpu",)).as_text().count("@tpu_custom_call")

    assert lowered(True) == 0
    assert lowered(False) == 2
