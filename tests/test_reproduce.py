"""The frame of `reproduce` with an experiment of one line, and each experiment in a form smaller than --quick."""

import json
import signal

import pytest
from etils import epath

from deltaformer_jax.reproduce import __main__ as program
from deltaformer_jax.reproduce import experiment, mixers


@pytest.fixture
def squares(monkeypatch):
    """An experiment of three cells; `squares.calls` says which ran, `squares.interrupt` stops during one of them."""

    class Squares:
        calls, interrupt, offset = [], None, 0

    def run(settings, folder, note, stop):
        Squares.calls.append(settings["label"])
        if Squares.interrupt == settings["label"]:
            signal.raise_signal(signal.SIGINT)
            while not stop.requested:
                pass
            return None
        return {"square": settings["x"] ** 2}

    def figure(done):
        from matplotlib.figure import Figure

        picture = Figure()
        picture.subplots().plot([record["result"]["square"] for record in done])
        return picture

    one = experiment.Experiment(
        cells=lambda quick: [{"label": f"x={x}", "x": x + Squares.offset} for x in range(2 if quick else 3)],
        run=run, rows=lambda done: [{"x": r["settings"]["x"], "square": r["result"]["square"]} for r in done],
        figure=figure, cost="no time at all",
    )  # fmt: skip
    monkeypatch.setitem(experiment.NAMES, "squares", ("x squared", "squares"))
    monkeypatch.setattr(program, "load", lambda name: one)
    return Squares


def page(folder):
    return json.loads((folder / "squares.json").read_text())


def test_results_settings_and_machine_are_written(squares, tmp_path, capsys):
    program.main(["squares", "--out", str(tmp_path / "new" / "dir")])
    saved = page(tmp_path / "new" / "dir")
    assert saved["finished"] and not saved["quick"] and saved["machine"]["jax"]
    assert [cell["settings"] for cell in saved["cells"]] == [{"label": f"x={x}", "x": x} for x in range(3)]
    assert [cell["result"]["square"] for cell in saved["cells"]] == [0, 1, 4]
    assert (tmp_path / "new" / "dir" / "squares.png").read_bytes().startswith(b"\x89PNG")
    assert "square" in capsys.readouterr().out


def test_an_interrupted_one_goes_on_and_a_finished_one_stays(squares, tmp_path, capfd):
    squares.interrupt = "x=1"
    with pytest.raises(SystemExit) as stopped:
        program.main(["squares", "--out", str(tmp_path)])
    assert stopped.value.code == 130
    assert "to go on: python -m deltaformer_jax.reproduce squares" in capfd.readouterr().err
    assert not page(tmp_path)["finished"] and squares.calls == ["x=0", "x=1"]
    squares.interrupt = None
    program.main(["squares", "--out", str(tmp_path)])
    assert page(tmp_path)["finished"] and squares.calls == ["x=0", "x=1", "x=1", "x=2"]
    before = (tmp_path / "squares.json").read_text()
    program.main(["squares", "--out", str(tmp_path)])
    assert (tmp_path / "squares.json").read_text() == before and len(squares.calls) == 4
    program.main(["squares", "--out", str(tmp_path), "--force"])
    assert len(squares.calls) == 7


def error_of(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        program.main([*arguments])
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1, message
    return message


def test_what_is_there_is_never_overwritten(squares, tmp_path, capsys):
    out = ("squares", "--out", str(tmp_path))
    program.main([*out])
    capsys.readouterr()
    before = (tmp_path / "squares.json").read_text()
    assert "holds the full form and you ask for the quick one" in error_of(capsys, *out, "--quick")
    squares.offset = 1
    assert "holds other settings for 'x=0' than this version's" in error_of(capsys, *out)
    assert (tmp_path / "squares.json").read_text() == before
    (tmp_path / "squares.json").write_text("{}")
    assert "is no record of an experiment; give another --out, or --force" in error_of(capsys, *out)


def test_bad_arguments(squares, tmp_path, capsys):
    assert "'sqares' is no name: give one of mixers" in error_of(capsys, "sqares", "--out", str(tmp_path))
    assert "--out: give a folder" in error_of(capsys, "squares")
    (tmp_path / "file").write_text("")
    assert "is a file; give a folder" in error_of(capsys, "squares", "--out", str(tmp_path / "file"))
    program.main([])
    assert "x squared" in capsys.readouterr().out


def test_the_mixers_parameters_are_equal():
    for quick in (True, False):
        sizes = {cell["label"]: cell["parameters"] for cell in mixers.cells(quick)}
        assert sizes.keys() == mixers.PATTERNS.keys() and max(sizes.values()) < 1.02 * min(sizes.values()), sizes


def test_mixers(monkeypatch, tmp_path):
    """Two of them for three steps."""
    few = ("DeltaFormer", "Gated DeltaNet")
    monkeypatch.setattr(mixers, "PATTERNS", {label: mixers.PATTERNS[label] for label in few})
    monkeypatch.setattr(mixers, "QUICK", {**mixers.QUICK, "d_model": 32, "num_heads": 1, "steps": 3, "batch_size": 2})
    assert program.reproduce("mixers", epath.Path(tmp_path), quick=True)
    saved = json.loads((tmp_path / "mixers.json").read_text())
    assert [cell["settings"]["label"] for cell in saved["cells"]] == list(few)
    assert all(cell["result"]["eval_bits_per_byte"] < 9 for cell in saved["cells"])
    assert (tmp_path / "mixers.png").exists()
