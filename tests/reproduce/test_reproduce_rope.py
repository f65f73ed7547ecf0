"""The rotary embedding's experiments: the sums and angles against their definitions; and runs in a smallest form."""

import cmath
import math

import numpy as np
import pytest
from etils import epath

from deltaformer_jax.config.remarks.rotary_bound import frequencies
from deltaformer_jax.reproduce.rope import distances, rope_base, rope_retrieval, rope_swap


def test_the_bound_of_a_score_and_the_angles_term_by_term():
    theta = frequencies(100.0, 16)
    assert [math.isclose(x, 100.0 ** (-i / 8)) for i, x in enumerate(theta)] == [True] * 8
    for m, found in zip((0, 1, 7, 300), distances.score_bounds(theta, np.array([0.0, 1, 7, 300]))):
        terms = [cmath.exp(1j * m * x) for x in theta]
        # 36 terms of at most 8 roundings each, and a cosine of an angle up to 300.
        assert math.isclose(found, sum(abs(sum(terms[:n])) for n in range(1, 9)), abs_tol=1e-11)
    assert distances.score_bounds(theta, np.zeros(1))[0] == 8 * 9 / 2
    seen = distances.turned(theta, 5)
    assert [min(5 * x, 2 * math.pi) for x in theta] == seen.tolist() and seen[0] < 2 * math.pi * (1 + 1e-15)


def test_what_is_seen_and_what_is_negative():
    found = {cell["label"]: distances.run(cell) for cell in distances.cells(128)}
    kept, small, enlarged = (found[f"angles, {way}"] for way in distances.WAYS)
    assert kept["slowest_pair"] == [round(4096 * 1e4 ** (-63 / 64), 6), round(32768 * 1e4 ** (-63 / 64), 6)]
    assert small["pairs_with_new_angles"] == 0 and min(small["seen"]) == round(2 * math.pi, 6)
    # The enlarged base gives the slowest pair no new angle, and other pairs it does.
    assert enlarged["slowest_pair"][0] == enlarged["slowest_pair"][1] and enlarged["most_new"] > 1
    assert 0 < enlarged["pairs_with_new_angles"] < kept["pairs_with_new_angles"] < 64
    of_1e4 = found["base 1e+04 by distance"]
    assert of_1e4["first_negative"] == rope_base.FIRST_NEGATIVE[1e4]
    for result in (result for label, result in found.items() if "by distance" in label):
        lowest = np.array(result["curve"])[:, 1]
        assert (result["first_negative"] is None) == (result["negative"] == 0) == (result["least"] >= 0)
        assert abs(lowest.min() - result["least"]) < 1e-4 and lowest[0] > 50


def test_a_recalls_tests_are_the_quarters_of_the_distance():
    """All bases have the same rows and steps; the last stage alone goes on to the end."""
    cells = [cell for cell in rope_retrieval.cells(False) if cell["kind"] == "recall"]
    assert list(cells[0]["tests"]) == ["1 to 128", "129 to 256", "257 to 384", "385 to 512"]
    for cell in cells:
        assert [task.split("farthest=")[1] for task, *_ in cell["tests"].values()] == ["128", "256", "384", "512"]
        assert cell["target"] == [0.0] * (len(cell["lengths"]) - 1) + [2.0]
        assert cell["patience"] * cell["eval_every"] * (len(cell["lengths"]) - 1) < cell["steps"]
        other = {"label", "base", "model"}
        assert all(cell[key] == cells[0][key] for key in cell.keys() - other)
    assert [rope_retrieval.broken_at(base, 64, 4000) for base in rope_retrieval.BASES] == [5, 46, 197, 725, 3616, None]


class NeverStop:
    requested = False


def done(module, sizes, folder):
    """The records of the cells of an experiment, run one after another."""
    return [
        {"settings": cell, "result": module.EXPERIMENT.run(cell, epath.Path(folder / str(i)), print, NeverStop)}
        | {"seconds": 1.0}
        for i, cell in enumerate(module.cells(True, sizes))
    ]


@pytest.mark.long
def test_recall_and_bytes_in_a_few_steps(tmp_path):
    recall = dict(width=8, queries=2, stages=((16, 2, 4), (32, 2, 4)), steps=3)
    text = dict(d_model=8, num_layers=1, num_heads=1, head_dim=8, sequence_length=16, batch_size=2, steps=2)
    few = dict(stage_steps=1, eval_every=1, eval_rows=4, test_rows=4, eval_batches=1, bases=(10.0,))
    few |= dict(recall=recall, bytes=text, rate=1e-2)
    monkey = pytest.MonkeyPatch()
    with monkey.context() as patch:
        patch.setattr(rope_retrieval, "WORDS", dict(keys=4, values=4, fillers=4))
        records = done(rope_retrieval, few, tmp_path)
    assert records[0]["result"]["solved_at"] == [1, None] and records[0]["result"]["steps"] == 3
    (line,) = rope_retrieval.rows(records)
    assert list(records[0]["result"]["tests"]) == ["1 to 8", "9 to 16", "17 to 24", "25 to 32"]
    assert line["rotary embedding"] == "base 1e1" and float(line["bits per byte"]) < 9


@pytest.mark.long
def test_swaps_in_a_few_steps(tmp_path):
    sizes = dict(
        rope_swap.QUICK, models=("read 1e2, write not rotated",), again=(), lengths=(4,), longer=(8,), width=16, steps=2
    )
    (record,) = done(rope_swap, sizes, tmp_path)
    (line,) = rope_swap.rows([record])
    assert line["0.99 at step"] == "4: –" and set(record["result"]["tests"]) == {"4", "8"}
