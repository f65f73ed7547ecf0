"""The frame of `reproduce` with an experiment of one line, and each experiment in a form smaller than --quick."""

import itertools
import json
import re
import signal
from pathlib import Path

import numpy as np
import pytest
from etils import epath
from support import training_cases as cases

from deltaformer_jax.data import load_corpus
from deltaformer_jax.reproduce import __main__ as program
from deltaformer_jax.reproduce import experiment, families, notebook, pictures, train_task, unfinished
from deltaformer_jax.reproduce.language import experts, mixers, prose, redundancy
from deltaformer_jax.reproduce.recall import mqar


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
        run=run,
        rows=lambda done: [{"x": r["settings"]["x"], "square": r["result"]["square"]} for r in done],
        figure=figure,
        cost="no time at all",
    )
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
    said = capfd.readouterr().err
    assert "stopping after this step, keeping what is done" in said and "this part keeps nothing" in said
    assert "to go on: python -m deltaformer_jax.reproduce squares" in said
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


def test_a_record_made_before_a_field_existed_is_still_read(tmp_path):
    """A new field is off by default: results stay what they were. Other values and missing settings are refused."""
    cell = tiny_cell()
    old = {**cell, "model": {name: x for name, x in cell["model"].items() if name != "householder_steps"}}
    assert unfinished.same_settings(old, cell)
    for other in ({"model": cell["model"] | {"householder_steps": 3}}, {"optimizer": {}}, {"seed": 7}):
        assert not unfinished.same_settings(old, cell | other)
    page = dict(experiment="x", quick=False, machine={}, cells=[dict(settings=old, result={"a": 1}, seconds=1.0)])
    (tmp_path / "x.json").write_text(json.dumps(page))
    assert len(notebook.Notebook(epath.Path(tmp_path), "x", False, [cell]).done) == 1


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
    assert "is not the record of an experiment; give another --out, or --force" in error_of(capsys, *out)


def test_bad_arguments(squares, tmp_path, capsys):
    assert "'sqares' is not an experiment: give one of mixers" in error_of(capsys, "sqares", "--out", str(tmp_path))
    assert "--out: give a folder" in error_of(capsys, "squares")
    (tmp_path / "file").write_text("")
    assert "is a file; give a folder" in error_of(capsys, "squares", "--out", str(tmp_path / "file"))
    program.main([])
    assert "x squared" in capsys.readouterr().out


def test_another_experiments_record_and_a_picture_of_another_hand_are_refused(squares, tmp_path, capsys):
    out = ("squares", "--out", str(tmp_path))
    (tmp_path / "squares.png").write_text("mine")
    assert "squares.png is there and no squares.json beside it; give another --out" in error_of(capsys, *out)
    assert (tmp_path / "squares.png").read_text() == "mine"
    program.main([*out, "--force"])
    capsys.readouterr()
    saved = {**page(tmp_path), "experiment": "cubes"}
    (tmp_path / "squares.json").write_text(json.dumps(saved))
    message = error_of(capsys, *out)
    assert "squares.json is the record of cubes, not of squares; give another --out, or --force" in message
    assert page(tmp_path) == saved


def test_a_finished_ones_picture_is_drawn_again_only_if_it_is_gone(squares, tmp_path, capsys):
    out, picture = ["squares", "--out", str(tmp_path)], tmp_path / "squares.png"
    program.main(out)
    drawn = picture.read_bytes()
    picture.write_text("mine")
    program.main(out)
    assert picture.read_text() == "mine"
    picture.unlink()
    program.main(out)
    assert picture.read_bytes() == drawn and not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("damage", [{"result": {}}, {"result": None}, {"seconds": None}, {"seconds": "x"}])
def test_a_damaged_record_is_refused_before_any_work(squares, tmp_path, capsys, damage):
    out = ("squares", "--out", str(tmp_path))
    program.main(list(out))
    capsys.readouterr()
    saved = page(tmp_path)
    saved["cells"][0].update(damage)
    (tmp_path / "squares.json").write_text(json.dumps(saved))
    assert "squares.json is not the record of an experiment; give another --out" in error_of(capsys, *out)


def test_force_removes_only_what_the_program_made(squares, tmp_path, capsys):
    made, mine = tmp_path / "squares" / "x=1", tmp_path / "squares" / "notes"
    unfinished.claim(epath.Path(made))
    mine.mkdir()
    (mine / "text").write_text("mine")
    program.main(["squares", "--out", str(tmp_path), "--force"])
    assert not made.exists() and (mine / "text").read_text() == "mine"
    assert "notes was not made by this program and stays" in capsys.readouterr().err
    with pytest.raises(ValueError, match="notes is there and not made by this program; move it away"):
        unfinished.claim(epath.Path(mine))
    (mine / "text").unlink()
    mine.rmdir()
    unfinished.claim(epath.Path(made))
    program.main(["squares", "--out", str(tmp_path), "--force"])
    assert not (tmp_path / "squares").exists()


def test_no_flag_is_abbreviated(squares, tmp_path, capsys):
    program.main(["squares", "--out", str(tmp_path)])
    capsys.readouterr()
    assert "--f: no such flag" in error_of(capsys, "squares", "--out", str(tmp_path), "--f")
    assert "--quik: no such flag; did you mean --quick?" in error_of(capsys, "squares", "--quik")
    assert len(squares.calls) == 3


def test_every_cell_says_which_machine_it_is_of(squares, tmp_path, monkeypatch):
    here = lambda name: monkeypatch.setattr(notebook, "machine", lambda: {"device": name})
    here("one")
    squares.interrupt = "x=1"
    assert not program.reproduce("squares", epath.Path(tmp_path))
    squares.interrupt = None
    here("two")
    # The second cell was begun on a third machine and kept what it had.
    folder = epath.Path(tmp_path) / "squares" / "x=1"
    unfinished.claim(folder)
    (folder / unfinished.SECONDS).write_text(json.dumps([{"machine": {"device": "three"}, "seconds": 100.0}]))
    assert program.reproduce("squares", epath.Path(tmp_path))
    saved = page(tmp_path)
    assert saved["machine"]["device"] == "one"
    assert [cell["machine"]["device"] for cell in saved["cells"]] == ["one", "two", "two"]
    assert [part["machine"]["device"] for part in saved["cells"][1]["parts"]] == ["three", "two"]
    assert [cell["seconds"] >= 100 for cell in saved["cells"]] == [False, True, False]
    assert not folder.parent.exists()  # nothing is left to go on from


def test_a_record_whose_cells_do_not_say_their_machine_is_continued(squares, tmp_path):
    program.main(["squares", "--out", str(tmp_path)])
    saved = page(tmp_path)
    saved["cells"] = [{key: cell[key] for key in ("settings", "result", "seconds")} for cell in saved["cells"][:2]]
    (tmp_path / "squares.json").write_text(json.dumps({**saved, "machine": {"device": "old"}}))
    program.main(["squares", "--out", str(tmp_path)])
    assert page(tmp_path)["machine"] == {"device": "old"}
    assert ["machine" in cell for cell in page(tmp_path)["cells"]] == [False, False, True]


def test_seconds_add_up_on_one_machine(tmp_path):
    folder, none = epath.Path(tmp_path / "cell"), StopAfter(1000)
    unfinished.claim(folder)
    for total in (1, 2, 3):
        clock = unfinished.Clock(folder, none, {"device": "one"})
        clock._start -= 1  # a second has gone by
        clock.save()
        (part,) = json.loads((folder / unfinished.SECONDS).read_text())
        assert total <= part["seconds"] < total + 1
    (folder / unfinished.SECONDS).write_text("?")
    with pytest.raises(ValueError, match=r"seconds\.json is damaged; give another --out, or --force"):
        unfinished.Clock(folder, none, {})


class StopAfter:
    def __init__(self, asks):
        self.asks = asks

    @property
    def requested(self):
        self.asks -= 1
        return self.asks < 0


def tiny_cell(**changes):
    """Two tasks in turn, six steps, two tests."""
    model = dict(mixers=["linear_attention"], d_model=8, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=8)
    tests = {str(longest): [f"task:parity,longest={longest}", 5, 8] for longest in (2, 3)}
    settings = train_task.settings_of(
        "label",
        ["task:parity,longest=2", "task:parity,longest=4"],
        [5, 5],
        model=model,
        learning_rate=1e-2,
        steps=6,
        batch_size=[4, 6],
        eval_every=1,
        eval_rows=[8, 5],
        target=[0, 2],
        patience=2,
        tests=tests,
    )
    return {**settings, **changes}


@pytest.mark.long
def test_a_stopped_cell_goes_on_to_the_same_bits(tmp_path):
    """Stopped at every step and between them, in both stages, and between the tests."""
    whole, stop = epath.Path(tmp_path / "whole"), StopAfter(1000)
    result = train_task.run(tiny_cell(), whole, print, stop)
    assert result["steps"] == 6 and result["solved_at"] == [2, None] and list(result["tests"]) == ["2", "3"]
    asks, expected = 1000 - stop.asks, cases.last_checkpoint(whole / unfinished.STAGES / "1")
    places = set()
    for first in range(0, asks, 3):
        folder = epath.Path(tmp_path / f"{first}")
        assert train_task.run(tiny_cell(), folder, print, StopAfter(first)) is None
        stages = sorted((folder / unfinished.STAGES).iterdir())
        places.add((len(stages), cases.last_checkpoint(stages[-1])[0]["step"]))
        assert train_task.run(tiny_cell(), folder, print, StopAfter(1000)) == result
        assert cases.last_checkpoint(folder / unfinished.STAGES / "1") == expected
        unfinished.release(folder)
        assert not folder.exists()
    assert places == {(1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (2, 2), (2, 3), (2, 4)}


def test_a_cell_saves_as_it_goes_and_refuses_what_is_not_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(unfinished, "SAVE_EVERY", 0.0)
    folder = epath.Path(tmp_path / "cell")

    class Die(StopAfter):
        @property
        def requested(self):
            if super().requested:
                raise SystemExit
            return False

    with pytest.raises(SystemExit):  # in the second stage, as if killed there
        train_task.run(tiny_cell(eval_every=2), folder, print, Die(16))
    said = []
    result = train_task.run(tiny_cell(eval_every=2), folder, said.append, StopAfter(1000))
    assert said[0].strip() == "resuming after step 5"  # the second stage begins after step 4
    assert result == train_task.run(tiny_cell(eval_every=2), epath.Path(tmp_path / "whole"), print, StopAfter(1000))
    with pytest.raises(ValueError, match=r"holds other settings than this version's, .*; give another --out"):
        train_task.run(tiny_cell(seed=1), folder, print, StopAfter(1000))
    checkpoints = tmp_path / "cell" / unfinished.STAGES / "1" / "checkpoints"
    largest = max(checkpoints.rglob("*"), key=lambda path: path.stat().st_size)
    largest.write_bytes(b"\x00" * 9)
    with pytest.raises(ValueError, match=r"stages/1 is damaged: .* corrupt .*; give another --out, or --force"):
        train_task.run(tiny_cell(eval_every=2), folder, print, StopAfter(1000))
    (folder / unfinished.PROGRESS).write_bytes(b"\x00" * 9)
    with pytest.raises(ValueError, match=r"progress\.json is damaged; give another --out, or --force"):
        train_task.run(tiny_cell(eval_every=2), folder, print, StopAfter(1000))
    (folder / unfinished.FORMER).write_bytes(b"")
    with pytest.raises(ValueError, match=r"unfinished\.msgpack is of an earlier version.*; give another --out, or --f"):
        train_task.run(tiny_cell(eval_every=2), folder, print, StopAfter(1000))


def test_the_program_goes_on_within_a_cell(monkeypatch, tmp_path, capsys):
    stop = StopAfter(10)
    monkeypatch.setattr(unfinished.Clock, "requested", property(lambda clock: stop.requested))
    one = experiment.Experiment(
        cells=lambda quick: [tiny_cell(family="parity", variant="tiny")],
        run=train_task.run,
        rows=families.rows,
        figure=lambda done: pictures.new_figure(),
        cost="no time",
    )
    monkeypatch.setitem(experiment.NAMES, "tiny", ("parity", "tiny"))
    monkeypatch.setattr(program, "load", lambda name: one)
    assert not program.reproduce("tiny", epath.Path(tmp_path))
    folder, kept = tmp_path / "tiny" / "label", {unfinished.MARKER, unfinished.PROGRESS, unfinished.SECONDS}
    assert {path.name for path in folder.iterdir()} == {*kept, unfinished.STAGES}
    stop.asks = 1000
    assert program.reproduce("tiny", epath.Path(tmp_path))
    said = capsys.readouterr().err
    assert "resuming after step 2" in said and "begins anew" not in said and not folder.parent.exists()


@pytest.mark.parametrize("name", experiment.NAMES)
def test_a_cost_that_counts_runs_counts_them_right(name):
    one = experiment.load(name)
    if found := re.search(r"(\d+) runs", one.cost):
        assert int(found[1]) == len(one.cells(False))
    assert isinstance(one.cost, str) and "--quick: " in one.cost


def test_mqar_shows_every_size_whatever_the_curriculum_reached():
    cells = mqar.cells(False)
    scores = [0.9, 0.8, 0.7, 0.6]
    done = [
        {
            "settings": cell,
            "seconds": 1.0,
            "result": {
                "tests": dict(zip(cell["tests"], scores)),
                "solved_at": [25, *[None] * (len(cell["lengths"]) - 1)],
                "steps": 75,
                "parameters": 1,
            },
        }
        for cell in cells
    ]
    assert list(cells[0]["tests"]) == ["T = 64, 4 pairs", "T = 128, 8 pairs", "T = 256, 16 pairs", "T = 512, 64 pairs"]
    for cell in cells:
        assert all(f"vocabulary={cell['vocabulary']}," in task for task, *_ in cell["tests"].values())
    table = mqar.rows(done)
    assert [line["mixer"] for line in table] == [*mqar.MIXERS] * 2 and table[0]["T = 256, 16 pairs"] == "0.7000"
    assert table[0]["left at step"] == "16 (256): 25, 64 (256): –, 128 (256): –, 256 (256): –, 512 (256): –"
    assert table[-1]["words"] == "8,192" and table[-1]["left at step"].startswith("16 (256): 25, 16 (1,024): –, ")
    panels = mqar.figure(done).axes
    for panel, ended in zip(panels, ("ended at T = 64", "ended at T = 16 (1,024 words)"), strict=True):
        assert panel.images[0].get_array().tolist() == [scores] * len(mqar.MIXERS)
        row = [*(f"{score:.3f}" for score in scores), ended]
        assert [text.get_text() for text in panel.texts] == row * len(mqar.MIXERS)


def test_the_mixers_parameters_are_equal():
    for quick in (True, False):
        sizes = {cell["label"]: cell["parameters"] for cell in mixers.cells(quick)}
        assert sizes.keys() == mixers.PATTERNS.keys() - (mixers.NOT_QUICK if quick else ())
        assert max(sizes.values()) < 1.02 * min(sizes.values()), sizes


@pytest.mark.long
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


def test_rank_correlation():
    assert redundancy.rank_correlation(np.array([1.0, 5.0, 9.0]), np.array([0.1, 0.2, 30.0])) == 1
    assert redundancy.rank_correlation(np.arange(4.0), np.array([1.0, 0.0, 3.0, 2.0])) == pytest.approx(0.6)


@pytest.mark.long
def test_redundancy(tmp_path):
    """Bits without a layer are those of the ranking that removes it first; elastic training has its own order too."""
    sizes = {**redundancy.QUICK, "d_model": 16, "steps": 2, "batch_size": 2, "mlp_dim": 16, "parameters": 1}
    more = {"learning_rate": 1e-3, "seed": 0, "eval_batches": 1, "measured_batches": 1}
    settings = {"label": "a", "family": "a", "elastic": True, "mixers": ["softmax_attention"], **sizes, **more}
    result = redundancy.run(settings, epath.Path(tmp_path / "a"), print, StopAfter(1000))
    assert result["bits"].keys() == {*redundancy.RANKINGS, redundancy.TRAINED}
    assert result["orders"][redundancy.TRAINED] == [2, 1] and len(result["bits"][redundancy.TRAINED]) == 3
    for name, order in result["orders"].items():
        assert result["bits"][name][1] == pytest.approx(result["bits_without"][order[0]], rel=1e-12)
        assert result["bits"][name][0] == result["bits"]["bi"][0]
    (row,) = redundancy.rows([{"settings": settings, "result": result}])
    assert row["bits, all layers"] == f"{result['bits']['loss'][0]:.3f}"


def test_prose_is_prepared_once_and_by_one_of_several(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(prose, "prose", lambda: [f"Text {i} of some words." for i in range(40)])
    first = prose.prose_corpus()
    assert len(load_corpus(first).tokenizer.encode("ab")) == 2
    monkeypatch.setattr(prose, "prose", lambda: pytest.fail("made again"))
    assert prose.prose_corpus() == first
    # Another process that began before the first was done.
    monkeypatch.setattr(prose, "prose", lambda: [f"Text {i} of some words." for i in range(40)])
    there, asked = Path.exists, []
    late = lambda path: there(path) if asked or path.name != "manifest.json" else bool(asked.append(path))
    monkeypatch.setattr(Path, "exists", late)
    assert prose.prose_corpus() == first and asked


def test_prose_is_english_of_this_python():
    texts = itertools.islice(prose.prose(), 3)
    assert all(len(text) > 100 for text in texts)
    assert "JSON" in prose._docstrings(Path(json.decoder.__file__))


def test_paired_differences_of_seeds():
    """Only seeds that both models were trained with count."""
    bits = {("DeltaFormer", 0): 2.0, ("Transformer", 0): 2.1, ("DeltaFormer", 1): 2.2, ("Transformer", 1): 2.4}
    bits["DeltaFormer", 2] = 9.0
    done = [
        {"settings": dict(model=model, layer="dense", corpus="prose", seed=seed), "result": {"bits": value}}
        for (model, seed), value in bits.items()
    ]
    found = experts.paired(done, "dense", "prose")
    np.testing.assert_allclose(found, [-0.1, -0.2])
    (row,) = experts.rows(done)
    assert row["difference"] == "-0.1500 ± 0.0500" and row["seeds"] == 2
    assert not len(experts.paired(done, "experts", "prose"))
