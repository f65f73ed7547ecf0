"""LongReD's step on meshes of eight devices is one device's."""

import dataclasses

import jax
import numpy as np
import pytest
from support import training_cases as cases

from deltaformer_jax.config import MeshConfig
from deltaformer_jax.training.setup import prepare

MESHES = {
    "rows, kernels": MeshConfig(data=2, fsdp=2, tensor=2),
    "rows, tokens": MeshConfig(data=1, fsdp=4, context=2),
    "zero1": MeshConfig(data=4, fsdp=2, zero1=True),
}


@pytest.fixture(scope="module", autouse=True)
def compile_once(tmp_path_factory):
    yield from cases.compile_once(tmp_path_factory.mktemp("compiled"))


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("longred")
    corpus = cases.make_corpus(folder)
    cases.run_training(cases.small_config(corpus, run__steps=2), folder / "run")
    fields = dict(name="longred", teacher_workdir=str(folder / "run"), short_length=16, layers="kl:1", cycle="2,2,1")
    given = {f"objective__{name}": value for name, value in fields.items()}
    given |= dict(data__sequence_length=64, data__batch_size=8, run__init_from=str(folder / "run"), run__eval_every=0)
    return cases.small_config(corpus, **given, model__rope_base=3e4, model__implementation=None)


def steps_on(config, folder, devices):
    """(the metrics of two steps, the parameters after them, the divergence of the attention at the start)."""
    run, position, state = prepare(config, folder, devices=jax.devices()[:devices])
    found, stream = [], run.feed.stream(position)
    for _ in range(2):
        state, metrics = run.train_step(state, run.feed.to_devices(next(stream)[1]))
        found.append(jax.device_get(metrics))
    run.checkpoints.close()
    return found, jax.device_get(state.params)


@pytest.fixture(scope="module")
def one_device(config, tmp_path_factory):
    return steps_on(config, tmp_path_factory.mktemp("one") / "run", 1)


@pytest.mark.rare  # a minute; the plain step's meshes are in CI
@pytest.mark.parametrize(
    "name", ["rows, kernels", *(pytest.param(n, marks=pytest.mark.rare) for n in list(MESHES)[1:])]
)
def test_a_step_is_one_devices(config, one_device, tmp_path, name):
    """Sums of float32 in another order: 1e-5 of a metric, and AdamW moves a parameter by the rate whatever its size."""
    metrics, params = steps_on(dataclasses.replace(config, mesh=MESHES[name]), tmp_path / "run", 8)
    for ours, theirs in zip(metrics, one_device[0]):
        for key, value in theirs.items():
            np.testing.assert_allclose(ours[key], value, rtol=2e-5, err_msg=key)
    apart = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), params, one_device[1])
    assert max(jax.tree.leaves(apart)) < 1e-4
