"""The order in which layers are spared, and the program that removes them."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from support import training_cases as cases

from deltaformer_jax import prune
from deltaformer_jax.config.saved import Saved
from deltaformer_jax.data import batches, load_data
from deltaformer_jax.model_parts import merge, model_parts
from deltaformer_jax.sample import __main__ as sample
from deltaformer_jax.surgery import losses, measure, ranking, remove_layers
from deltaformer_jax.surgery.rankings import RANKINGS
from deltaformer_jax.training.checkpoints.restore import restore
from deltaformer_jax.training.loss import batch_nats, counted

LAYERS = 3


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(the folder of a run of a few steps, the model it restores to, some batches of its evaluation data)."""
    folder = tmp_path_factory.mktemp("prune")
    corpus = cases.make_corpus(folder)
    config = cases.small_config(corpus, model__num_layers=LAYERS, run__steps=4)
    cases.run_training(config, folder / "run")
    restored = restore(folder / "run")
    rows = list(batches(load_data(str(corpus)), "eval", sequence_length=32, batch_size=8, seed=0))
    return folder / "run", restored, rows


def mean_nats(config, params, rows):
    parts = model_parts(config)
    nats = [np.asarray(batch_nats(parts.graphdef, params, row), np.float64).sum() for row in rows]
    return sum(nats) / sum(int(np.sum(counted(row))) for row in rows)


def test_rankings():
    values = {"bi": np.array([0.3, 0.1, 0.2]), "relative_magnitude": np.array([1.0, 1.0, 0.5]), "loss": np.zeros(3)}
    orders = {name: ranking(values, name, 3) for name in ("bi", "relative_magnitude", "loss", "reverse", "sequential")}
    assert orders == {
        "bi": [1, 2, 0],
        "relative_magnitude": [2, 0, 1],
        "loss": [0, 1, 2],
        "reverse": [2, 1, 0],
        "sequential": [0, 1, 2],
    }
    assert prune.METRICS == RANKINGS  # the program says them before it imports jax
    with pytest.raises(ValueError, match="name='BI': give one of bi, "):
        ranking(values, "BI", 3)


def test_losses_are_those_of_the_models_without_the_layers(run):
    _, restored, rows = run
    model = merge(restored.program.parts, restored.params)
    rows = [{name: jnp.asarray(x) for name, x in row.items()} for row in rows]
    values = measure(model, rows, ("loss", "bi"))
    assert list(values) == ["loss", "bi"] and values["bi"].shape == (LAYERS,)
    for layer in (0, 2):
        config, params = remove_layers(restored.config.model, restored.params, [layer])
        np.testing.assert_allclose(values["loss"][layer], mean_nats(config, params, rows), rtol=1e-6)
    whole = losses(model, rows, np.ones((1, LAYERS), bool))
    np.testing.assert_allclose(whole[0], mean_nats(restored.config.model, restored.params, rows), rtol=1e-6)
    with pytest.raises(ValueError, match="no token whose loss is counted"):
        losses(model, [], np.ones((1, LAYERS), bool))


def test_prune(run, tmp_path, capsys):
    """What is printed, and a folder that the other programs read; training goes on in it with the same data."""
    workdir, _, _ = run
    prune.main(["--workdir", str(workdir)])
    said = capsys.readouterr()
    measured = json.loads(said.out)
    assert set(measured) == {"step", "bi", "relative_magnitude"} and "layer" in said.err
    out = tmp_path / "pruned"
    prune.main(["--workdir", str(workdir), "--layers", "1", "--out", str(out), "--metric", "loss"])
    said = capsys.readouterr()
    done = json.loads(said.out)
    assert done["removed"] == [int(np.argmin(done["loss"]))] and done["step"] == 4
    assert done["loss_after"] == pytest.approx(min(done["loss"]), rel=1e-6)
    assert f"without layers {done['removed'][0]}: loss {done['loss_before']:.4f} -> " in said.err
    assert Saved.read(out).config.model.num_layers == LAYERS - 1
    sample.main(["--workdir", str(out), "--prompt", "def ", "--tokens", "2"])
    assert capsys.readouterr().out.startswith("def ")
    cases.run_training(Saved.read(out).config, out)
    assert [record["step"] for record in cases.read_metrics(out)][-1] == 4


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--layers", "1"], "--layers N and --out DIR2: give both"),
        (["--layers", "3", "--out", "x"], "--layers 3: the model has 3 layers; give 1 to 2"),
        (["--batches", "0"], "--batches 0: give 1 or more"),
        (["--layers", "1", "--out", "{workdir}"], "is not empty; give a new folder"),
        (["--data", "nowhere"], "--data nowhere: no such file or folder"),
        (["--step", "3"], "--step 3: no such checkpoint"),
    ],
)
def test_wrong_flags_are_one_line(run, flags, message, capsys):
    workdir = str(run[0])
    with pytest.raises(SystemExit) as stop:
        prune.main(["--workdir", workdir, *(flag.format(workdir=workdir) for flag in flags)])
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.endswith(" ...")]
    assert stop.value.code == 2 and message in lines[-1], lines
