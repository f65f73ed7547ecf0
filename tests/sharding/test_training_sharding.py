"""The table of axis names, meshes that can't be, and eight devices that do what one does."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from support import training_cases as cases

from deltaformer_jax.config import MeshConfig
from deltaformer_jax.sharding.mesh import batch_sharding, make_mesh, partition, rows
from deltaformer_jax.training import step
from deltaformer_jax.training.program import Program
from deltaformer_jax.training.setup import check_batch

CUBE = MeshConfig(data=2, fsdp=2, tensor=2)


def test_partition_follows_the_table():
    mesh = make_mesh(CUBE)
    assert partition(("embed", "mlp"), (32, 64), mesh) == PartitionSpec("fsdp", "tensor")
    assert partition(("vocab", "embed"), (64, 32), mesh) == PartitionSpec("tensor", "fsdp")
    # Right-aligned: stacked layers are not cut.
    stacked = partition(("heads", "head_dim", "embed"), (5, 4, 16, 32), mesh)
    assert stacked == PartitionSpec(None, "tensor", None, "fsdp")
    # What doesn't divide stays whole, the rest is still cut.
    assert partition(("embed", "kv_heads"), (32, 3), mesh) == PartitionSpec("fsdp", None)
    # Two names of one mesh axis: the left one gets it.
    assert partition(("heads", "mlp"), (4, 4), mesh) == PartitionSpec("tensor", None)
    assert partition(("a name of no rule", None), (4, 4), mesh) == PartitionSpec(None, None)
    assert partition((), (), mesh) == PartitionSpec()
    with pytest.raises(ValueError, match="names 2 axes"):
        partition(("embed", "mlp"), (4,), mesh)


def test_mesh_takes_what_is_left():
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2))
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "expert": 1, "tensor": 2, "context": 1} and rows(mesh) == 4


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MeshConfig(context=3), "context 3 = 6 devices, but there are 8"),
        (MeshConfig(data=3), "data 3 .* = 3 devices, but there are 8"),
        (MeshConfig(fsdp=16), "= 16 devices, but there are 8"),
        (MeshConfig(tensor=0), "mesh.tensor = 0"),
        (MeshConfig(data=-2), "mesh.data = -2"),
        (MeshConfig(fsdp=-1), "mesh.fsdp = -1"),
    ],
)
def test_meshes_that_cannot_be(config, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(config)


def test_batch_must_divide():
    config = cases.small_config("", data__batch_size=12, optimizer__accumulation_steps=2)
    with pytest.raises(ValueError, match=r"data.batch_size = 12: not a multiple of .* = 2 \* 2 \* 2 = 8"):
        check_batch(config, make_mesh(CUBE))
    check_batch(config, make_mesh(MeshConfig(data=2, fsdp=1, tensor=4)))


def losses_on(mesh_config, devices, steps=20):
    config = cases.small_config("", model__vocab_size=64, optimizer__accumulation_steps=2)
    config.mesh = mesh_config
    mesh = make_mesh(mesh_config, jax.devices()[:devices])
    program = Program(config, mesh)
    state, step = program.create_state(config.run.seed), program.train_step
    draw, losses = np.random.default_rng(0), []
    for _ in range(steps):
        tokens, targets = draw.integers(0, 64, (2, 8, 32), dtype=np.int32)
        segments = np.ones((8, 32), np.int32)
        segments[:3, 20:] = 0
        batch = {"tokens": tokens, "targets": targets, "segment_ids": segments}
        state, metrics = step(state, jax.device_put(batch, batch_sharding(mesh)))
        losses.append([float(metrics["loss"]), float(metrics["grad_norm"])])
    return np.array(losses), state


def test_eight_devices_do_what_one_does():
    one, _ = losses_on(MeshConfig(data=1), 1)
    eight, state = losses_on(CUBE, 8)
    np.testing.assert_allclose(one[:, 0], eight[:, 0], atol=1e-4)
    np.testing.assert_allclose(one[:, 1], eight[:, 1], rtol=1e-3)

    # The moments lie exactly as their parameters do, and the large ones are really cut.
    leaves = dict(jax.tree_util.tree_leaves_with_path(state))
    cut = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.params):
        moments = [
            other
            for where, other in leaves.items()
            if where[0] == jax.tree_util.GetAttrKey("opt_state") and where[-len(path) :] == path
        ]
        assert len(moments) == 2
        assert all(moment.sharding.is_equivalent_to(leaf.sharding, leaf.ndim) for moment in moments)
        cut += leaf.sharding.shard_shape(leaf.shape) != leaf.shape
    table = state.params["embedding"]["table"]
    assert table.sharding.spec == PartitionSpec("tensor", "fsdp")
    assert cut >= 8
    assert state.step.sharding.is_fully_replicated


def test_the_first_weights_do_not_depend_on_the_mesh():
    config = cases.small_config("", model__vocab_size=64)
    states = []
    for mesh in (make_mesh(MeshConfig(), jax.devices()[:1]), make_mesh(CUBE)):
        program = Program(config, mesh)
        states.append(program.create_state(config.run.seed))
    cases.assert_same_bits(*states)
    other = program.create_state(1)
    table = [np.asarray(state.params["embedding"]["table"]) for state in (states[0], other)]
    assert not np.array_equal(*table)


def test_logits_in_pieces_on_a_mesh_that_shards_the_vocabulary(monkeypatch):
    """Loss and gradient norm of a step on eight devices, its logits in pieces of 4 positions, and on one at once."""
    expected, _ = losses_on(MeshConfig(), 1, steps=2)
    monkeypatch.setattr(step, "logits_at_once", lambda mesh: 128 * 4)  # a group has one row of a part of the batch
    found, _ = losses_on(CUBE, 8, steps=2)
    # The bounds of test_eight_devices_do_what_one_does: the same sums in another order.
    np.testing.assert_allclose(found[:, 0], expected[:, 0], atol=1e-4)
    np.testing.assert_allclose(found[:, 1], expected[:, 1], rtol=1e-3)
