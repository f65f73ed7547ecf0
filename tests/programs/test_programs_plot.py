"""plot: the numbers drawn are the run's, every panel says what it is, bad input gets one line."""

import json

import matplotlib.image
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.object_store import bucket

from deltaformer_jax.plot import __main__ as plot
from deltaformer_jax.plot import picture
from deltaformer_jax.plot.curves import names, read_curves, smoothed
from deltaformer_jax.plot.picture import PANELS

TITLES = [title for name, title in PANELS if "accuracy" not in name]


def make_run(folder, steps=40, offset=0.0, evaluates=True):
    folder.mkdir(parents=True)
    records = []
    for step in range(1, steps + 1):
        loss = 3 / step + offset
        records.append(
            {
                "step": step,
                "loss": loss,
                "tokens_per_second": 100.0 * step,
                "grad_norm": 1 / step,
                "learning_rate": 1e-3 * step,
            }
        )
        if evaluates and step % 10 == 0:
            records.append({"step": step, "eval_loss": loss, "eval_bits_per_byte": loss / 2})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "config.json").write_text(json.dumps({"data": {"batch_size": 4, "sequence_length": 8}}))
    return folder


def lines_of(axis):
    return {line.get_label(): line.get_xydata() for line in axis.lines if not line.get_label().startswith("_")}


def test_what_is_drawn(tmp_path):
    runs = [read_curves(make_run(tmp_path / "a")), read_curves(make_run(tmp_path / "b", 20, 1.0))]
    figure = picture.figure(runs, "step", 1)
    panels = {axis.get_ylabel(): axis for axis in figure.axes if axis.axison}
    assert list(panels) == TITLES and all(axis.get_xlabel() == "step" for axis in panels.values())
    first, second = "a: 0.0375 bits per byte, step 40", "b: 0.575 bits per byte, step 20"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [first, second]
    loss = lines_of(panels["training loss (nats per token)"])
    np.testing.assert_allclose(loss[first], [(step, 3 / step) for step in range(1, 41)])
    np.testing.assert_allclose(loss[second], [(step, 3 / step + 1) for step in range(1, 21)])
    bits = lines_of(panels["evaluation (bits per byte)"])
    np.testing.assert_allclose(bits[second], [(10, 0.65), (20, 0.575)])
    tokens = picture.figure(runs, "tokens", 1).axes[0]
    np.testing.assert_allclose(lines_of(tokens)[second][:, 0], 32 * np.arange(1, 21))
    assert tokens.get_xlabel() == "tokens"


def test_a_run_on_a_task(tmp_path):
    folder = make_run(tmp_path / "a", evaluates=False)
    records = [{"step": step, "accuracy": step / 40} for step in range(1, 41)] + [{"step": 40, "eval_accuracy": 0.875}]
    with (folder / "metrics.jsonl").open("a") as file:
        file.write("".join(json.dumps(record) + "\n" for record in records))
    figure = picture.figure([read_curves(folder)], "step", 1)
    panels = {axis.get_ylabel(): axis for axis in figure.axes if axis.axison}
    label = "a: accuracy 0.875, step 40"
    np.testing.assert_allclose(lines_of(panels["training accuracy"])[label][:, 1], np.arange(1, 41) / 40)
    np.testing.assert_allclose(lines_of(panels["evaluation (accuracy)"])[label], [(40, 0.875)])


def test_a_run_without_evaluations_and_many_runs(tmp_path):
    runs = [read_curves(make_run(tmp_path / str(i), evaluates=False)) for i in range(12)]
    figure = picture.figure(runs, "step", 5)
    assert [axis.get_ylabel() for axis in figure.axes if axis.axison] == [TITLES[0], *TITLES[2:]]
    assert len(figure.legends[0].get_texts()) == 12
    colours = {tuple(line.get_color()) for line in figure.axes[2].lines}
    assert len(colours) == 12


def test_the_picture(tmp_path, capsys):
    a, b = make_run(tmp_path / "x" / "run"), make_run(tmp_path / "y" / "run")
    plot.main([str(a), str(b)])
    assert capsys.readouterr().out.strip() == str(a / "curves.png")
    picture = matplotlib.image.imread(a / "curves.png")
    assert picture.shape[0] > 800 and picture.shape[1] > 1500 and picture[..., :3].std() > 0.05
    plot.main([str(a), "--out", str(tmp_path / "new" / "one.svg"), "--x", "tokens", "--names", "the only one"])
    assert "<svg" in (tmp_path / "new" / "one.svg").read_text()


@pytest.mark.parametrize(
    ("folders", "given", "expected"),
    [
        (["runs/a", "runs/b/"], None, ["a", "b"]),
        (["x/run", "y/run", "y/other"], None, ["x/run", "y/run", "y/other"]),
        (["runs/a", "./runs/a"], None, ["a", "a"]),
        (["."], None, ["."]),
        (["gs://b/x/run", "run"], None, ["x/run", "run"]),
        (["a", "b"], "one,two", ["one", "two"]),
    ],
)
def test_names(folders, given, expected):
    assert names(folders, given) == expected


@given(st.lists(st.floats(-5, 5) | st.just(float("nan")), min_size=1, max_size=30), st.integers(1, 9))
def test_smoothing_is_a_centred_mean(values, width):
    values = np.array(values)
    found = smoothed(values, width)
    for i, value in enumerate(values):
        reach = min(width // 2, i, len(values) - 1 - i)
        near = values[i - reach : i + reach + 1]
        expected = value if np.isnan(value) else near[~np.isnan(near)].mean()
        np.testing.assert_allclose(found[i], expected, atol=1e-12)


def test_a_run_that_is_being_written(tmp_path):
    folder = make_run(tmp_path / "a", 5)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    assert read_curves(folder).values["loss"][0].tolist() == [1, 2, 3, 4, 5]


def test_an_object_store(tmp_path):
    make_run(tmp_path / "run")
    with bucket(tmp_path):
        plot.main(["gs://bucket/run"])
    assert (tmp_path / "run" / "curves.png").stat().st_size > 10_000


def error(capsys, *arguments):
    with pytest.raises(SystemExit) as exit:
        plot.main([str(argument) for argument in arguments])
    assert exit.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("deltaformer_jax.plot: error: ") and err.count("\n") == 1
    return err


def test_errors(tmp_path, capsys):
    run, empty, odd = make_run(tmp_path / "run"), tmp_path / "empty", make_run(tmp_path / "odd")
    empty.mkdir()
    assert "none: no such folder" in error(capsys, run, tmp_path / "none")
    assert "not the folder of a run (it has no metrics.jsonl)" in error(capsys, empty)
    assert "--out x.jpg: end it in .png, .pdf or .svg" in error(capsys, run, "--out", "x.jpg")
    assert "--names: 2 names for 1 runs; give one per run" in error(capsys, run, "--names", "a,b")
    assert "--smooth 0" in error(capsys, run, "--smooth", 0)
    (odd / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\nnonsense\n{"step": 2, "loss": 1.0}\n')
    assert "metrics.jsonl, line 2: not a record of a run" in error(capsys, odd)
    (odd / "metrics.jsonl").write_text('{"step": 1, "note": 1.0}\n')
    assert "no run has logged a loss" in error(capsys, odd)
    (odd / "metrics.jsonl").write_text("")
    assert "no step has been logged yet" in error(capsys, odd)
    (run / "config.json").unlink()
    assert "--x tokens: run has no config.json" in error(capsys, run, "--x", "tokens")
    assert not (run / "curves.png").exists()
