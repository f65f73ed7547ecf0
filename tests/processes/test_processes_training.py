"""Two and four real processes over loopback: they train as one does, and stop and go on together."""

import json
import signal

import numpy as np
import pytest
from support import training_cases as cases
from support.program_run import finish, start
from support.several import FLAGS, Several, environment

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
    "four hosts, heads over pairs of them": (4, 1, ("--config.mesh.fsdp=2", "--config.mesh.tensor=2")),
}


@pytest.mark.parametrize(
    "case", [pytest.param(name, marks=[] if name == "parameters over hosts" else pytest.mark.long) for name in MESHES]
)
def test_they_train_as_one_process_does(case, corpus, alone, tmp_path):
    count, devices, mesh = MESHES[case]
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
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        *("checkpoints", "config.json", "metrics.jsonl", "tokenizer.json")
    }


@pytest.mark.parametrize("asked", [pytest.param(0, marks=pytest.mark.long), 1])
def test_a_signal_to_one_stops_all_with_the_state_saved(asked, corpus, tmp_path):
    """Then the run goes on as if nothing had been, bit for bit, and on one process."""
    workdir = tmp_path / "run"
    flags = [corpus, f"--workdir={workdir}", "--config.run.steps=100000", "--config.mesh.fsdp=4"]
    with Several(2, flags, tmp_path) as run:
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
