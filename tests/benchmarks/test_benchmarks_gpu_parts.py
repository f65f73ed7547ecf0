"""The parts of benchmarks/gpu.py at tiny sizes on the CPU, with the portable forms in the place of the kernels."""

import contextlib
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import gpu
from on_gpu import compare, delta, kernels, long, plans, repeats, rival, shapes, tiles, times

from pallas_kernels.triton.gated.table import chosen_plan

SMALL = {"width": 16, "value_width": 16}


class Recorder:
    """In the place of a case's process: keeps its results, and knows what it did alone."""

    def __init__(self):
        self.rows, self.turns = [], 0

    @contextlib.contextmanager
    def alone(self):
        self.turns += 1
        yield

    def at(self, where):
        pass

    def result(self, said, wrong=False, **numbers):
        self.rows.append({"said": said, "wrong": wrong, **numbers})


@pytest.fixture
def worker():
    return Recorder()


@pytest.mark.parametrize("op, number", [("delta", 3), ("gated", 3)])
def test_shapes_agree_with_the_definition(worker, op, number):
    shapes.check(worker, op, [number], {}, kernels="chunked", longest=12)
    (row,) = worker.rows
    assert not row["wrong"] and row["said"].startswith("agrees, float32 to"), row
    assert worker.turns == 2 and 0 < row["errors"]["float32"] < row["errors"]["bfloat16"] < 0.1


@pytest.mark.parametrize(
    "op, form, lengths, kernels",
    [
        ("delta", "w = k, eight documents", [24, 40], "chunked"),
        ("gated", "linear attention, a decay a head", [24], "recurrent"),
    ],
)
def test_long_compares_with_chunked(worker, op, form, lengths, kernels):
    long.check(worker, op, form, lengths, {}, kernels=kernels, sizes=SMALL)
    assert [(row["T"], row["wrong"]) for row in worker.rows] == [(length, False) for length in lengths], worker.rows
    assert {"out", "dquery", "dkey", "dvalue"} <= set(worker.rows[0]["differences"])


def test_a_wrong_result_is_said(worker, monkeypatch):
    def call(shape, implementation):
        factor = 1 if implementation == "chunked" else 1.2
        return lambda arrays, segments: {"out": factor * arrays["query"]}

    monkeypatch.setattr(delta, "call", call)
    long.check(worker, "delta", "tied", [32], {}, sizes=SMALL)
    (row,) = worker.rows
    assert row["wrong"] and "is off by 0.2" in row["said"], row


@pytest.mark.parametrize("op, form", [("delta", "untied"), ("gated", "delta rule, a decay a head")])
def test_repeats_are_the_same(worker, op, form):
    repeats.check(worker, op, form, [[1, 24, 5]], {}, kernels="chunked", sizes=SMALL)
    (row,) = worker.rows
    assert not row["wrong"] and (row["runs"], row["differ"], row["apart"]) == (5, 0, 0.0), row


def test_a_run_that_differs_counts():
    first = {"out": jnp.ones(3), "dquery": jnp.ones(3)}
    again = {"out": jnp.ones(3), "dquery": jnp.array([1.0, 1.0, 1.5])}
    assert tuple(map(float, repeats._compared(first, again, ("out",)))) == (1, 0.5)
    assert tuple(map(float, repeats._compared(first, again, ("out", "dquery")))) == (0, 0)


def test_times_of_whole_calls(worker):
    times.time_delta(worker, "w = k, 8 queries a key", 32, 2, {}, "chunked", "xla", SMALL | {"heads": 8, "kv_heads": 1})
    sizes = SMALL | {"batch": 1, "heads": 2, "value_heads": 2}
    times.time_gated(worker, "linear attention, a decay a head", 32, 2, {}, "recurrent", sizes)
    assert worker.turns == 2 and [row["direction"] for row in worker.rows] == list(times.DIRECTIONS) * 2
    assert all(row["ms"] > 0 for row in worker.rows)
    first, _, gated, _ = worker.rows
    assert gated["jax-linear-attention ms"] == "no such op"
    assert first["× cuDNN"] > 0 and first["TFLOP/s"] > 0 and gated["chunked / ours"] > 0


def test_times_go_on_when_fla_refuses(worker, monkeypatch):
    def milliseconds(shape, given, rounds):
        yield "forward", 2.0
        raise RuntimeError("not on this device\nand more")

    monkeypatch.setattr(times.fla, "missing", lambda shape: False)
    monkeypatch.setattr(times.fla, "milliseconds", milliseconds)
    sizes = SMALL | {"batch": 1, "heads": 1, "value_heads": 1}
    times.time_gated(worker, "linear attention, a decay a head", 32, 1, {}, "recurrent", sizes)
    *_, timed, refused = worker.rows
    assert len(worker.rows) == 4 and timed["fla ms"] == 2
    assert refused["said"] == "no time of fla's kernel: RuntimeError: not on this device" and not refused["wrong"]


def test_a_plan_holds_inside_and_no_longer():
    with plans.planned("walk"):
        assert [chosen_plan(90, width, True) for width in (64, 128, 256)] == ["walk", "walk", "stages"]
        assert chosen_plan(90, 64, False) == chosen_plan(100, 64, True) == "stages"
    assert chosen_plan(90, 64, True) == "stages"
    with plans.planned("stages"):
        delta.use_tiles(gpu.plan(gpu.parse(["--plan", "walk", "--only", "times"]))[-1].settings["tiles"])
        assert chosen_plan(90, 64, True) == "walk"
    assert chosen_plan(90, 64, True) == "stages"


@pytest.mark.parametrize("installed, said", [(False, "not installed"), (True, "ModuleNotFoundError")])
def test_a_rival_that_cannot_run_says_so(worker, monkeypatch, installed, said):
    monkeypatch.setattr(rival.importlib.util, "find_spec", lambda name: installed)
    monkeypatch.setitem(rival.KERNELS, "head", ("no_such_package", "gated_delta_rule"))
    sizes = SMALL | {"batch": 1, "heads": 1, "value_heads": 1}
    monkeypatch.setattr(times.fla, "missing", lambda shape: True)
    times.time_gated(worker, "delta rule, a decay a head", 32, 1, {}, "chunked", sizes)
    assert {row["jax-linear-attention ms"] for row in worker.rows} == {said}


def test_operations_are_the_formula_of_the_docs():
    shape, passes, _ = times.DELTA["untied"]
    # 9.0 ms on an H100 were 244 TFLOP/s, and 32.7 ms forward and backward 235 (docs/performance.md).
    assert times.flops(shape, passes, "forward") == pytest.approx(2 * 2 * 8192**2 * 128 * 64)
    assert times.flops(shape, passes, "forward+backward") / 32.7e-3 == pytest.approx(235e12, rel=0.01)


@pytest.mark.parametrize("kernel", kernels.KERNELS)
def test_a_single_kernel_gets_what_a_pass_gives_it(worker, monkeypatch, kernel):
    pytest.importorskip("triton", reason="Triton is in the dependency group `kernels`, on Linux")
    from pallas_kernels.triton import launch

    started = []

    def run(given):
        started.append(given)
        # Depends on the arrays, so that the launches before are not left out.
        some = sum(jnp.sum(x.astype(jnp.float32)) for x in given.arrays)
        return [jnp.full(x.shape, some, x.dtype) for x in given.outputs]

    monkeypatch.setattr(launch, "run", run)
    tiles = {kernel: [16, 16, 4, 1]}
    before = {key: dict(entry) for key, entry in delta.TABLE.items()}
    try:
        sizes = SMALL | {"batch": 1, "heads": 2, "kv_heads": 2}
        kernels.time_kernel(worker, kernel, 32, 1, tiles, yardstick="xla", sizes=sizes)
    finally:
        for key, entry in before.items():
            delta.TABLE[key].update(entry)
    (row,) = worker.rows
    # Only the write has an order of heads: many at once, of few tokens.
    assert row["tile"] == f"16, 16, 4, 1, 1, {0 if kernel.startswith('read') else 128}" and row["ms"] > 0, row
    last = started[-1]
    assert last.kernel.__name__ == kernel.replace("tied", "write")
    assert last.constants["FORM"].tied == kernel.startswith("tied")
    assert last.constants["TILE"].rows == 16


def test_other_tiles_are_timed_and_compared_with_the_tables(worker, monkeypatch):
    pytest.importorskip("triton", reason="Triton is in the dependency group `kernels`, on Linux")
    from pallas_kernels.triton import launch

    def run(given):
        """A result that is off with one of the tiles."""
        some = sum(jnp.sum(x.astype(jnp.float32)) for x in given.arrays)
        off = 0.1 * (given.constants["TILE"].rows == 32)
        return [jnp.full(x.shape, some * 0 + 1 + off, x.dtype) for x in given.outputs]

    monkeypatch.setattr(launch, "run", run)
    before = {key: dict(entry) for key, entry in delta.TABLE.items()}
    try:
        sizes = SMALL | {"batch": 1, "time": 32, "heads": 2, "kv_heads": 2}
        tiles.time_tiles(worker, "write_forward", tiles.SHORT, [[16, 16, 4, 1], [32, 16, 4, 1]], 1, sizes)
    finally:
        for key, entry in before.items():
            delta.TABLE[key].update(entry)
    assert [row["wrong"] for row in worker.rows] == [False, False, True], worker.rows
    assert worker.rows[1]["tile"] == "(16, 16, 4, 1, 1, 128)" and worker.turns == 1


def test_nan_is_the_largest_difference():
    apart = compare.differences(
        {"out": np.array([1.0, np.nan]), "dkey": np.ones(2)}, {"out": np.ones(2), "dkey": np.zeros(2)}
    )
    name, error = compare.worst(apart)
    assert name == "out" and np.isnan(error) and apart["dkey"] == 1000


def test_late_tokens_are_compared_by_themselves():
    size = np.repeat([1.0, 1e-3], 64).reshape(1, 128, 1, 1)  # late tokens average over many
    right = {"out": np.random.default_rng(0).standard_normal((1, 128, 2, 8)) * size, "state": np.ones((1, 2, 8, 8))}
    late = {"out": right["out"].copy(), "state": right["state"]}
    late["out"][0, 100:] *= 1.5
    assert compare.differences(late, right)["out"] < 1e-3
    apart = compare.block_differences(late, right, 128)
    assert 0.2 < apart["out"] < 0.5 and apart["state"] == 0
    late["out"][0, 127, 0, 0] = np.nan
    assert np.isnan(compare.block_differences(late, right, 128)["out"])


def test_the_plan_is_in_order():
    every = gpu.plan(gpu.parse(["--kernels"]))
    of_ops = [part for part in gpu.PARTS if part not in (*gpu.WHOLE, "tiles")]
    assert list(dict.fromkeys(case.part for case in every)) == of_ops
    whole = gpu.plan(gpu.parse(["--kernels", "--tiles", "--models"]))
    assert list(dict.fromkeys(case.part for case in whole)) == list(gpu.PARTS)
    count = lambda arguments: len(gpu.plan(gpu.parse(arguments)))
    assert count(["--quick"]) < count([]) < count(["--kernels"])
    assert {case.op for case in gpu.plan(gpu.parse(["--op", "gated", "--kernels"]))} == {"gated"}
    (settings,) = {str(case.settings["tiles"]) for case in gpu.plan(gpu.parse(["--tile", "read_forward=64,64,4,2"]))}
    assert settings == "{'read_forward': [64, 64, 4, 2]}"
    numbers = [x for case in every if (case.part, case.op) == ("shapes", "delta") for x in case.settings["numbers"]]
    assert numbers == list(range(50))


def test_random_shapes_are_the_same_in_every_process():
    assert delta.draw(np.random.default_rng(7), 400) == delta.draw(np.random.default_rng(7), 400)
    assert len({str(delta.draw(np.random.default_rng(n), 400)) for n in range(50)}) == 50
    assert not isinstance(jax.tree.leaves(delta.inputs(delta.Shape(time=4), np.random.default_rng(0)))[0], jax.Array)
