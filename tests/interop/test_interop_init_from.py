"""`run.init_from`: a run that starts from weights, with another schedule, context and rope base."""

from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from support import training_cases as cases

from deltaformer_jax import LanguageModel, convert
from deltaformer_jax.config.command_line import parse
from deltaformer_jax.config.files import config_folder
from deltaformer_jax.data.tokenizer import TaskVocabulary
from deltaformer_jax.interop import load_pretrained, save_pretrained
from deltaformer_jax.model_parts import params_of
from deltaformer_jax.sharding.mesh import make_mesh
from deltaformer_jax.training.checkpoints.initial import check_same_model
from deltaformer_jax.training.checkpoints.restore import restore
from deltaformer_jax.training.dry_run import dry_run
from deltaformer_jax.training.program import Program
from deltaformer_jax.training.setup import prepare

pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
TINY = str(config_folder() / "tiny.py")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return cases.make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def first(corpus, tmp_path_factory):
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    cases.run_training(cases.small_config(corpus), folder)
    return folder


def start(flags, workdir):
    command = parse(["train.py", "--workdir", str(workdir), *flags], TINY)
    prepared = prepare(command.config, workdir)
    prepared.run.checkpoints.close()
    return command.config, prepared


def same(tree, other):
    for x, y in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(x, y)


def test_from_a_run(first, tmp_path):
    before = restore(first)
    flags = [f"--config.run.init_from={first}", "--config.model.rope_base=100000.0"]
    config, prepared = start([*flags, "--config.data.sequence_length=32"], tmp_path / "second")
    assert config.model.rope_base == 100_000 and config.model.d_model == before.config.model.d_model
    same(prepared.state.params, before.params)
    assert int(prepared.state.step) == 0 and not any(np.any(x) for x in jax.tree.leaves(prepared.state.opt_state))


def test_from_a_folder(first, corpus, tmp_path):
    config = restore(first).config.model
    model = LanguageModel(config, rngs=nnx.Rngs(3))
    save_pretrained(model, config, tmp_path / "out", tokenizer=first / "tokenizer.json")
    flags = [f"--config.run.init_from={tmp_path / 'out'}", f"--config.data.path={corpus}"]
    _, prepared = start(flags, tmp_path / "second")
    same(prepared.state.params, params_of(load_pretrained(tmp_path / "out")[0]))
    convert.main([str(tmp_path / "out"), "--workdir", str(tmp_path / "run")])
    with pytest.raises(
        ValueError, match=r"was converted from .*; start a run from it in another folder, --config\.run"
    ):
        start([f"--config.data.path={corpus}"], tmp_path / "run")


def test_another_model_and_another_tokenizer_are_refused(first, corpus, tmp_path):
    flags = [f"--config.run.init_from={first}"]
    with pytest.raises(ValueError, match=r"run\.init_from.*not the same model: .*mlp\.gate: \[.*\] there, \[.*\] here"):
        start([*flags, "--config.model.mlp_dim=40"], tmp_path / "second")
    assert not (tmp_path / "second").exists()
    other = parse(["train.py", "--dry_run", *flags, "--config.model.mlp_dim=40"], TINY).config
    with pytest.raises(ValueError, match=r"run\.init_from.*not the same model: .*mlp\.gate: \[.*\] there, \[.*\] here"):
        dry_run(other)
    config = restore(first).config.model
    (tmp_path / "other.json").write_text(TaskVocabulary(config.vocab_size).file_text)
    model = LanguageModel(config, rngs=nnx.Rngs(0))
    save_pretrained(model, config, tmp_path / "out", tokenizer=tmp_path / "other.json")
    flags = [f"--config.run.init_from={tmp_path / 'out'}", f"--config.data.path={corpus}"]
    config = parse(["train.py", *flags], TINY).config
    check_same_model(Program(config, make_mesh(config.mesh)), str(tmp_path / "out"))
    with pytest.raises(ValueError, match=r"another tokenizer than data\.path has; prepare the data with --tokenizer"):
        start(flags, tmp_path / "third")


def test_what_is_no_folder_of_weights_names_the_field(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "gpt2"}')
    cases = [
        ("nowhere", "'nowhere': no such folder; give the folder of a run, or one with config.json and safetensors$"),
        ("Qwen/Qwen3-0.6B", r"no such folder; .*not downloaded here: hf download Qwen/Qwen3-0\.6B --local-dir FOLDER$"),
        (tmp_path / "empty", r"empty': the folder has no config\.json; give"),
        (tmp_path / "file", "file': is a file; give"),
    ]
    for value, message in cases:
        for more in ([], ["--workdir", str(tmp_path / "new")], ["--config", TINY]):
            with pytest.raises(OSError, match=f"^run.init_from = .*{message}"):
                parse(["train.py", f"--config.run.init_from={value}", *more], TINY)
    with pytest.raises(ValueError, match=r"^run\.init_from = .*other': /.*config\.json: .*gpt2") as caught:
        parse(["train.py", f"--config.run.init_from={tmp_path / 'other'}"], TINY)
    assert "\n" not in str(caught.value)


def test_a_given_field_holds_where_a_hybrids_entries_have_their_own(tmp_path):
    folder = Path(__file__).parents[1] / "fixtures" / "pretrained" / "hf_qwen3_5"
    flags = [f"--config.run.init_from={folder}", "--config.model.rope_base=5000000", "--config.model.window=16"]
    parsed = lambda flags: [dict(m.overrides) for m in parse(["train.py", *flags], TINY).config.model.mixers]
    before, after = parsed(flags[:1]), parsed(flags)
    assert after == [one | ({"rope_base": 5_000_000.0} if "rope_base" in one else {}) for one in before] != before
    # Heads of all layers, with which the shapes are not the folder's: refused later, by name.
    assert {one["num_heads"] for one in parsed([*flags, "--config.model.num_heads=8"])} == {8}
