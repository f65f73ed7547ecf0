"""The dry run: its numbers are those of the run, and it makes nothing, not even the default corpus."""

import os
import re
from pathlib import Path

import jax
import pytest
from support import training_cases as cases
from support.program_run import finish, start

from deltaformer_jax.config import DataConfig
from deltaformer_jax.training.dry_run import dry_run
from deltaformer_jax.training.setup import prepare

ROOT = Path(__file__).parents[2]
DELTAFORMER_340M = (ROOT / "configs" / "deltaformer_340m.py").read_text(encoding="utf-8")


@pytest.fixture
def corpus(tmp_path):
    return cases.make_corpus(tmp_path / "corpus")


def numbers(text, label):
    line = next(line for line in text.splitlines() if line.strip().startswith(label))
    return line.strip()[len(label) :].strip()


def test_its_numbers_are_the_runs(corpus, tmp_path, capsys):
    config = cases.small_config(corpus, mesh__data=2, mesh__fsdp=4, optimizer__accumulation_steps=1)
    dry_run(config)
    text = capsys.readouterr().out
    run, _, state = prepare(config, tmp_path / "run")
    count = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    assert numbers(text, "parameters") == f"{count:,}"
    on_one = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state.params))
    moments = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state.opt_state))
    run.checkpoints.close()
    tail = text[text.index("memory of the compiled step") :]
    assert numbers(tail, "parameters") == f"{on_one / 1024:.4g} KiB"
    assert numbers(tail, "optimiser") == f"{moments / 1024:.4g} KiB"
    assert "8 x 32 = 256 tokens per step, in 1 part(s)" in text
    assert numbers(text, "run").startswith("12 steps, 3,072 tokens, ")


def test_nothing_is_made(tmp_path, monkeypatch, capsys):
    """No array on a device, no file, and no standard library read for a vocabulary that the setting tells.

    A run with a checkpoint of its own does not read run.init_from, which may be gone, or have other layers.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    before = {id(array) for array in jax.live_arrays()}
    config = cases.small_config("", run__init_from="gone")
    for tokenizer, rows in (("bytes", 257), ("bpe:300", 300)):
        config.data = DataConfig(tokenizer=tokenizer, sequence_length=32, batch_size=8)
        dry_run(config, begun=True)
        assert f"embedding.table {rows + -rows % 128} x 32" in " ".join(capsys.readouterr().out.split())
    assert {id(array) for array in jax.live_arrays()} <= before
    assert not list(tmp_path.iterdir())


def test_errors(tmp_path):
    config = cases.small_config(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="none: no such folder"):
        dry_run(config)
    config.data = DataConfig(tokenizer="nothing.json")
    with pytest.raises(FileNotFoundError, match=r"nothing\.json: no such tokenizer"):
        dry_run(config)
    config.data = DataConfig(batch_size=7)
    with pytest.raises(ValueError, match=r"data\.batch_size = 7"):
        dry_run(config)


def table():
    """{config: (GiB together, GiB of state)}, of docs/performance.md."""
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w/]+_340m)` \| ([\d.]+) \| ([\d.]+) \|$", page, re.M)
    return {name: (float(together), float(state)) for name, together, state in rows}


def test_every_large_config_is_in_the_table():
    configs = ROOT / "configs"
    names = [path.relative_to(configs).with_suffix("").as_posix() for path in configs.rglob("*_340m.py")]
    assert sorted(table()) == sorted(names)
    said = re.search(
        r"needs\s+([\d.]+)\s+GiB\s+on\s+each,\s+([\d.]+)\s+GiB\s+of\s+which\s+are\s+the\s+state", DELTAFORMER_340M
    )
    assert tuple(map(float, said.groups())) == table()["deltaformer_340m"]
    elsewhere = [path.name for path in (ROOT / "configs").rglob("*.py") if "GiB" in path.read_text(encoding="utf-8")]
    assert elsewhere == ["deltaformer_340m.py"]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.long if name == "deltaformer_340m" else pytest.mark.rare)
        for name in table()
    ],
)
def test_the_table_is_what_the_command_prints(name, tmp_path):
    """Without these tests' XLA_FLAGS, by which programs take other memory."""
    others = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    environment = {**others, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8"}
    code, out, err = finish(start(["--config", name, "--dry_run"], environment, tmp_path), timeout=600)
    assert code == 0, err
    printed = [float(numbers(out, label).split()[0]) for label in ("in all", "state and batch")]
    # Rounded in the table; another version of XLA keeps a little more or less.
    assert table()[name] == pytest.approx(printed, rel=0.03, abs=0.051)
