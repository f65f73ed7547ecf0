"""Run folders of commit 3828740 (tests/fixtures/run_3828740), before the house was built: they restore and go on."""

import json
import re
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from deltaformer_jax import train
from deltaformer_jax.training.checkpoints.restore import restore

FIXTURES = Path(__file__).parents[1] / "fixtures" / "run_3828740"


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_mixers_parameters_are_restored(tmp_path):
    """Under the names that they had: orbax finds them by name, and the checkpoint's own list of them is compared."""
    shutil.copytree(FIXTURES / "every_mixer", tmp_path / "run")
    run = restore(tmp_path / "run")
    assert run.step == 4 and len(run.config.model.mixers) == 10
    assert sum(leaf.size for leaf in jax.tree.leaves(run.params)) == 18_843
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(run.params))


def test_the_page_on_checkpoints_reads_one(tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "checkpoints.md").read_text(encoding="utf-8")
    whole, parameters = re.findall(r"^``` python\n(.*?)^```", page, re.M | re.S)
    shutil.copytree(FIXTURES / "goes_on", tmp_path / "run")
    names = {"tokens": np.ones((1, 5), np.int32)}
    exec(whole.replace("runs/first", str(tmp_path / "run")), names)
    assert names["run"].step == 4 and names["logits"].shape[:2] == (1, 5)
    *lines, last = parameters.rstrip().replace("/absolute/path/runs/first", str(tmp_path / "run")).splitlines()
    exec("\n".join(lines).replace("checkpoints/500", "checkpoints/4"), names)
    table = eval(last, names)["embedding"]["table"]
    np.testing.assert_array_equal(table, names["run"].params["embedding"]["table"])


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
def test_a_run_goes_on_as_it_would_have(tmp_path, monkeypatch):
    shutil.copytree(FIXTURES / "goes_on", tmp_path / "run")
    flags = ["--config.run.steps=8", "--config.mesh.data=4", "--config.mesh.tensor=2"]  # the tests' eight devices
    monkeypatch.setattr(sys, "argv", ["train.py", "--workdir", str(tmp_path / "run"), *flags])
    train.main()
    made = records(tmp_path / "run" / "metrics.jsonl")
    kept, expected = records(FIXTURES / "goes_on" / "metrics.jsonl"), records(FIXTURES / "going_on.jsonl")
    assert made[: len(kept)] == kept
    assert [record["step"] for record in made[len(kept) :]] == [record["step"] for record in expected]
    for record, same in zip(made[len(kept) :], expected):
        for name in same.keys() - {"tokens_per_second"}:
            # float32, by another compiler's order of sums at most: four updates of a loss of about 2.
            assert record[name] == pytest.approx(same[name], rel=1e-4), name
