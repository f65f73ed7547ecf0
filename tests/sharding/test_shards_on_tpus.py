"""Compiled for TPUs, with none at hand: gradients of shards are reduce-scattered at every size, never summed whole."""

import os

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from deltaformer_jax.compiled.collectives import bytes_by_kind, collectives
from deltaformer_jax.sharding.shards import all_shards

P = PartitionSpec
LAYERS, WIDTH = 4, 1024


@pytest.mark.rare
@pytest.mark.parametrize("name, devices", [("v5e:4x8", 32), ("v5e:8x8", 64), ("v5e:16x16", 256)])
def test_gradients_are_reduce_scattered(name, devices):
    """A scan over layers of two kernels, cut on their first and on their last dimension, and a gain."""
    pytest.importorskip("libtpu", reason="compiles for TPUs; the extra tpu")
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    found = topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    mesh = Mesh(list(found), ("fsdp",), axis_types=(AxisType.Auto,))
    specs = (P(None, "fsdp"), P(None, None, "fsdp"), P(None, "fsdp"))
    shapes = ((WIDTH, 2 * WIDTH), (2 * WIDTH, WIDTH), (WIDTH,))

    def gradient(shards, x):
        def layer(x, shards):
            narrow = [shard.astype(jnp.bfloat16) for shard in shards[:2]]
            up, down, gain = all_shards([*narrow, shards[2]], [-2, -1, -1], [None] * 3)
            return x + jnp.tanh((x * gain.astype(x.dtype)) @ up) @ down, None

        loss = lambda shards: jnp.sum(jax.lax.scan(jax.checkpoint(layer), x, shards)[0].astype(jnp.float32) ** 2)
        return jax.grad(loss)(shards)

    mapped = jax.shard_map(gradient, mesh=mesh, in_specs=(specs, P("fsdp")), out_specs=specs, check_vma=False)
    of = lambda shape, dtype, spec: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
    shards = tuple(of((LAYERS, *shape), jnp.float32, spec) for shape, spec in zip(shapes, specs))
    x = of((devices * 512, WIDTH), jnp.bfloat16, P("fsdp"))
    total = collectives(jax.jit(mapped).lower(shards, x).compile().as_text(), devices)
    sent = bytes_by_kind(total)
    kernels = LAYERS * 2 * 2 * WIDTH * WIDTH * 2  # bytes in bfloat16
    padded = LAYERS * devices * 1024 * 4  # the gain's line of float32, 1024 numbers a device
    assert sent["reduce-scatter"] == (kernels + padded) * (devices - 1) // devices
    # What is all-reduced is gathered, which a TPU does in that way for small arrays: no gradient of a layer.
    assert all("all_gather" in x.op_name for x in total if x.kind == "all-reduce")
