"""A training step of a model with experts on eight devices is one device's, however the mesh is laid out."""

import dataclasses
import functools
import itertools

import jax
import numpy as np
import pytest
from support import training_cases as cases

from deltaformer_jax.config import MeshConfig
from deltaformer_jax.training.setup import prepare

MESHES = {
    "experts": MeshConfig(data=2, expert=4),
    "experts, shards, kernels": MeshConfig(data=1, expert=2, fsdp=2, tensor=2),
    "experts, tokens": MeshConfig(data=2, expert=2, context=2),
    "experts that do not divide": MeshConfig(data=1, expert=8),
    "shards": MeshConfig(data=1, fsdp=8),
}


@pytest.fixture(scope="module", autouse=True)
def compile_once(tmp_path_factory):
    yield from cases.compile_once(tmp_path_factory.mktemp("compiled"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return cases.make_corpus(tmp_path_factory.mktemp("experts"))


def steps_on(corpus, folder, devices, pool, **mesh):
    """(the metrics of two steps, the parameters after them)."""
    fields = dict(
        feed_forward="moe", num_experts=4, shared_experts=1, router_z_loss=0.1, balance_loss=0.5, expert_pool=pool
    )
    given = {f"model__{name}": value for name, value in fields.items()}
    config = cases.small_config(
        corpus, **given, model__implementation=None, data__batch_size=8, optimizer__accumulation_steps=1
    )
    config = dataclasses.replace(config, **mesh)
    run, position, state = prepare(config, folder, devices=jax.devices()[:devices])
    found, stream = [], run.feed.stream(position)
    for _ in range(2):
        state, metrics = run.train_step(state, run.feed.to_devices(next(stream)[1]))
        found.append(jax.device_get(metrics))
    run.checkpoints.close()
    return found, jax.device_get(state.params)


@functools.cache
def one_device(corpus, folder, pool):
    return steps_on(corpus, folder, 1, pool)


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "pool"),
    [
        *(USUAL := (("experts", False), ("experts, shards, kernels", True))),
        # On demand: half a minute each, and the same collectives.
        *(
            pytest.param(*case, marks=pytest.mark.rare)
            for case in itertools.product(MESHES, (False, True))
            if case not in USUAL
        ),
    ],
)
def test_a_step_is_one_devices(corpus, tmp_path_factory, tmp_path, name, pool):
    """Sums of float32 in another order: 1e-5 of a metric, and AdamW moves a parameter by the rate whatever its size."""
    metrics, params = steps_on(corpus, tmp_path / "run", 8, pool, mesh=MESHES[name])
    expected, after = one_device(corpus, tmp_path_factory.getbasetemp() / f"one, {pool}", pool)
    for ours, theirs in zip(metrics, expected):
        assert {"balance_loss", "router_z_loss", "expert_load"} < set(theirs)
        for key, value in theirs.items():
            np.testing.assert_allclose(ours[key], value, rtol=2e-5, err_msg=key)
    apart = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), params, after)
    assert max(jax.tree.leaves(apart)) < 1e-4
