"""Settings: kept as JSON, checked field by field, compared field by field."""

import json

import pytest
from etils import epath
from support import training_cases as cases

from deltaformer_jax.config import Config, DataConfig, Mixer, ModelConfig, RunConfig
from deltaformer_jax.config.checks import check
from deltaformer_jax.config.files import config_names, packaged_config
from deltaformer_jax.config.remarks import remarks
from deltaformer_jax.config.saved import Saved, check_resumable, flatten, from_json, to_json
from deltaformer_jax.layers.mixers.build import unused_fields
from deltaformer_jax.training.optimiser import learning_rate_schedule


def test_json_and_back():
    config = Config()
    config.model.mixers = ("delta_former", Mixer("softmax_attention", window=128, write_similarity="relu"))
    config.optimizer.learning_rate = 1 / 3
    again = from_json(json.loads(json.dumps(to_json(config))))
    assert again == config and again.model.mixers[1] == config.model.mixers[1]


def test_every_number_has_a_bound():
    config = Config()
    unbounded = {name for name, value in flatten(config).items() if type(value) in (int, float)}
    for name in list(unbounded):
        section, field = name.split(".")
        changed = Config()
        setattr(getattr(changed, section), field, type(getattr(getattr(config, section), field))(-5))
        try:
            check(changed)
        except ValueError as error:
            assert name in str(error)
            unbounded.remove(name)
    # The mesh and the model check these with what only they know; scales and bounds of log decays may be negative.
    assert unbounded == {
        "model.decay_lower_bound",
        "mesh.data",
        "mesh.fsdp",
        "mesh.expert",
        "mesh.tensor",
        "mesh.context",
        "model.write_scale",
        "model.read_scale",
    }


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"run__steps": 0}, "run.steps = 0: must be at least 1"),
        ({"run__steps": 10.0}, "run.steps = 10.0: must be of type int, not float"),
        ({"run__steps": True}, "run.steps = True: must be of type int, not bool"),
        ({"model__d_model": "64"}, "model.d_model = '64': must be of type int, not str"),
        ({"model__mixers": "delta_former"}, "model.mixers = 'delta_former': must be a tuple"),
        ({"model__mixers": ()}, "model.mixers = .*at least one"),
        ({"model__qk_norm": 1}, "model.qk_norm = 1: must be of type bool"),
        ({"optimizer__learning_rate": float("nan")}, "optimizer.learning_rate = nan"),
        ({"optimizer__learning_rate": float("inf")}, "optimizer.learning_rate = inf: must be a finite number"),
        ({"optimizer__weight_decay": float("inf")}, "optimizer.weight_decay = inf: must be a finite number"),
        ({"optimizer__epsilon": float("inf")}, "optimizer.epsilon = inf: must be a finite number"),
        ({"model__write_scale": float("nan")}, "model.write_scale = nan: must be a finite number"),
        ({"model__rope_base": float("inf")}, "model.rope_base = inf: must be a finite number"),
        ({"data__eval_tail": 1.0}, "data.eval_tail = 1.0: must be below 1"),
        ({"optimizer__learning_rate": None}, "optimizer.learning_rate = None: must be a number"),
        ({"optimizer__b2": 1.0}, "optimizer.b2 = 1.0: must be below 1"),
        ({"optimizer__wsd_decay_fraction": 1.5}, "optimizer.wsd_decay_fraction = 1.5: must be at most 1"),
        ({"optimizer__schedule": "linear"}, "optimizer.schedule = 'linear': must be one of cosine, wsd, constant"),
        ({"optimizer__warmup_steps": 20}, "optimizer.warmup_steps = 20: must be below optimizer.decay_steps = 20"),
        ({"optimizer__accumulation_steps": 3}, "accumulation_steps = 3 doesn't divide data.batch_size = 8"),
        ({"run__seed": 2**32}, "run.seed"),
    ],
)
def test_what_can_not_be(fields, message):
    with pytest.raises(ValueError, match=message):
        check(cases.small_config("", **fields))


def test_a_config_of_other_types():
    with pytest.raises(ValueError, match=r"get_config\(\) returned a dict"):
        check({"model": {}})
    config = Config()
    config.model = {"d_model": 3}
    with pytest.raises(ValueError, match="model is a dict, not a ModelConfig"):
        check(config)


def test_whole_numbers_are_numbers():
    check(cases.small_config("", optimizer__learning_rate=1, optimizer__weight_decay=0))


def test_resuming_may_change_what_leaves_the_weights_as_they_are(tmp_path):
    old = cases.small_config("here")
    free = cases.small_config("there", run__steps=99, run__seed=7, mesh__fsdp=2, model__implementation="triton")
    free.objective.teacher_workdir, free.objective.short_data, free.objective.s2l_data = "a", "b", "c"
    check_resumable(old, free, tmp_path)
    other = cases.small_config("there", model__d_model=64, optimizer__b1=0.5, data__tokenizer="bpe:300")
    with pytest.raises(ValueError) as error:
        check_resumable(old, other, tmp_path)
    text = str(error.value)
    assert str(tmp_path) in text
    for part in ("model.d_model: 32 in the run, 64 asked for", "optimizer.b1: 0.9 in the run", "'bytes'", "'bpe:300'"):
        assert part in text
    assert "data.path:" not in text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "not the folder of a run"),
        ("{", "not a run's config"),
        ("[]", "not a run's config"),
        ('{"model": {"d_modle": 3}, "tokenizer_hash": "", "corpus_hash": ""}', "unknown field model.d_modle"),
        ('{"model": {"d_model": "x"}, "tokenizer_hash": "", "corpus_hash": ""}', "model.d_model = 'x'"),
        ("{}", "tokenizer_hash"),
    ],
)
def test_config_json_that_is_not_one(tmp_path, content, message):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        Saved.read(epath.Path(tmp_path))
    assert str(tmp_path) in str(error.value)


def test_what_is_not_used_is_remarked():
    assert not remarks(Config())
    assert not remarks(cases.small_config("a/corpus"))
    for name in config_names():
        assert not remarks(packaged_config(name)), name
        assert not unused_fields(packaged_config(name).model), name
    found = {
        "data.tokenizer = 'bpe:300' is not used": {"data__tokenizer": "bpe:300"},
        "optimizer.wsd_decay_fraction = 0.5 is not used": {"optimizer__wsd_decay_fraction": 0.5},
        "optimizer.decay_steps = 20 is not used": {"optimizer__schedule": "constant"},
        "run.steps = 30 is past optimizer.decay_steps = 20: later steps use the learning rate 0.0003, ": {
            "run__steps": 30
        },
    }
    for text, fields in found.items():
        (line,) = remarks(cases.small_config("a/corpus", **fields))
        assert line.startswith(text)
    assert not remarks(cases.small_config("", data__tokenizer="bpe:300"))
    run = RunConfig(eval_batches=3, eval_every=0, sample_prompt="x")
    task = Config(data=DataConfig(path="task:parity", eval_tail=0.1), run=run)
    assert [line.partition(" = ")[0] for line in remarks(task)] == [
        "data.eval_tail",
        "run.sample_prompt",
        "run.eval_batches",
    ]
    assert not remarks(
        cases.small_config("a", run__steps=30, optimizer__schedule="constant", optimizer__decay_steps=1000)
    )


def test_the_rate_past_the_schedule_is_the_one_remarked():
    for schedule in ("cosine", "wsd"):
        config = cases.small_config("a", run__steps=30, optimizer__schedule=schedule)
        assert f"{float(learning_rate_schedule(config.optimizer)(29)):.6g}" in remarks(config)[0]


@pytest.mark.parametrize(
    ("mixer", "fields"),
    [
        ("softmax_attention", dict(chunk_size=128)),
        ("softmax_attention", dict(value_dim=16)),
        ("linear_attention", dict(conv_size=4)),
        ("linear_attention", dict(output_gate="on")),
        ("delta_net", dict(rope_base=500.0)),
        ("delta_net", dict(num_kv_heads=2)),
        ("delta_net", dict(num_kv_heads=8, num_heads=8)),
        ("retention", dict(rope_base=500.0)),
    ],
)
def test_a_mixers_field_that_none_takes_is_found(mixer, fields):
    used = "num_heads" in fields or mixer == "retention"
    assert unused_fields(ModelConfig(mixers=(mixer,), **fields)) == ([] if used else list(fields))
