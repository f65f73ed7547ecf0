"""LongReD: its terms against their definition in NumPy, what weights of 0 do, resuming, and what is refused."""

import dataclasses
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support import training_cases as cases

from deltaformer_jax.config import ModelConfig, ObjectiveConfig
from deltaformer_jax.config.checks import check
from deltaformer_jax.config.remarks import remarks
from deltaformer_jax.model import LanguageModel
from deltaformer_jax.model_parts import flat, merge, model_parts, params_of
from deltaformer_jax.sharding.mesh import make_mesh
from deltaformer_jax.training.objectives.given import FILE
from deltaformer_jax.training.objectives.mixed import mixing
from deltaformer_jax.training.objectives.restoration import Teacher, restoring
from deltaformer_jax.training.objectives.rows import Rows, rows_beside
from deltaformer_jax.training.state import parameter_shardings
from deltaformer_jax.training.step import _here, loss_and_gradient

LONG = dict(data__sequence_length=64, data__batch_size=4, model__rope_base=20_000.0, optimizer__warmup_steps=0)


@pytest.fixture(scope="module")
def before(corpus, tmp_path_factory):
    """The folder of a run with rows of 32 tokens."""
    folder = tmp_path_factory.mktemp("before") / "run"
    cases.run_training(cases.small_config(corpus, run__steps=4), folder)
    return str(folder)


def longred(corpus, before, **fields):
    objective = dict(name="longred", teacher_workdir=before, short_length=16, layers="kl:1", cycle="4,3,1")
    given = {f"objective__{name}": value for name, value in objective.items()}
    return cases.small_config(corpus, **(LONG | given | dict(run__init_from=before, run__steps=6) | fields))


MODEL = ModelConfig(
    vocab_size=32,
    d_model=16,
    num_layers=3,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    mixers=("delta_former",),
    implementation="parallel",
)


def batch_of(rows, length, seed=0):
    draw = np.random.default_rng(seed)
    batch = {name: draw.integers(0, 32, (rows, length)).astype(np.int32) for name in ("tokens", "targets")}
    ids = np.sort(draw.integers(1, 3, (rows, length)), axis=1)
    ids[:, -2:] = 0
    return batch | {"segment_ids": ids.astype(np.int32)}


def test_the_terms_are_their_definition():
    """In two parts of a batch: values by NumPy in float64, from the streams of `look`; a gradient by a difference."""
    model = dataclasses.replace(MODEL, rope_base=50_000.0)
    config = cases.small_config("", data__sequence_length=40, optimizer__accumulation_steps=2)
    config.objective = ObjectiveConfig("longred", cycle="4,2,1", alpha_short=3.0, alpha_s2l=5.0)
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    parts, old = model_parts(model), model_parts(MODEL)
    params, teacher = (params_of(LanguageModel(MODEL, rngs=nnx.Rngs(seed))) for seed in (0, 1))
    batch = {"short": batch_of(4, 8), "s2l": batch_of(2, 20, 1)}
    beside = {"short": Rows("", 8, 4), "s2l": Rows("", 20, 2)}
    with_terms = restoring(config, beside, parts, old, mesh, parameter_shardings(old, mesh))
    layers = jnp.array([0, 2])

    @dataclasses.dataclass
    class State:
        params: dict
        step: int = 7

    @jax.jit
    def both(params):
        nothing = jax.tree.map(jnp.zeros_like, params)
        return with_terms.added(nothing, State(params), batch, Teacher(teacher, layers), over=_here)

    gradient, found = both(params)
    look = lambda parts, params, rows, **more: [
        np.asarray(x, np.float64)
        for x in jax.tree.leaves(
            merge(parts, params).look(rows["tokens"], lambda a, b, _: b, segment_ids=rows["segment_ids"], **more)
        )
    ]
    cosine = lambda a, b: (a * b).sum(-1) / np.sqrt((a * a).sum(-1) * (b * b).sum(-1))
    streams = [look(p, w, batch["short"])[1] for p, w in ((parts, params), (old, teacher))]
    real = batch["short"]["segment_ids"] > 0
    expected = np.mean([np.mean((1 - cosine(streams[0][n], streams[1][n]))[real]) for n in (0, 2)])
    np.testing.assert_allclose(found["short_distance"], expected, rtol=2e-5)
    # One term's value is found from the other's gradient along a direction: the change of their weighted sum.
    total = lambda found: 3.0 * 2 / 4 * 2 * found["short_distance"] + 5.0 / 4 * found["s2l_distance"]
    draw = np.random.default_rng(2)
    along = jax.tree.map(lambda x: jnp.asarray(draw.normal(size=x.shape), x.dtype), params)
    slope = sum(jnp.vdot(a, b) for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(along)))
    step = 3e-5
    near = [both(jax.tree.map(lambda x, d, s=sign: x + s * step * d, params, along))[1] for sign in (1.0, -1.0)]
    # A central difference: with step 1e-4 it is 3 % off, by the third derivative; float32's rounding over step is 1 %.
    np.testing.assert_allclose((total(near[0]) - total(near[1])) / (2 * step), slope, rtol=3e-2)


def test_a_student_that_is_its_teacher_has_no_distance():
    """Both terms are 0 to rounding, and so are their gradients, with stretched positions of factor 1."""
    config = cases.small_config("", data__sequence_length=20)
    config.objective = ObjectiveConfig("longred", cycle="1,1,1", alpha_short=1.0, alpha_s2l=1.0)
    mesh, parts = make_mesh(config.mesh, jax.devices()[:1]), model_parts(MODEL)
    params = params_of(LanguageModel(MODEL, rngs=nnx.Rngs(0)))
    batch = {"short": batch_of(4, 8), "s2l": batch_of(2, 20, 1)}
    beside = {"short": Rows("", 8, 4), "s2l": Rows("", 20, 2)}
    terms = restoring(config, beside, parts, parts, mesh, parameter_shardings(parts, mesh))
    state = type("State", (), {"params": params, "step": 0})
    nothing = jax.tree.map(jnp.zeros_like, params)
    added = jax.jit(lambda gradient: terms.added(gradient, state, batch, Teacher(params, jnp.arange(3)), over=_here))
    gradient, found = added(nothing)
    assert abs(found["short_distance"]) < 1e-6 and abs(found["s2l_distance"]) < 1e-6
    assert max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(gradient)) < 1e-6


def test_mixed_lengths_are_weighted_by_the_cycle():
    config = cases.small_config("", data__sequence_length=20)
    config.objective = ObjectiveConfig("mixed", cycle="3,1,1")
    mesh, parts = make_mesh(config.mesh, jax.devices()[:1]), model_parts(MODEL)
    params = params_of(LanguageModel(MODEL, rngs=nnx.Rngs(0)))
    batch, short = batch_of(2, 20), batch_of(4, 8, 1)
    state = type("State", (), {"params": params, "step": 0})
    of = jax.jit(lambda rows: loss_and_gradient(parts, params, rows, 1)[:2])
    (_, long_gradient), (loss, short_gradient) = of(batch), of(short)
    added = jax.jit(lambda gradient: mixing(config, parts, mesh).added(gradient, state, {"short": short}, over=_here))
    found, more = added(long_gradient)
    np.testing.assert_allclose(more["short_loss"], loss, rtol=1e-6)
    for (path, a), (_, b), (_, c) in zip(flat(found), flat(long_gradient), flat(short_gradient)):
        np.testing.assert_allclose(a, 0.75 * b + 0.25 * c, rtol=1e-5, atol=1e-8, err_msg=str(path))


@pytest.mark.long
def test_weights_of_0_are_training_on_long_rows_alone(corpus, before, tmp_path):
    """Bit for bit, though objective.json remembers the teacher."""
    none = dict(objective__alpha_short=0.0, objective__alpha_s2l=0.0)
    ours = cases.run_training(longred(corpus, before, **none), tmp_path / "ours")
    plain = cases.small_config(corpus, **LONG, run__init_from=before, run__steps=6)
    plain = cases.run_training(plain, tmp_path / "plain")
    cases.assert_same_bits(ours.state, plain.state)
    assert not (tmp_path / "plain" / FILE).exists()


@pytest.mark.long
def test_a_resumed_run_is_the_same(corpus, before, tmp_path):
    """It has the same teacher and layers, draws the same positions, and is refused with another teacher.

    The teacher's folder may lie elsewhere by then."""
    config = longred(corpus, before)
    whole = cases.run_training(config, tmp_path / "whole", devices=2)
    cases.run_training(config, tmp_path / "run", stop=lambda steps: cases.StopAt(steps, 3), devices=2)
    shutil.copytree(before, tmp_path / "moved")
    moved = dataclasses.replace(config.objective, teacher_workdir=str(tmp_path / "moved"))
    again = cases.run_training(dataclasses.replace(config, objective=moved), tmp_path / "run", devices=2)
    cases.assert_same_bits(again.state, whole.state)
    records = cases.read_metrics(tmp_path / "run")
    assert records == cases.read_metrics(tmp_path / "whole")
    terms = [(record["short_distance"], record["s2l_distance"]) for record in records if "loss" in record]
    assert len(terms) == 6 and all(0 < value < 0.5 for pair in terms for value in pair)
    kept = json.loads((tmp_path / "run" / FILE).read_text())
    assert kept["teacher"]["step"] == 4 and kept["teacher"]["layers"] == [0, 1]
    assert all(value > 0 for value in kept["teacher"]["divergence"])
    kept["teacher"]["sha256"] = "0" * 64
    (tmp_path / "run" / FILE).write_text(json.dumps(kept))
    with pytest.raises(ValueError, match="its checkpoint of step 4 is not the one that the run"):
        cases.run_training(dataclasses.replace(config, run=dataclasses.replace(config.run, steps=8)), tmp_path / "run")


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(objective__teacher_workdir=""), "objective.teacher_workdir = '': objective.name"),
        (dict(objective__teacher_workdir="/nowhere"), "objective.teacher_workdir = /nowhere: no such folder"),
        (dict(run__init_from=""), "run.init_from = '': objective.name = \"longred\" goes on from a trained model"),
        (dict(objective__layers="kl:2"), "objective.layers = 'kl:2': must be kl:N or uniform:N with N from 1 to 1"),
        (dict(objective__layers="2"), "objective.layers = '2': must be numbers from 0 to 1"),
        (dict(objective__layers=""), "objective.layers = ''"),
        (dict(objective__cycle="8,6"), "objective.cycle = '8,6': must be three whole numbers above 0"),
        (dict(objective__cycle="8,0,2"), "objective.cycle = '8,0,2'"),
        (dict(objective__short_length=33), "objective.short_length = 33: the teacher was trained on rows of 32"),
        (dict(data__sequence_length=16), "data.sequence_length = 16: shorter than the teacher's 32"),
        (dict(data__path="task:parity"), "objective.name = 'longred': is for text"),
        (dict(model__mlp_dim=96), "not the same architecture: model.mlp_dim: 64 there, 96 here"),
        (dict(objective__short_data="/nowhere"), "objective.short_data = '/nowhere'"),
        (dict(objective__skip="creme"), "objective.skip = 'creme'"),
    ],
)
def test_what_is_refused_before_anything_is_written(corpus, before, tmp_path, fields, message):
    with pytest.raises((ValueError, OSError), match=re.escape(message)):
        cases.run_training(longred(corpus, before, **fields), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_layers_that_are_given():
    compared = lambda layers: ObjectiveConfig("longred", layers=layers).compared(12)
    assert compared("kl:3") == ("kl", (3,))
    assert compared("uniform:3") == ("given", (1, 5, 9, 11))
    assert compared("all") == ("given", tuple(range(12))) and compared("last") == ("given", (11,))
    assert compared("5, 2") == ("given", (2, 5, 11))


def test_how_many_rows_a_step_has():
    config = cases.small_config("", data__sequence_length=64, data__batch_size=4, optimizer__accumulation_steps=2)
    config.objective = ObjectiveConfig("mixed", short_length=16, cycle="4,3,1")
    check(config)
    one, two = (make_mesh(config.mesh, jax.devices()[:n]) for n in (1, 2))
    assert rows_beside(config, one) == {"short": Rows("", 16, 12)}
    config.objective.short_length = 24  # 8 rows of 24 tokens are nearest to 192; of 4 each part and device has one
    assert rows_beside(config, two)["short"].number == 8
    assert any(
        "objective.alpha_short" in line
        for line in remarks(
            dataclasses.replace(config, objective=dataclasses.replace(config.objective, alpha_short=1.0))
        )
    )
