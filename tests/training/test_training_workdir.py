"""What train.py says first: whether a run is new or goes on, and where; and what it says while something takes long."""

import dataclasses
import json
import sys
import time

import pytest
from etils import epath
from support import training_cases as cases

from deltaformer_jax import train as train_program
from deltaformer_jax.config.saved import Saved
from deltaformer_jax.host import waiting as waits
from deltaformer_jax.host.waiting import waiting
from deltaformer_jax.training.checkpoints.checksums import write_checksums
from deltaformer_jax.training.workdir import new_workdir, standing

pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
CONFIG = cases.small_config("somewhere")  # of 12 steps


@pytest.fixture
def finished(tmp_path):
    """What a finished run leaves, as far as its standing depends on it."""
    folder = epath.Path(tmp_path / "run")
    folder.mkdir()
    Saved(CONFIG, "", "").write(folder)
    for step in (8, 12):
        add_checkpoint(folder, step)
    (folder / "metrics.jsonl").write_text('{"step": 12, "loss": 1.0}\n{"step": 12, "eval_loss": 1.0}\n{"step": 1')
    return folder


def add_checkpoint(folder, step):
    (folder / "checkpoints" / str(step)).mkdir(parents=True)
    (folder / "checkpoints" / str(step) / "state").write_text("parameters")
    write_checksums(folder / "checkpoints" / str(step))


def line(folder, config=CONFIG, resume=False):
    return standing(str(folder), config, resume).line


def longer(steps):
    return dataclasses.replace(CONFIG, run=dataclasses.replace(CONFIG.run, steps=steps))


def test_new_and_going_on(tmp_path, finished):
    assert line(tmp_path / "other") == f"new run in {tmp_path / 'other'}"
    assert line(finished, longer(20), resume=True) == f"going on at step 12 of 20: the run in {finished}"
    (finished / "checkpoints" / "16").mkdir()  # killed before its checksums were written
    (finished / "checkpoints" / "saving-16").write_text("")
    assert line(finished, longer(20)).startswith("going on at step 12 of 20")
    (finished / "checkpoints").rmtree()
    assert "at step 0 of 12" in line(finished) and "no checkpoint yet" in line(finished)


def test_fewer_steps_than_were_made_are_refused_at_once(finished):
    with pytest.raises(ValueError, match=r"run.steps = 3: the run in .* has made 12 steps; give a larger run.steps"):
        line(finished, longer(3))


def test_resume_refuses_what_holds_no_run(tmp_path, finished):
    with pytest.raises(ValueError, match=f"--workdir {tmp_path}/rnu holds no run; did you mean {finished}?"):
        line(tmp_path / "rnu", resume=True)
    with pytest.raises(ValueError, match="holds no run; beside it there are run"):
        line(tmp_path / "zzzzzz", resume=True)
    with pytest.raises(ValueError, match="holds no run; there is no such folder"):
        line(tmp_path / "a" / "b", resume=True)
    with pytest.raises(ValueError, match="holds no run; without --resume a new run starts there"):
        line(finished / "checkpoints" / "8", resume=True)


def test_a_finished_run_says_so_and_exits(finished, monkeypatch, capsys):
    assert standing(str(finished), CONFIG, False).finished
    monkeypatch.setattr(sys, "argv", ["train.py", f"--workdir={finished}", "--resume"])
    before = sorted(path.name for path in finished.iterdir())
    train_program.main()  # does not look for the data, which is nowhere
    expected = f"nothing to do: the run in {finished} has made its 12 steps; for more, give --config.run.steps=24\n"
    assert capsys.readouterr().out == expected
    assert sorted(path.name for path in finished.iterdir()) == before


def test_what_is_not_finished(finished):
    (finished / "checkpoints" / "12" / "state").write_text("damaged")
    assert line(finished).startswith("going on at step 12 of 12")
    write_checksums(finished / "checkpoints" / "12")
    assert line(finished).startswith("nothing to do")
    (finished / "metrics.jsonl").write_text('{"step": 12, "loss": 1.0}\n')  # stopped before its last evaluation
    assert line(finished).startswith("going on at step 12 of 12")
    no_evaluation = dataclasses.replace(CONFIG, run=dataclasses.replace(CONFIG.run, eval_every=0))
    assert line(finished, no_evaluation).startswith("nothing to do")


def test_another_config_is_refused_at_once(finished):
    other = cases.small_config("somewhere", model__d_model=64)
    with pytest.raises(ValueError, match=r"model\.d_model: 32 in the run, 64 asked for"):
        line(finished, other)
    (finished / "config.json").write_text(json.dumps({}))
    with pytest.raises(ValueError, match="not a run's config"):
        line(finished)


def test_new_workdirs_are_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = new_workdir("tiny")
    (tmp_path / first).mkdir(parents=True)
    assert first.startswith("runs/20") and first.endswith("-tiny") and new_workdir("tiny") != first


def test_a_long_wait_is_said(monkeypatch):
    monkeypatch.setattr(waits, "AFTER", 0.02)
    monkeypatch.setattr(waits, "AGAIN", (0.1,))
    said = []
    with waiting("compiling", said.append):
        pass
    assert not said
    with pytest.raises(ZeroDivisionError), waiting("compiling", said.append):
        time.sleep(0.3)
        raise ZeroDivisionError
    assert said == ["compiling ...", "compiling: 0 s so far"]
