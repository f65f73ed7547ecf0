"""Compiled for TPUs, with none at hand: what is reduce-scattered here is so there, and never summed whole.

Gradients of shards at every size, and activations over "tensor" with sequence parallelism.
"""

import os

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from deltaformer_jax.compiled.collectives import bytes_by_kind, collectives, in_layers
from deltaformer_jax.config import Config, DataConfig, MeshConfig, ModelConfig
from deltaformer_jax.sharding.mesh import make_mesh
from deltaformer_jax.sharding.shards import all_shards
from deltaformer_jax.training.ahead_of_time.topologies import find_topology, without_cache
from deltaformer_jax.training.program import Program

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
    with without_cache():
        total = collectives(jax.jit(mapped).lower(shards, x).compile().as_text(), devices)
    sent = bytes_by_kind(total)
    kernels = LAYERS * 2 * 2 * WIDTH * WIDTH * 2  # bytes in bfloat16
    assert kernels * 0.9 < sent["reduce-scatter"] < kernels * 1.4  # the gain's line is padded to whole tiles
    # What is all-reduced is gathered, which a TPU does in that way for small arrays: no gradient of a layer.
    assert all("all_gather" in x.op_name for x in total if x.kind == "all-reduce")


@pytest.mark.rare
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_activations_over_tensor(sequence_parallel):
    pytest.importorskip("libtpu", reason="compiles for TPUs; the extra tpu")
    width, rows, length, layers = 512, 2, 512, 4
    model = ModelConfig(
        d_model=width, num_layers=layers, num_heads=4, num_kv_heads=4, head_dim=128, mlp_dim=1024, vocab_size=1024,
        mixers=("delta_former",), compute_dtype="bfloat16", remat="block",
    )  # fmt: skip
    mesh = MeshConfig(data=1, fsdp=2, tensor=2, sequence_parallel=sequence_parallel)
    config = Config(model=model, data=DataConfig(sequence_length=length, batch_size=2 * rows), mesh=mesh)
    program = Program(config, make_mesh(mesh, find_topology("v5e:2x2").devices))
    found = in_layers(collectives(program.compile_train_step(config.data).as_text(), 4))
    sent = bytes_by_kind(x for x in found if set(x.members) <= {0, 1})  # along "tensor", the inner axis here
    one = rows * length * width * 2 // 2  # bytes that a device sends to gather an activation or to scatter a sum
    small = one // 4  # norms' gains, and gates of one number a head
    sums, gathers = (5, 6) if sequence_parallel else (0, 0)
    assert abs(sent["reduce-scatter"] / layers - sums * one) < small
    assert abs(sent["all-gather"] / layers - gathers * one) < small
    assert abs(sent["all-reduce"] / layers - (0 if sequence_parallel else 5 * 2 * one)) < small
