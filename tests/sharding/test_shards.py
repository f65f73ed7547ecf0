"""Sums over devices, scattered in one stage and in two, are sums; whole arrays are gathered from their shards."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from deltaformer_jax.sharding import shards


@pytest.mark.parametrize("one_stage", [32, 1], ids=["one stage", "two stages"])
def test_sums_in_shards_are_the_sums(monkeypatch, one_stage):
    monkeypatch.setattr(shards, "_ONE_STAGE", one_stage)
    monkeypatch.setattr(shards, "_SMALL", 100)  # so that there are several buffers
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
    draw = np.random.default_rng(0)
    # Whole numbers, so that the order of a sum has no influence.
    wholes = [draw.integers(-9, 9, (8, *shape)).astype(np.float32) for shape in ((16, 9), (3, 64), (24,), (8,))]
    axes = [0, 1, 0, 0]
    specs = [PartitionSpec(*[None] * axis, "fsdp") for axis in axes]

    def sums(wholes):
        return shards.sums_in_shards([x[0] for x in wholes], axes, "fsdp", [None] * 4)

    mapped = jax.jit(jax.shard_map(sums, mesh=mesh, in_specs=PartitionSpec("fsdp"), out_specs=specs, check_vma=False))
    for found, whole in zip(mapped(wholes), wholes, strict=True):
        np.testing.assert_array_equal(found, whole.sum(axis=0))


def test_shards_are_gathered():
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
    x, y = np.arange(16.0 * 3, dtype=np.float32).reshape(16, 3), np.arange(2.0 * 24, dtype=np.float32).reshape(2, 24)
    specs = (PartitionSpec("fsdp"), PartitionSpec(None, "fsdp"))
    gather = lambda x, y: tuple(shards.all_shards([x, y], [-2, -1], [None, None]))
    mapped = jax.shard_map(gather, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=False)
    for found, whole in zip(jax.jit(mapped)(x, y), (x, y), strict=True):
        np.testing.assert_array_equal(found, whole)
