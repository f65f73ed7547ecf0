"""Evaluation, statistics of layers and sampling on meshes of eight devices give the numbers of one device."""

import functools
import itertools
import math

import jax
import numpy as np
import pytest
from support import training_cases as cases

from deltaformer_jax.config import MeshConfig, Mixer
from deltaformer_jax.decoding.generate import generate
from deltaformer_jax.model_parts import merge
from deltaformer_jax.sharding.mesh import MESH_AXES, batch_sharding, make_mesh
from deltaformer_jax.training.program import Program
from deltaformer_jax.training.watch.statistics import as_record

LENGTH = 64
CUT = (1, 2, 2, 2)  # data, fsdp, tensor, context
EVERY = [sizes for sizes in itertools.product((1, 2, 4, 8), repeat=4) if math.prod(sizes) == 8]
# Each axis alone, and each with each other one.
ALONE_AND_BY_PAIRS = [sizes for sizes in EVERY if max(sizes) != 4]
# Two key heads on two devices of "tensor" are one on each, which two of "context" cannot divide: a ring and a chain.
SEVERAL = dict(
    mixers=("delta_former", Mixer("softmax_attention", window=9), "gated_delta_net"), num_layers=3, kv_shift=True,
    implementation=None,
)  # fmt: skip
ONE = dict(mixers=("softmax_attention",), num_layers=1, num_kv_heads=4)


@functools.cache
def program_on(sizes, several):
    fields = dict(vocab_size=64, num_heads=4, head_dim=8, **(SEVERAL if several else ONE))
    config = cases.small_config("", **{f"model__{name}": value for name, value in fields.items()})
    config.mesh = MeshConfig(**dict(zip(MESH_AXES, sizes)))
    program = Program(config, make_mesh(config.mesh, jax.devices()[: math.prod(sizes)]))
    if math.prod(sizes) == 1:
        return program, program.create_state(0).params
    return program, jax.device_put(program_on((1, 1, 1, 1), several)[1], program.shardings.params)


def batch_on(program, **more):
    draw = np.random.default_rng(0)
    tokens, targets = draw.integers(0, 64, (2, 8, LENGTH), dtype=np.int32)
    # Documents that cross devices, one that begins at a device's first token, and padding on both sides.
    segments = np.repeat([[1, 2, 3, 0]], 8, axis=0).repeat([16, 5, 40, 3], axis=1).astype(np.int32)
    segments[0, :35] = 0
    batch = {"tokens": tokens, "targets": targets, "segment_ids": segments, **more}
    return jax.device_put(batch, batch_sharding(program.mesh))


@functools.cache
def evaluated(sizes, several):
    program, params = program_on(sizes, several)
    masked = program.evaluation_step(params, batch_on(program, loss_mask=np.arange(8 * LENGTH).reshape(8, -1) % 3 > 0))
    return [np.asarray(masked["nats"]), np.asarray(masked["hits"])]


@functools.cache
def statistics(sizes, several):
    program, params = program_on(sizes, several)
    record = as_record(jax.device_get(program.statistics_step(params, batch_on(program))))
    return {f"{kind} {name}": value for kind, named in record.items() for name, value in named.items()}


def check_evaluation(sizes, several):
    for found, expected in zip(evaluated(sizes, several), evaluated((1, 1, 1, 1), several), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_evaluation_where_every_axis_but_data_has_two_devices():
    check_evaluation(CUT, several=False)


def on_demand(meshes):
    return pytest.mark.parametrize("sizes", [CUT, *(pytest.param(x, marks=pytest.mark.rare) for x in meshes)], ids=str)


@pytest.mark.long
@on_demand(EVERY)
def test_evaluation_on_every_mesh(sizes):
    check_evaluation(sizes, several=True)


@pytest.mark.long
@on_demand(ALONE_AND_BY_PAIRS)  # a program with gradients takes half a minute to compile
def test_statistics_on_meshes(sizes):
    found, expected = statistics(sizes, True), statistics((1, 1, 1, 1), True)
    assert found.keys() == expected.keys()
    largest = max(value for name, value in expected.items() if name.startswith("gradient_norm"))
    for name, value in expected.items():
        # A gradient that nearly cancels is a sum of terms that are as large as others' gradients.
        size = max(value, 0.01 * largest) if name.startswith("gradient_norm") else value
        assert abs(found[name] - value) <= 1e-5 * size, name


@pytest.mark.long
def test_a_sample_of_parameters_that_are_cut():
    samples = []
    for sizes in ((1, 1, 1, 1), CUT):
        program, params = program_on(sizes, True)
        samples.append(list(generate(merge(program.parts, params), [1, 2, 3], 8, seed=0)))
    assert samples[0] == samples[1]
