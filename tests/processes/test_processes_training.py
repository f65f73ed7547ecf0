"""Two and four real processes over loopback: they train as one does, and stop and go on together."""

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
from support.processes.several import FLAGS, Several, environment, free_port
from support.program_run import finish, ours, start

from deltaformer_jax.training.checkpoints.restore import restore

pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return f"--config.data.path={cases.make_corpus(tmp_path_factory.mktemp('corpus'))}"


@pytest.fixture(scope="module")
def alone(corpus, tmp_path_factory):
    """The records of a run of one process with four devices."""
    folder = tmp_path_factory.mktemp("alone")
    flags = [*FLAGS, corpus, f"--workdir={folder / 'run'}", "--config.run.steps=12"]
    code, out, err = finish(start(flags, environment(4), folder))
    assert code == 0 and "processes" not in out, err
    return cases.read_metrics(folder / "run")


def assert_same_losses(records, expected):
    assert [set(record) for record in records] == [set(record) for record in expected]
    for record, other in zip(records, expected, strict=True):
        for name, value in record.items():
            # The same sums over other groups of devices: float32 rounds them elsewhere.
            np.testing.assert_allclose(value, other[name], rtol=1e-4, err_msg=name)


MESHES = {
    "rows over hosts": (2, 2, ("--config.mesh.data=4",)),
    "parameters over hosts": (2, 2, ("--config.mesh.fsdp=4",)),
    # Every process needs every row: the shards of one row lie on both.
    "heads over hosts": (2, 1, ("--config.mesh.tensor=2",)),
    # Every process needs every row here too, of which it computes a part of the tokens.
    "tokens over hosts, by heads": (2, 1, ("--config.mesh.context=2",)),
    "tokens over four hosts, by the chain": (
        4,
        1,
        ("--config.mesh.context=4", "--config.model.implementation=chunked"),
    ),
    "parameters and tokens over hosts": (2, 2, ("--config.mesh.fsdp=2", "--config.mesh.context=2")),
    "four hosts, heads over pairs of them": (4, 1, ("--config.mesh.fsdp=2", "--config.mesh.tensor=2")),
}


# In each run of the tests, in the long ones, and on demand.
WHEN = {
    "parameters over hosts": [],
    "four hosts, heads over pairs of them": pytest.mark.long,
    "tokens over hosts, by heads": pytest.mark.long,
}


@pytest.mark.parametrize("case", [pytest.param(name, marks=WHEN.get(name, pytest.mark.rare)) for name in MESHES])
def test_they_train_as_one_process_does(case, corpus, alone, tmp_path):
    count, devices, mesh = MESHES[case]
    corpus = corpus.replace("path=", "path=file://")  # as of an object store: each reads what its rows need
    with Several(
        count, [corpus, f"--workdir={tmp_path / 'run'}", "--config.run.steps=12", *mesh], tmp_path, devices
    ) as run:
        outcomes = run.finish()
    for index, (code, out, err) in enumerate(outcomes):
        assert (code, err) == (0, ""), (index, out, err)
        assert f"{count} processes, this is {index}, coordinator 127.0.0.1:" in out and ", from flags" in out
        assert ("finished 12 steps" in out) == (index == 0)  # one speaks for all
    # One writer: every step and every evaluation is there once.
    assert_same_losses(cases.read_metrics(tmp_path / "run"), alone)
    assert {path.name for path in (tmp_path / "run").iterdir()} == cases.FILES


@pytest.mark.parametrize("asked", [pytest.param(0, marks=pytest.mark.long), 1])
def test_a_signal_to_one_stops_all_with_the_state_saved(asked, corpus, tmp_path):
    """What was trained is all there, and saved whole."""
    workdir = tmp_path / "run"
    flags = [corpus, f"--workdir={workdir}", "--config.run.steps=100000", "--config.mesh.fsdp=4"]
    with Several(2, flags, tmp_path, by_variables=asked == 0) as run:
        run.wait_for_step(workdir, 9)
        run.processes[asked].send_signal(signal.SIGTERM)
        outcomes = run.finish()
    for index, (code, out, err) in enumerate(outcomes):
        assert code == 0, (index, out, err)
        assert ("finishing this step" in err) == (index == asked) and "Traceback" not in err
    step = int(outcomes[0][1].split("stopped at step ")[1].split()[0])
    records = cases.read_metrics(workdir)
    assert [record["step"] for record in records if "loss" in record] == list(range(1, step + 1))
    assert json.loads((workdir / "checkpoints" / str(step) / "sha256.json").read_text())


@pytest.mark.long
def test_what_differs_is_refused_by_all_before_anything_is_written(corpus, tmp_path):
    other = cases.make_corpus(tmp_path / "other", words=("other", "words"))
    for flag, words in (
        ("--config.optimizer.learning_rate=0.1", "optimizer.learning_rate = '0.1' in process 1, '0.0"),
        (f"--config.data.path={other}", "hash of the data = "),
    ):
        with Several(2, [corpus, f"--workdir={tmp_path / 'run'}"], tmp_path, each={1: [flag]}) as run:
            outcomes = run.finish()
        for code, _, err in outcomes:
            assert code == 2 and err.count("\n") == 1 and words in err, err
        assert not (tmp_path / "run").exists()


def final(workdir):
    """(the records, the last step, its weights as bytes)."""
    run = restore(workdir)
    return cases.read_metrics(workdir), run.step, [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(run.params)]


def kill_at_random_moments(kills, corpus, folder):
    """One of two processes is killed, all are started again, and so on; then the run ends like one left alone."""
    flags = [corpus, "--config.run.steps=60", "--config.mesh.fsdp=4"]
    with Several(2, [*flags, f"--workdir={folder / 'whole'}"], folder) as run:
        run.wait_for_line("new run in")
        begin = time.monotonic()
        assert [code for code, _, _ in run.finish()] == [0, 0]
        length = time.monotonic() - begin
    draw, workdir, killed, said = random.Random(0), folder / "run", 0, set()
    while killed < kills:
        saved = max(
            (int(path.name) for path in (workdir / "checkpoints").glob("[0-9]*") if path.name.isdigit()), default=0
        )
        if saved > 45:  # what is left takes less time than a start
            shutil.rmtree(workdir)
            saved = 0
        with Several(2, [*flags, f"--workdir={workdir}"], folder) as run:
            run.wait_for_line(" run in")
            victim, child = draw.randrange(2), None
            time.sleep(draw.uniform(0.0, 0.9) * length * (1 - saved / 60))
            child = run.child(victim)
            if child is not None:
                os.kill(child, signal.SIGKILL)
                begin = time.monotonic()
            outcomes = run.finish()
        if child is None or outcomes[victim][0] == 0:  # it got to the end: the kill came too late; begin another run
            shutil.rmtree(workdir)
            continue
        killed += 1
        assert time.monotonic() - begin < 30
        for index, (code, _, err) in enumerate(outcomes):
            assert code == (128 + signal.SIGKILL if index == victim else 1), (code, err)
            assert err.count("\n") == 1 and f"process {victim} on " in err and "was killed by SIGKILL" in err, err
        said.add((workdir / "stacks" / f"process-{1 - victim}.txt").read_text() != "")
    with Several(2, [*flags, f"--workdir={workdir}"], folder) as run:
        assert [code for code, _, _ in run.finish()] == [0, 0]
    assert said == {True}
    assert final(workdir) == final(folder / "whole")


@pytest.mark.rare
def test_killed_at_two_random_moments(corpus, tmp_path):
    kill_at_random_moments(2, corpus, tmp_path)


@pytest.mark.rare
def test_killed_at_ten_random_moments(corpus, tmp_path):
    kill_at_random_moments(10, corpus, tmp_path)


@pytest.mark.long
def test_damage_that_one_process_finds_is_everybodys(corpus, tmp_path):
    """Each reads its own files of a checkpoint: whoever finds the damage, all go back to the step before."""
    workdir = tmp_path / "run"
    flags = [corpus, f"--workdir={workdir}", "--config.mesh.fsdp=4"]
    with Several(2, [*flags, "--config.run.steps=14"], tmp_path) as run:
        assert [code for code, _, _ in run.finish()] == [0, 0]
    # Each process reads the arrays that it wrote.
    (damaged, *_) = (workdir / "checkpoints" / "14" / "state" / "ocdbt.process_1" / "d").iterdir()
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\xff")
    with Several(2, [*flags, "--config.run.steps=16"], tmp_path) as run:
        outcomes = run.finish()
    for code, _, err in outcomes:
        assert code == 0 and err == "", err
    assert f"damaged, not used: {damaged}" in outcomes[0][1] and "going back to step 7" in outcomes[0][1]
    records = cases.read_metrics(workdir)
    assert [record["step"] for record in records if "loss" in record] == list(range(1, 17))


@pytest.mark.long
def test_bad_batches_are_gone_back_from_together(corpus, tmp_path):
    """A guard so tight that it skips: all go back at the same step, and stop with the same line."""
    workdir = tmp_path / "run"
    tight = ["--config.optimizer.skip_deviations=0.0001", "--config.optimizer.rollback_after=2"]
    tight += ["--config.optimizer.learning_rate=1", "--config.optimizer.warmup_steps=20"]  # gradients that grow
    tight += ["--config.run.steps=100", "--config.run.eval_every=0"]
    flags = [
        corpus,
        f"--workdir={workdir}",
        "--config.mesh.fsdp=4",
        "--config.run.steps=100",
        "--config.run.eval_every=0",
        *tight,
    ]
    with Several(2, flags, tmp_path) as run:
        outcomes = run.finish()
    assert [code for code, _, _ in outcomes] == [1, 1], outcomes
    assert "going back to step" in outcomes[0][1]
    assert any("again after going back 3 times" in err for _, _, err in outcomes)
    assert all("Traceback" not in err for _, _, err in outcomes)


@pytest.mark.long
def test_one_process_that_can_not_save_ends_all(corpus, tmp_path):
    """A folder of the checkpoint that can not be written to, as on a full disk: one line each, and the step before."""
    disk, kept = tmp_path / "disk", tmp_path / "kept"
    disk.mkdir()
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("this system lets nobody but root mount a tmpfs (unshare -rm fails)")
    port = free_port()
    program = str(Path(__file__).parents[2] / "train.py")
    script = f"""
        mount -t tmpfs -o size=20m tmpfs {disk}
        for i in 0 1; do
            {sys.executable} {program} --workdir={disk}/run --process=$i "$@" 2> {tmp_path}/err$i > {tmp_path}/out$i &
            pids[$i]=$!
        done
        until [ -e {disk}/run/checkpoints/7/sha256.json ]; do kill -0 ${{pids[0]}} || break; sleep 0.02; done
        cat /dev/zero > {disk}/filler 2> /dev/null
        for i in 0 1; do wait ${{pids[$i]}}; echo $? > {tmp_path}/code$i; done
        rm {disk}/filler
        cp -r {disk}/run {kept}
    """
    flags = [*FLAGS, corpus, "--config.run.steps=100000", f"--coordinator=127.0.0.1:{port}", "--processes=2"]
    arguments = ["unshare", "-rm", "bash", "-c", script, "bash", *flags]
    subprocess.run(arguments, env=environment(2), cwd=tmp_path, check=True, timeout=400)
    errors = [ours((tmp_path / f"err{index}").read_text()) for index in range(2)]
    assert [(tmp_path / f"code{index}").read_text() for index in range(2)] == ["1\n", "1\n"], errors
    assert all(error.count("\n") == 1 and "No space left on device" in error for error in errors), errors
    with Several(2, [f"--workdir={kept}", "--config.run.steps=9"], tmp_path) as run:
        _, out, err = run.finish()[0]
    assert "resumed at step 7" in out or "has made" in err, (out, err)
