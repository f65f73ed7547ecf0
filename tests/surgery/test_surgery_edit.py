"""The program that writes a changed model as a new run."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx
from support import training_cases as cases

from deltaformer_jax import edit
from deltaformer_jax.config import Mixer, ModelConfig
from deltaformer_jax.config.mixer import NOT_ROTATED
from deltaformer_jax.config.saved import Saved
from deltaformer_jax.layers.mixers import MIXERS
from deltaformer_jax.layers.mixers.build import constructor_names
from deltaformer_jax.model import LanguageModel
from deltaformer_jax.surgery import remove_layers, rescale_rope
from deltaformer_jax.training.checkpoints.restore import restore

ELASTIC = dict(objective__name="elastic", objective__depths="2")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(the folder of a run of two steps, the model it restores to)."""
    folder = tmp_path_factory.mktemp("edit")
    config = cases.small_config(
        cases.make_corpus(folder), model__num_layers=3, run__steps=2, run__eval_every=0, **ELASTIC
    )
    cases.run_training(config, folder / "run")
    return folder / "run", restore(folder / "run")


def test_removing_layers(run, tmp_path, capsys):
    workdir, before = run
    edit.main(["--workdir", str(workdir), "--out", str(tmp_path / "out"), "remove_layers", "layers=0,2"])
    assert "remove_layers layers=0,2; 1 layers, " in capsys.readouterr().err
    after = restore(tmp_path / "out")
    config, params = remove_layers(before.config.model, before.params, [0, 2])
    jax.tree.map(np.testing.assert_array_equal, after.params, params)
    assert after.config.model.num_layers == config.num_layers == 1 and after.step == 0
    assert Saved.read(tmp_path / "out").config.objective.name == "language_model"  # a depth of 2 is not one of its


def test_another_rotary_embedding(run, tmp_path):
    workdir, before = run
    edit.main(["--workdir", str(workdir), "--out", str(tmp_path / "out"), "rescale_rope", "base=5e4", "scaling=ntk:2"])
    after = restore(tmp_path / "out")
    jax.tree.map(np.testing.assert_array_equal, after.params, before.params)
    expected = dataclasses.replace(before.config.model, rope_base=5e4, rope_scaling="ntk:2")
    assert after.config.model == expected and after.config.objective == before.config.objective


def test_every_layers_own_base_is_changed():
    model = ModelConfig(mixers=(Mixer("softmax_attention", rope_base=100.0), "delta_former"))
    config, _ = rescale_rope(model, {}, base=1e5)
    assert config.mixers == (Mixer("softmax_attention", rope_base=1e5), "delta_former") and config.rope_base == 1e5
    with pytest.raises(ValueError, match="base, scaling: give one of them"):
        rescale_rope(model, {})


def test_layers_that_are_not_rotated_stay_so():
    still = Mixer("softmax_attention", rope_base=0.0)
    config, _ = rescale_rope(ModelConfig(mixers=(still, "delta_former")), {}, base=1e5, scaling="ntk:2")
    assert config.mixers == (Mixer("softmax_attention", rope_base=0.0, rope_scaling="none"), "delta_former")
    assert (config.rope_base, config.rope_scaling) == (1e5, "ntk:2")
    turned = Mixer("softmax_attention", rope_base=100.0)
    config, _ = rescale_rope(ModelConfig(mixers=("delta_former", turned), rope_base=0.0), {}, scaling="ntk:2")
    assert config.mixers == ("delta_former", Mixer("softmax_attention", rope_base=100.0, rope_scaling="ntk:2"))
    assert (config.rope_base, config.rope_scaling) == (0.0, "none")
    LanguageModel(dataclasses.replace(config, vocab_size=8), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="rope_base: no layer of this model has a rotary embedding"):
        rescale_rope(ModelConfig(mixers=(still,), rope_base=0.0), {}, base=1e5)
    with pytest.raises(ValueError, match=r"rope_base: no layer .* has a rotary embedding \(its mixers: delta_net\)"):
        rescale_rope(ModelConfig(mixers=("delta_net",)), {}, base=1e5)
    assert set(NOT_ROTATED) == {name for name in MIXERS if "rope_base" not in constructor_names(name)}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["remove_layer"],
            "'remove_layer' is not an edit: give one of remove_layers, rescale_rope, merge_adapters; did",
        ),
        (["remove_layers"], "remove_layers: give layers=VALUE"),
        (["remove_layers", "layers=3"], "layers: 3 is not one of the model's 0 to 2"),
        (["remove_layers", "layers=0,1,2"], "layers=[0, 1, 2]: none would be left; give at most 2 of them"),
        (["remove_layers", "layers=one"], "remove_layers layers=one: give the numbers of layers"),
        (["remove_layers", "layers="], "remove_layers layers=: give the numbers of layers"),
        (["remove_layers", "layer=1"], "remove_layers layer=1: is not an option of it: layers=VALUE; did you mean"),
        (["rescale_rope", "base=1e5", "base=2e5"], "rescale_rope base=2e5: base is given twice"),
        (["rescale_rope", "base=0.5"], "base=0.5: must be greater than 1"),
        (["rescale_rope", "base=0"], "base=0: must be greater than 1"),
        (["rescale_rope", "scaling=twice"], "model.rope_scaling = 'twice': must be none or one of"),
        (["merge_adapters"], "has no adapters (optimizer.lora_rank = 0)"),
    ],
)
def test_wrong_input_is_one_line_and_nothing_is_written(run, tmp_path, arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        edit.main(["--workdir", str(run[0]), "--out", str(tmp_path / "out"), *arguments])
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.endswith(" ...")]
    assert stop.value.code == 2 and len(lines) == 1 and message in lines[0], lines
    assert not (tmp_path / "out").exists()
