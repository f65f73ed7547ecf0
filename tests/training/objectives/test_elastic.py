"""Elastic depth: which layers a step leaves out, what it then computes, and that a resumed run draws the same."""

import dataclasses
import re

import jax
import numpy as np
import pytest
from flax import nnx
from support import training_cases as cases

from deltaformer_jax.config import ModelConfig, ObjectiveConfig
from deltaformer_jax.config.checks import check
from deltaformer_jax.config.remarks import remarks
from deltaformer_jax.model import LanguageModel
from deltaformer_jax.model_parts import model_parts, params_of
from deltaformer_jax.surgery import remove_layers
from deltaformer_jax.training.objectives.elastic import layer_switches
from deltaformer_jax.training.step import loss_and_gradient, loss_gradient_and_accuracy

LAYERS = 4
ELASTIC = dict(model__num_layers=LAYERS, objective__name="elastic", objective__depths="3,1")


@pytest.mark.parametrize(
    "drop, left_out",
    [
        ("last", [(9, 10, 11), (6, 7, 8, 9, 10, 11), ()]),
        ("even", [(2, 6, 10), (1, 3, 5, 7, 9, 11), ()]),
        ("7, 5,6,4,3,8", [(5, 6, 7), (3, 4, 5, 6, 7, 8), ()]),
    ],
)
def test_the_layers_that_a_depth_leaves_out(drop, left_out):
    depths = ["9", "6"]  # as many as the model has is every other step's depth, and is refused
    assert ObjectiveConfig("elastic", ",".join(depths), drop=drop).left_out(12) == left_out[:2]


@pytest.mark.parametrize(
    "fields, message",
    [
        ({}, "objective.depths = '': objective.name = \"elastic\" needs some"),
        ({"depths": "12"}, "objective.depths = '12': must be numbers from 1 to 11"),
        ({"depths": "0"}, "objective.depths = '0': must be numbers from 1 to 11"),
        ({"depths": "9,x"}, "objective.depths = '9,x': must be numbers"),
        ({"depths": "9,9"}, "a number is given once"),
        (
            {"depths": "9", "drop": "middle"},
            "objective.drop = 'middle': must be numbers from 0 to 11, separated by com",
        ),
        ({"depths": "9", "drop": "12,1,2"}, "objective.drop = '12,1,2': must be numbers from 0 to 11"),
        ({"depths": "9", "drop": "3,4"}, "has 2 layers; a depth of 9 of 12 leaves out 3"),
        ({"depths": "9", "depth_probability": 1.5}, "objective.depth_probability = 1.5: must be at most 1"),
    ],
)
def test_what_is_refused(fields, message):
    config = cases.small_config("")
    config.model.num_layers = 12
    config.objective = ObjectiveConfig("elastic", **fields)
    with pytest.raises(ValueError, match=re.escape(message)):
        check(config)


def test_fields_that_are_not_used_are_said():
    config = cases.small_config("", objective__depths="1")
    check(config)
    assert "objective.depths = '1' is not used: only objective.name = 'elastic' uses it" in remarks(config)


def test_how_often_each_depth_is_drawn():
    """Of n draws a share p of each, within 4.5 standard deviations √(p (1 − p) / n); another seed draws others."""
    objective, steps = ObjectiveConfig("elastic", "3,2", depth_probability=0.4), 3000
    draw = lambda seed: np.asarray(jax.jit(jax.vmap(layer_switches(objective, LAYERS, seed)))(np.arange(steps)))
    masks = draw(0)
    assert not (masks == draw(1)).all()
    for depth, share in ((4, 0.6), (3, 0.2), (2, 0.2)):
        of_depth = masks.sum(axis=1) == depth
        assert abs(of_depth.mean() - share) < 4.5 * (share * (1 - share) / steps) ** 0.5
        assert (masks[of_depth] == (np.arange(LAYERS) < depth)).all()
    assert layer_switches(ObjectiveConfig(), LAYERS, 0) is None


@pytest.mark.parametrize("with_accuracy", [False, True])
def test_the_gradient_is_that_of_the_model_without_the_layers(with_accuracy):
    """Exactly 0 for the layers that are left out, and the shorter model's for all others, in two parts of the batch."""
    config = ModelConfig(
        vocab_size=32,
        d_model=16,
        num_layers=3,
        num_heads=2,
        num_kv_heads=2,
        head_dim=8,
        mixers=("softmax_attention",),
        implementation="parallel",
    )
    params = params_of(LanguageModel(config, rngs=nnx.Rngs(0)))
    draw = np.random.default_rng(0)
    batch = {name: draw.integers(0, 32, (4, 10)).astype(np.int32) for name in ("tokens", "targets")}
    batch["segment_ids"] = np.ones((4, 10), np.int32)
    function = loss_gradient_and_accuracy if with_accuracy else loss_and_gradient
    sums = jax.jit(
        lambda params, active: function(model_parts(config), params, batch, 2, active=active, max_logits=200)[:2]
    )
    loss, gradient = sums(params, np.array([True, False, True]))
    fewer, left = remove_layers(config, params, [1])
    expected, of_left = jax.jit(lambda params: function(model_parts(fewer), params, batch, 2, max_logits=200)[:2])(left)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    assert all(not np.any(leaf[1]) for leaf in jax.tree.leaves(gradient["blocks"]))
    _, kept = remove_layers(config, gradient, [1])
    # Two programs round otherwise: sums of 40 tokens' float32 gradients.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), kept, of_left)


def test_probability_0_is_training_without(corpus, tmp_path):
    fields = ELASTIC | dict(objective__depth_probability=0.0, run__steps=4)
    plain = cases.run_training(cases.small_config(corpus, model__num_layers=LAYERS, run__steps=4), tmp_path / "plain")
    ours = cases.run_training(cases.small_config(corpus, **fields), tmp_path / "elastic")
    cases.assert_same_bits(ours.state, plain.state)
    assert [record.pop("depth") for record in (r for r in cases.read_metrics(tmp_path / "elastic") if "loss" in r)] == [
        4
    ] * 4
    assert "depth" not in cases.read_metrics(tmp_path / "plain")[0]


def test_a_resumed_run_draws_the_same_depths(corpus, tmp_path):
    config = cases.small_config(corpus, **ELASTIC, objective__depth_probability=0.8, run__steps=10)
    whole = cases.run_training(config, tmp_path / "whole", devices=2)
    cases.run_training(config, tmp_path / "run", stop=lambda steps: cases.StopAt(steps, 5), devices=2)
    again = cases.run_training(config, tmp_path / "run", devices=2)
    cases.assert_same_bits(again.state, whole.state)
    assert cases.read_metrics(tmp_path / "run") == cases.read_metrics(tmp_path / "whole")
    depths = [record["depth"] for record in cases.read_metrics(tmp_path / "run") if "loss" in record]
    switches = layer_switches(config.objective, LAYERS, config.run.seed)
    assert depths == [int(switches(step).sum()) for step in range(10)] and len({*depths}) == 3
    other = dataclasses.replace(config, objective=dataclasses.replace(config.objective, drop="even"))
    with pytest.raises(ValueError, match=r"objective\.drop: 'last' in the run, 'even' asked for"):
        cases.run_training(other, tmp_path / "run")
