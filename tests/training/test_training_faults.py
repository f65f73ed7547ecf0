"""What happens to real runs: signals at every stage, kills at random moments, a full disk."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from support import training_cases as cases
from support.program_run import SMALL, WARNINGS, finish, ours, start

from deltaformer_jax import train as program
from deltaformer_jax.training import loop, setup
from deltaformer_jax.training import program as programs
from deltaformer_jax.training.checkpoints import store as checkpoint
from deltaformer_jax.training.checkpoints.restore import restore
from deltaformer_jax.training.position import Feed
from deltaformer_jax.training.watch.ledger import read_ledger

pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
# A soak: DELTAFORMER_KILLS=20 takes three minutes on two cores.
KILLS = int(os.environ.get("DELTAFORMER_KILLS", "1"))


@pytest.fixture(scope="module", autouse=True)
def compile_once(tmp_path_factory):
    yield from cases.compile_once(tmp_path_factory.mktemp("compiled"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return cases.make_corpus(tmp_path_factory.mktemp("corpus"))


def flags_of(corpus, steps=40):
    return [
        f"--config.data.path={corpus}",
        *SMALL,
        f"--config.run.steps={steps}",
        "--config.run.log_every=1",
        "--config.run.eval_every=10",
        "--config.run.checkpoint_every=7",
        "--config.run.sample_tokens=20",
    ]


def weights(workdir):
    run = restore(workdir)
    return run.step, [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(run.params)]


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    """A run that nothing happened to: its metrics and weights."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    sys.argv = ["train.py", f"--workdir={folder}", *flags_of(corpus)]
    program.main()
    return cases.read_metrics(folder), weights(folder)


def after(count, function, signals):
    """`function`, with a SIGTERM to this process before its call number `count`."""

    def wrapped(*arguments, **named):
        signals.append(1)
        if len(signals) == count:
            signal.raise_signal(signal.SIGTERM)
            time.sleep(0.2)  # until the thread that reads signals has seen it
        return function(*arguments, **named)

    return wrapped


class Compiling:
    """A lowered program whose compilation is interrupted."""

    def __init__(self, program, signals):
        self._program, self._signals = program, signals

    def lower(self, *arguments):
        return Compiling(self._program.lower(*arguments), self._signals)

    def compile(self, **options):
        return after(1, self._program.compile, self._signals)(**options)


STAGES = {
    "compiling": lambda patch, signals: patch(
        programs,
        "make_train_step",
        lambda *a, make=programs.make_train_step, **named: Compiling(make(*a, **named), signals),
    ),
    "stepping": lambda patch, signals: patch(Feed, "to_devices", after(13, Feed.to_devices, signals)),
    "evaluating": lambda patch, signals: patch(loop, "evaluate", after(2, loop.evaluate, signals)),
    "saving": lambda patch, signals: patch(
        checkpoint.Checkpoints, "save", after(2, checkpoint.Checkpoints.save, signals)
    ),
    "waiting for data": lambda patch, signals: patch(loop, "_next", after(16, loop._next, signals)),
    "sampling": lambda patch, signals: patch(loop, "generate", after(1, loop.generate, signals)),
}


EVERY_DAY = ("stepping", "saving")


@pytest.mark.parametrize(
    "stage", [pytest.param(stage, marks=[] if stage in EVERY_DAY else pytest.mark.long) for stage in STAGES]
)
def test_sigterm_at_every_stage(stage, corpus, whole, tmp_path, monkeypatch, capfd):
    """Exit code 0, at most the step under way is still made, and what is resumed ends as if nothing had happened."""
    signals = []
    with monkeypatch.context() as patched:
        STAGES[stage](patched.setattr, signals)
        patched.setattr(sys, "argv", ["train.py", f"--workdir={tmp_path}", *flags_of(corpus)])
        program.main()  # a SystemExit, of any code, fails
    assert signals, "never reached"
    step, _ = weights(tmp_path)
    expected = {"compiling": 0, "stepping": 13, "evaluating": 20, "saving": 14, "waiting for data": 16, "sampling": 40}
    assert step == expected[stage]
    assert ("finished 40 steps" if stage == "sampling" else f"stopped at step {step}") in capfd.readouterr().out
    monkeypatch.setattr(sys, "argv", ["train.py", f"--workdir={tmp_path}"])
    program.main()
    assert cases.read_metrics(tmp_path) == whole[0]
    assert weights(tmp_path) == whole[1]


def environment(tmp_path_factory):
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("cache")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    }
    return {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONWARNINGS": WARNINGS, **cache}


@pytest.mark.long
def test_killed_at_random_moments(corpus, tmp_path, tmp_path_factory):
    """SIGKILL, whatever the process is doing; started again, it ends as if it had never been killed, bit for bit."""
    variables, flags = environment(tmp_path_factory), flags_of(corpus, steps=100)
    begin = time.monotonic()
    code, _, err = finish(start([f"--workdir={tmp_path / 'whole'}", *flags], variables, tmp_path))
    assert code == 0, err
    length = time.monotonic() - begin
    draw, killed = random.Random(0), 0
    for _ in range(20 * KILLS):
        process = start([f"--workdir={tmp_path / 'run'}", *flags], variables, tmp_path)
        try:
            # From the very start to just before the end: among other things while importing, compiling and saving.
            process.wait(draw.uniform(0.1, 1.0) * length)
        except subprocess.TimeoutExpired:
            process.kill()
            killed += 1
        finish(process)
        if killed == KILLS:
            break
        if process.returncode == 0:  # it got to the end: the kill comes too late; begin another run
            shutil.rmtree(tmp_path / "run")
    code, out, err = finish(start([f"--workdir={tmp_path / 'run'}", *flags], variables, tmp_path))
    assert code == 0 and killed == KILLS, err
    assert cases.read_metrics(tmp_path / "run") == cases.read_metrics(tmp_path / "whole")
    assert cases.last_checkpoint(tmp_path / "run") == cases.last_checkpoint(tmp_path / "whole")
    # The ledger's parts, what was lost and the time between the processes add up to the clock on the wall.
    file, spent = tmp_path / "run" / "time.jsonl", read_ledger(tmp_path / "run")
    began = json.loads(file.read_text().splitlines()[0])["started"]
    assert sum(spent.seconds.values()) == pytest.approx(file.stat().st_mtime - began, rel=0.02)
    assert all(seconds >= -0.01 for seconds in spent.seconds.values()) and spent.seconds["steps"] > 0
    if "nothing to do" not in out:  # killed between its last checkpoint and its last line, a run has nothing left
        assert f"time        {spent.running:,.0f} s" in out


@pytest.mark.long
def test_a_full_disk_stops_the_run_with_the_last_checkpoint_whole(corpus, tmp_path, tmp_path_factory):
    """A tmpfs of 20 MB that fills up while the run is going: a message, a code, and a checkpoint to go on from."""
    disk, kept = tmp_path / "disk", tmp_path / "kept"
    disk.mkdir()
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("this system lets nobody but root mount a tmpfs (unshare -rm fails)")
    script = f"""
        mount -t tmpfs -o size=20m tmpfs {disk}
        {sys.executable} {Path(program.__file__)} --workdir={disk}/run "$@" 2> {tmp_path}/err > {tmp_path}/out & pid=$!
        until [ -e {disk}/run/checkpoints/7/sha256.json ]; do kill -0 $pid || break; sleep 0.02; done
        cat /dev/zero > {disk}/filler 2> /dev/null
        wait $pid; echo $? > {tmp_path}/code
        cp -r {disk}/run {kept}
    """
    arguments = ["unshare", "-rm", "bash", "-c", script, "bash", *flags_of(corpus, steps=100_000)]
    subprocess.run(arguments, env=environment(tmp_path_factory), cwd=tmp_path, check=True, timeout=120)
    error = ours((tmp_path / "err").read_text())
    assert (tmp_path / "code").read_text() == "1\n", error
    assert error.count("\n") == 1 and "No space left on device" in error, error
    step, _ = weights(kept)
    records = cases.read_metrics_of_a_torn_file(kept)
    assert step >= 7 and step % 7 == 0 and records[-1]["step"] <= step + 8
    sound = subprocess.run(
        [sys.executable, Path(program.__file__), f"--workdir={kept}", f"--config.run.steps={step + 3}"],
        env=environment(tmp_path_factory),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert sound.returncode == 0 and f"resumed at step {step}" in sound.stdout.replace("\n", " "), sound


def test_the_step_asks_nothing_of_the_host(corpus, tmp_path):
    """No callback in the compiled step, and nothing to transfer but what goes in and comes out."""
    run, _, _ = setup.prepare(cases.small_config(corpus), tmp_path, devices=jax.devices()[:1])
    run.checkpoints.close()
    text = run.train_step.as_text()
    for word in ("callback", "infeed", "outfeed", "send", "recv"):
        assert f" {word}" not in text and f"{word}(" not in text
    assert json.loads((tmp_path / "config.json").read_text())
