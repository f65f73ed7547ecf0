"""plot: the numbers drawn are the run's, every panel says what it is, bad input gets one line."""

import json

import matplotlib.image
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.object_store import bucket

from deltaformer_jax.plot import __main__ as plot
from deltaformer_jax.plot import picture, time_spent
from deltaformer_jax.plot.curves import names, read_curves, smoothed
from deltaformer_jax.plot.picture import PANELS
from deltaformer_jax.training.watch.ledger import read_ledger

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
    assert len(figure.legends[0].get_texts()) == 12 + 2  # and what is thick, what is thin
    assert len({(line.get_color(), line.get_linestyle()) for line in figure.axes[1].lines}) == 12


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
def test_smoothing_is_the_mean_of_whole_windows(values, width):
    values, steps = np.array(values), 3.0 * np.arange(len(values))
    places, means = smoothed(steps, values, width)
    assert len(places) == len(means) == max(0, len(values) - width + 1)
    for first, (place, mean) in enumerate(zip(places, means)):
        here = slice(first, first + width)
        finite = ~np.isnan(values[here])
        if finite.any():
            np.testing.assert_allclose(mean, values[here][finite].mean(), atol=1e-12)
            np.testing.assert_allclose(place, steps[here][finite].mean(), atol=1e-12)
        else:
            assert np.isnan(mean) and np.isnan(place)


@pytest.mark.parametrize("width", [1, 2, 5, 10])
def test_smoothing_has_no_hook_and_no_lag(width):
    """A straight line stays straight to its ends, whatever the distances of its steps; one last value far off moves
    the last mean by its share of a whole window and no more."""
    steps = np.cumsum(np.random.default_rng(0).integers(1, 9, 40)).astype(float)
    places, means = smoothed(steps, 7 - 0.25 * steps, width)
    np.testing.assert_allclose(means, 7 - 0.25 * places)
    assert places[0] == steps[:width].mean() and places[-1] == steps[-width:].mean()
    values = np.zeros(40)
    values[-1] = 1
    np.testing.assert_allclose(smoothed(steps, values, width)[1][-2:], [0, 1 / width])


def test_a_legend_says_what_is_thick_and_what_is_thin(tmp_path):
    """The mean ends where its last whole window has its middle, and the faint line goes on to the last step."""
    figure = picture.figure([read_curves(make_run(tmp_path / "a"))], "step", 10)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "a: 0.0375 bits per byte, step 40",
        "thick: mean of 10 logged steps, at their middle",
        "thin: every logged step",
    ]
    faint, mean = (line.get_xdata() for line in figure.axes[0].lines[:2])
    assert faint[-1] == 40 and mean[-1] == np.mean(range(31, 41)) and len(mean) == 31


def test_titles_say_who_is_ahead(tmp_path):
    title = lambda *runs: picture.figure(runs, "step", 10).get_suptitle()
    one, other = (read_curves(make_run(tmp_path / name, 40, offset)) for name, offset in (("a", 1.0), ("b", 0.0)))
    short = read_curves(make_run(tmp_path / "short", 20, 2.0))
    none = read_curves(make_run(tmp_path / "none", 5, evaluates=False))
    assert title(one) == "a: 0.5375 bits per byte, step 40"
    assert title(one, other) == "Of 2 runs b has the lowest evaluation bits per byte: 0.0375 at step 40"
    assert title(one, other, short).endswith("at step 40; their last steps differ")
    assert title(one, none) == "2 runs, not two of them with the same kind of evaluation yet"


def test_a_loss_that_is_not_finite_is_marked_where_it_was(tmp_path):
    folder = make_run(tmp_path / "a", evaluates=False)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 41, "loss": NaN}\n{"step": 42, "loss": 1.0}\n')
    figure = picture.figure([read_curves(folder)], "step", 4)
    marks = [line for line in figure.axes[0].lines if line.get_label() == "NaN or infinite"]
    assert [line.get_xdata().tolist() for line in marks] == [[41.0]]
    assert "NaN or infinite" in [text.get_text() for text in figure.legends[0].get_texts()]


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


def test_where_the_time_went(tmp_path, capsys):
    """A bar's parts lie end to end, in seconds; work that a restart lost is among them."""
    run = make_run(tmp_path / "run", 20)
    seconds = {"start-up": 2.0, "compiling": 6.0, "data wait": 1.0, "steps": 30.0, "evaluation": 1.0}
    first = {"started": 100.0, "time": 140.0, "step": 10, "seconds": {**seconds, "checkpoints": 0.0, "sample": 0.0}}
    start = {"started": 150.0, "time": 152.0, "step": 5, "seconds": {**dict.fromkeys(first["seconds"], 0.0)}}
    start["seconds"]["start-up"] = 2.0
    early = {**first, "step": 5, "time": 120.0, "seconds": {**first["seconds"], "steps": 10.0}}
    (run / "time.jsonl").write_text("".join(json.dumps(record) + "\n" for record in (early, first, start)))
    spent = {"run": read_ledger(run)}
    panel = time_spent.figure(spent).axes[0]
    bars = {bar.get_label(): bar.patches[0] for bar in panel.containers}
    assert bars["steps"].get_width() == 10 and bars["lost to restarts"].get_width() == 20
    ends = [(patch.get_x(), patch.get_x() + patch.get_width()) for patch in bars.values()]
    assert [end for _, end in ends[:-1]] == [begin for begin, _ in ends[1:]] and ends[-1][1] == spent["run"].running
    assert [text.get_text() for text in panel.get_yticklabels()] == ["run\n2 starts, 10 s not running"]
    plot.main([str(run), "--time"])
    assert (run / "time.png").stat().st_size > 10_000
    (run / "time.jsonl").unlink()
    assert "run: has no time.jsonl" in error(capsys, run, "--time")
    assert "none: no such folder" in error(capsys, tmp_path / "none", "--time")


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
