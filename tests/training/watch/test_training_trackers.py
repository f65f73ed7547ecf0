"""Weights & Biases (offline) and Trackio (local): what they hold is what the run's files say, each step once."""

import builtins
import importlib.util
import json
import os
import signal
import time
from pathlib import Path

import jax
import pytest
from etils import epath
from support import training_cases as cases
from support.program_run import finish, start

from deltaformer_jax.config import Config
from deltaformer_jax.training.setup import prepare
from deltaformer_jax.training.watch.scalars import scalars
from deltaformer_jax.training.watch.trackers import make_trackers

NAMES = ("wandb", "trackio")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Nothing leaves this machine, and nothing is written outside the test's folder."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))


def in_wandb(workdir):
    """[(step, values)] of the one offline run in DIR/wandb.

    The file is LevelDB's log: 7 bytes, then blocks of 32 KiB of pieces: checksum (4 bytes), length (2), type (1).
    """
    from wandb.proto import wandb_internal_pb2

    (file,) = (workdir / "wandb").glob("offline-run-*/*.wandb")
    content, place, whole, found = file.read_bytes(), 7, b"", []
    while place + 7 <= len(content):
        if 32768 - place % 32768 < 7:  # too short for the head of a piece
            place += 32768 - place % 32768
            continue
        length, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        whole += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or the last piece of one
            record, whole = wandb_internal_pb2.Record.FromString(whole), b""
            if record.WhichOneof("record_type") == "history":
                items = {
                    item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item
                }
                found.append((items["_step"], {key: x for key, x in items.items() if not key.startswith("_")}))
    return found


def in_trackio(workdir, folder):
    """[(step, values)] of the one run of this workdir in Trackio's database."""
    import sqlite3

    name = f"{workdir.name}-{json.loads((workdir / 'trackers.json').read_text())['id']}"
    with sqlite3.connect(folder / "deltaformer_jax.db") as database:
        rows = database.execute("SELECT step, metrics FROM metrics WHERE run_name = ? ORDER BY id", (name,)).fetchall()
    return [(step, json.loads(values)) for step, values in rows]


def expected(workdir):
    """[(step, values)] from the run's own files."""
    rows = {}
    for name in ("metrics.jsonl", "statistics.jsonl"):
        path = workdir / name
        for line in path.read_text().splitlines() if path.exists() else ():
            record = json.loads(line)
            if values := scalars(record):
                rows.setdefault(record["step"], {}).update(values)
    return sorted(rows.items())


def process(workdir, corpus, tmp_path, steps):
    flags = [f"--config.{name}" for name in (
        f"data.path={corpus}", "data.sequence_length=32", "data.batch_size=8", "model.d_model=32", "model.num_layers=2",
        "model.num_heads=2", "model.num_kv_heads=2", "model.head_dim=16", "model.implementation=parallel",
        f"run.steps={steps}", "run.log_every=1", "run.eval_every=10", "run.checkpoint_every=7", "run.sample_tokens=0",
        "run.statistics_every=5", "run.wandb=true", "run.trackio=true",
    )]  # fmt: skip
    return start([f"--workdir={workdir}", *flags], {**os.environ, "JAX_PLATFORMS": "cpu"}, tmp_path)


@pytest.mark.long
def test_each_step_is_there_once_after_a_kill(tmp_path):
    corpus, workdir = cases.make_corpus(tmp_path / "corpus"), tmp_path / "run"
    running = process(workdir, corpus, tmp_path, 150)
    deadline = time.monotonic() + 300
    while len(list((workdir / "checkpoints").glob("*/sha256.json"))) < 2 or _steps(workdir) % 7 < 3:
        assert running.poll() is None and time.monotonic() < deadline, finish(running)
        time.sleep(0.01)
    running.send_signal(signal.SIGKILL)
    running.communicate()
    killed = _steps(workdir)
    code, _, err = finish(process(workdir, corpus, tmp_path, 150), timeout=300)
    assert code == 0 and 14 < killed < 150, err
    truth = expected(workdir)
    assert [step for step, _ in truth] == list(range(1, 151))
    assert {"training/loss", "gradient_norm/layers.1.mlp.up", "evaluation/loss"} <= truth[99][1].keys()
    assert in_trackio(workdir, tmp_path / "trackio") == truth
    assert in_wandb(workdir) == truth


def _steps(workdir):
    path = workdir / "metrics.jsonl"
    return path.read_text().count('"tokens_per_second"') if path.exists() else 0


@pytest.fixture
def in_this_process(monkeypatch):
    """Trackio reads its folder when it is imported, which an earlier test may have done."""
    import trackio.sqlite_storage
    import trackio.utils

    folder = Path(os.environ["TRACKIO_DIR"])
    for module in (trackio.utils, trackio.sqlite_storage):
        monkeypatch.setattr(module, "TRACKIO_DIR", folder)
    return folder


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_a_rollback_replaces_the_steps_given_up(tmp_path, in_this_process):
    config, workdir = Config(), epath.Path(tmp_path / "run")
    config.run.wandb = config.run.trackio = True
    workdir.mkdir()
    trackers = make_trackers(config, workdir, [])
    for tracker in trackers:
        for step in range(1, 6):
            tracker.write({"step": step + 1, "gradient_norm": {"a": float(step + 1)}})  # statistics come one step early
            tracker.write({"step": step, "loss": 1.0, "because": "text"})
        tracker.cut(3)
        tracker.write({"step": 4, "loss": 2.0})
        tracker.close()
    truth = [(1, {"training/loss": 1.0})]
    truth += [(step, {"gradient_norm/a": float(step), "training/loss": 1.0}) for step in (2, 3)]
    truth += [(4, {"training/loss": 2.0})]
    assert in_wandb(workdir) == truth
    assert in_trackio(workdir, in_this_process) == truth


@pytest.mark.parametrize("name", NAMES)
def test_a_package_that_is_missing_is_named_before_any_work(name, tmp_path, monkeypatch):
    really = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda module, *rest: None if module == name else really(module, *rest)
    )
    config = cases.small_config(tmp_path / "no corpus is read", **{f"run__{name}": True})
    with pytest.raises(ValueError, match=rf"^run\.{name} = True: needs {name}, which is not installed: .*{name}"):
        prepare(config, tmp_path / "run", devices=jax.devices()[:1])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("variable", ["TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"])
def test_trackio_with_a_server_is_refused(variable, tmp_path, monkeypatch):
    monkeypatch.setenv(variable, "someone/somewhere")
    config = cases.small_config(tmp_path / "no corpus is read", run__trackio=True)
    with pytest.raises(ValueError, match=rf"run\.trackio = True: {variable} is set, .*unset it"):
        prepare(config, tmp_path / "run", devices=jax.devices()[:1])


def test_without_them_neither_is_imported(tmp_path, monkeypatch):
    really = builtins.__import__

    def refusing(name, *arguments, **options):
        assert name.split(".")[0] not in NAMES, name
        return really(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", refusing)
    assert make_trackers(Config(), epath.Path(tmp_path), [{"step": 1, "loss": 1.0}]) == []
    assert not list(tmp_path.iterdir())
