"""Separators as characters: their tokens are found once, in the tokenizer, by every program that fills in a config."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from support import training_cases as cases

from deltaformer_jax.config import MeshConfig, Mixer
from deltaformer_jax.config.checks import check
from deltaformer_jax.data.tokenizer import ByteTokenizer, train_bpe
from deltaformer_jax.model_parts import merge
from deltaformer_jax.sharding.mesh import batch_sharding, make_mesh
from deltaformer_jax.training.checkpoints.restore import restore
from deltaformer_jax.training.checkpoints.vocabulary import separator_tokens, with_vocabulary
from deltaformer_jax.training.dry_run import with_any_vocabulary
from deltaformer_jax.training.objectives.teacher_model import check_same_architecture, teacher_model
from deltaformer_jax.training.program import Program

SEES = dict(model__window=4, model__initial_tokens=1, model__separators="\n :")


def test_tokens_that_consist_of_separators_alone():
    assert separator_tokens("\n.;:", ByteTokenizer()) == (10, 46, 58, 59)
    bpe = train_bpe(["a = {'b': [1]}\n\n    return a\n\n    return b\n\n" * 20], 300)
    found = separator_tokens("\n ", bpe)
    texts = [bpe.decode([i]) for i in found]
    assert len(found) > 3 and {"\n", " ", "\n\n"} <= set(texts) and all(set(text) <= {"\n", " "} for text in texts)
    others = set(range(bpe.vocab_size)) - set(found)
    assert not any(bpe.pieces[i] and set(bpe.pieces[i]) <= {10, 32} for i in others)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            dict(model__separators=".。"),
            r"model.separators = '.。': no token of the tokenizer \(bytes\) consists of '。'",
        ),
        (dict(model__separator_tokens=(1,)), r"model.separator_tokens = \(1,\): the tokenizer's of model.separators"),
        (dict(model__vocab_size=256), "model.vocab_size = 256: the tokenizer has 257 tokens"),
    ],
)
def test_what_the_tokenizer_does_not_have(fields, message):
    config = cases.small_config("", **SEES | fields)
    with pytest.raises(ValueError, match=message) as error:
        with_vocabulary(config, ByteTokenizer())
    assert "\n" not in str(error.value)


def test_where_no_layer_has_a_window():
    with pytest.raises(ValueError, match=r"model\.separators = '\.': without a window every token sees all before it"):
        check(cases.small_config("", model__separators="."))
    mixers = ("delta_former", Mixer("softmax_attention", window=4))
    check(cases.small_config("", model__separators=".", model__mixers=mixers))


def test_a_dry_run_needs_no_corpus_for_them():
    for fields in (dict(data__tokenizer="bytes"), dict(data__tokenizer="bpe:300"), dict(model__vocab_size=1000)):
        found = with_any_vocabulary(cases.small_config("", **SEES | fields)).model
        assert found.separator_tokens == (10, 32, 58) and found.vocab_size in (257, 300, 1000)


def test_a_run_keeps_the_characters_and_its_model_has_the_tokens(tmp_path):
    """config.json says what was asked for; what reads the run finds the same tokens, and resumes it bit for bit."""
    mixers = ("delta_former", Mixer("softmax_attention", window=0))
    config = cases.small_config(cases.make_corpus(tmp_path), model__mixers=mixers, **SEES)
    config.run = dataclasses.replace(config.run, steps=3, eval_every=3, checkpoint_every=2)
    whole = cases.run_training(config, tmp_path / "run")
    saved = json.loads((tmp_path / "run" / "config.json").read_text())["model"]
    assert saved["separators"] == "\n :" and saved["separator_tokens"] == [] and saved["vocab_size"] == 0
    found = restore(tmp_path / "run")
    assert found.config.model.separator_tokens == (10, 32, 58)
    model = merge(found.program.parts, found.params)
    assert [block.mixer.separator_tokens for block in model.blocks] == [(10, 32, 58), ()]
    half = dataclasses.replace(config, run=dataclasses.replace(config.run, steps=2))
    cases.run_training(half, tmp_path / "other")
    cases.assert_same_bits(cases.run_training(config, tmp_path / "other").state, whole.state)
    # A model that longred compares with: the same characters are the same model, others are not.
    student = with_vocabulary(dataclasses.replace(config), found.tokenizer)
    student.objective = dataclasses.replace(config.objective, teacher_workdir=str(tmp_path / "run"))
    assert teacher_model(student) == student.model
    other = dataclasses.replace(student.model, separators="\n")
    with pytest.raises(ValueError, match=r"here: not the same architecture: model.separators: '\\n :' there"):
        check_same_architecture(found.config.model, other, "here")


def program_on(mesh_config, devices, implementation):
    config = cases.small_config(
        "",
        model__vocab_size=64,
        model__num_heads=4,
        model__num_kv_heads=4,
        model__head_dim=8,
        model__mixers=("delta_former", "softmax_attention"),
        model__window=4,
        model__initial_tokens=1,
        model__separator_tokens=(1, 2, 3, 4),
        model__implementation=implementation,
    )
    config.mesh = mesh_config
    return Program(config, make_mesh(mesh_config, jax.devices()[:devices])), config


def losses_on(mesh_config, devices):
    """[loss, norm of the gradient] of a step, with documents and padding."""
    program, _ = program_on(mesh_config, devices, "parallel")  # compiles fastest
    tokens, targets = np.random.default_rng(0).integers(0, 64, (2, 8, 32), dtype=np.int32)
    segments = np.repeat([[1, 2, 0]], 8, axis=0).repeat([14, 16, 2], axis=1).astype(np.int32)
    batch = {"tokens": tokens, "targets": targets, "segment_ids": segments}
    _, metrics = program.train_step(program.create_state(0), jax.device_put(batch, batch_sharding(program.mesh)))
    return float(metrics["loss"]), float(metrics["grad_norm"])


@pytest.mark.long
def test_eight_devices_see_what_one_does():
    """Rows, heads and sequences over two devices each: documents and separators cross them."""
    found = losses_on(MeshConfig(data=2, tensor=2, context=2), 8)
    np.testing.assert_allclose(found, losses_on(MeshConfig(), 1), rtol=1e-4)


def test_devices_that_do_not_divide_the_heads_are_refused():
    """The chain and the ring see no token behind a window."""
    program, config = program_on(MeshConfig(context=8), 8, None)
    with pytest.raises(NotImplementedError, match=r"window, keep and initial: .* give a mesh\.context that divides"):
        program.lower_train_step(config.data)
