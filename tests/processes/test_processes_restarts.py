"""Whole runs that go on with other numbers of devices and processes: a ledger of record numbers, and the losses."""

import contextlib
import functools
import json

import numpy as np
import pytest
from support import training_cases as cases
from support.processes import ledger_config
from support.processes.several import Several, environment
from support.program_run import SMALL, finish, start

from deltaformer_jax.data import load_data
from deltaformer_jax.data.batches import _packing
from deltaformer_jax.training import position

pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
BATCH, LENGTH, STEPS = 8, 32, 12


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpora")
    one = cases.make_corpus(folder / "one")
    other = cases.make_corpus(folder / "other", words=("other", "words", "in", "here"))
    return f"{one}=2,{other}=1"


@pytest.fixture(scope="module", autouse=True)
def compile_once(tmp_path_factory):
    yield from cases.compile_once(tmp_path_factory.mktemp("compiled"))


def record_numbers(path, found, seed=0):
    """`found`, hashes of rows, as the numbers of these rows in the order of a run that is never stopped."""
    rows = _packing(load_data(path), "train", LENGTH, seed).rows(np.arange(BATCH * STEPS))
    numbers = {ledger_config.content(rows, row): row for row in range(BATCH * STEPS)}
    assert len(numbers) == BATCH * STEPS  # no two rows are alike
    return [numbers[one] for one in found]


def losses(workdir):
    return {record["step"]: record["loss"] for record in cases.read_metrics(workdir) if "loss" in record}


def assert_losses(found, expected):
    """float32 sums over other groups of devices: 2^-24 relative for each of some ten roundings in a row, and as much
    again in each of 12 updates, which Adam's division by a gradient's own size may amplify by 10: below 1e-4."""
    assert found.keys() == expected.keys()
    np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=1e-4)


# What a mixture does each of its corpora does alone: that is tried on demand.
@pytest.mark.parametrize(
    "packing", [pytest.param("one corpus", marks=pytest.mark.rare), pytest.param("a mixture", marks=pytest.mark.long)]
)
def test_on_8_4_2_and_8_devices(packing, mixture, tmp_path, monkeypatch):
    """Stopped twice, and then killed two steps after the checkpoint: these are made again, the others once."""
    path, noted = mixture if packing == "a mixture" else mixture.split("=")[0], []

    def to_devices(batch, sharding, rows=None):
        noted.extend(ledger_config.content(batch, row) for row in range(BATCH))
        return ledger_config.really(batch, sharding, rows)

    monkeypatch.setattr(position, "to_devices", to_devices)
    config = cases.small_config(path, run__eval_every=0, run__checkpoint_every=0, mesh__fsdp=4)
    cases.run_training(config, tmp_path / "whole", devices=8)
    assert record_numbers(path, noted) == list(range(BATCH * STEPS))
    noted.clear()
    for devices, fsdp, end, step in ((8, 4, cases.StopAt, 3), (4, 1, cases.StopAt, 6), (2, 2, cases.DieAt, 8)):
        config.mesh.fsdp = fsdp
        dies = pytest.raises(cases.ProcessDied) if end is cases.DieAt else contextlib.nullcontext()
        with dies:
            cases.run_training(config, tmp_path / "run", functools.partial(end, step=step), devices)
        assert len(noted) == step * BATCH
    del noted[6 * BATCH :]
    config.mesh.fsdp = 4
    cases.run_training(config, tmp_path / "run", devices=8)
    assert record_numbers(path, noted) == list(range(BATCH * STEPS))
    assert_losses(losses(tmp_path / "run"), losses(tmp_path / "whole"))


@pytest.mark.rare  # four starts of four processes
def test_by_4_2_and_4_processes(mixture, tmp_path):
    flags = [f"--config={ledger_config.__file__}", f"--config.data.path={mixture}", "--config.run.log_every=1"]
    flags += [*SMALL, "--config.run.sample_prompt="]
    flags += [f"--config.data.sequence_length={LENGTH}", f"--config.data.batch_size={BATCH}"]

    def ledger(name):
        (tmp_path / name).mkdir()
        return {"LEDGER": str(tmp_path / name)}

    whole = [*flags, f"--workdir={tmp_path / 'whole'}", f"--config.run.steps={STEPS}"]
    code, _, err = finish(start(whole, environment(4, **ledger("alone")), tmp_path))
    assert code == 0, err
    found = []
    for count, devices, steps in ((4, 1, 4), (2, 2, 8), (4, 1, STEPS)):
        more = [*flags, f"--workdir={tmp_path / 'run'}", f"--config.run.steps={steps}", "--config.mesh.fsdp=4"]
        with Several(count, more, tmp_path, devices, variables=ledger(str(steps))) as run:
            outcomes = run.finish()
        assert [code for code, _, _ in outcomes] == [0] * count, outcomes
        parts = [(tmp_path / str(steps) / f"{index}.jsonl").read_text().splitlines() for index in range(count)]
        assert [len(part) for part in parts] == [4] * count
        found += [row for step in zip(*parts) for part in step for row in json.loads(part)]
    assert record_numbers(mixture, found) == list(range(BATCH * STEPS))
    assert_losses(losses(tmp_path / "run"), losses(tmp_path / "whole"))
