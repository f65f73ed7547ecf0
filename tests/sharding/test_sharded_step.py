"""A training step on meshes of eight devices does what one device does, whatever is split and however it is sent."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from support import training_cases as cases

from deltaformer_jax.config import MeshConfig, Mixer
from deltaformer_jax.model_parts import model_parts
from deltaformer_jax.sharding.mesh import batch_sharding, make_mesh
from deltaformer_jax.training.on_mesh.kept_whole import check_split
from deltaformer_jax.training.program import Program


def two_steps(mesh_config, devices, **fields):
    """(losses and gradient norms [2, 2], the state after two steps on random tokens, padding in some rows)."""
    config = cases.small_config("", model__vocab_size=64, optimizer__accumulation_steps=2, **fields)
    config.mesh = mesh_config
    mesh = make_mesh(mesh_config, jax.devices()[:devices])
    program = Program(config, mesh)
    state, draw, seen = program.create_state(0), np.random.default_rng(0), []
    for _ in range(2):
        tokens, targets = draw.integers(0, 64, (2, 16, 16), dtype=np.int32)
        segments = np.ones((16, 16), np.int32)
        segments[:3, 10:] = 0
        batch = {"tokens": tokens, "targets": targets, "segment_ids": segments}
        state, metrics = program.train_step(state, jax.device_put(batch, batch_sharding(mesh)))
        seen.append([float(metrics["loss"]), float(metrics["grad_norm"])])
    return np.array(seen), state


@pytest.fixture(scope="module")
def one():
    return two_steps(MeshConfig(), 1)


@pytest.mark.parametrize(
    "mesh, fields",
    [
        (MeshConfig(recipe="fsdp"), {"model__remat": "block"}),
        (MeshConfig(data=4, fsdp=2, zero1=True), {}),
        # A size that fsdp does not divide: the parameters are whole, and their gradients summed over all rows.
        (MeshConfig(data=2, fsdp=4), {"model__d_model": 30}),
        (MeshConfig(recipe="fsdp+tensor", tensor=2), {"model__num_heads": 4, "model__num_kv_heads": 1}),
        (MeshConfig(recipe="fsdp+tensor", tensor=2, sequence_parallel=True), {"model__remat": "block"}),
        (
            MeshConfig(data=2, fsdp=2, tensor=2),
            {
                "model__mixers": ("softmax_attention", Mixer("delta_former", dape_dim=4, position_bias_in="both")),
                "model__position_bias": "kerple",
                "model__rope_base": 0.0,
            },
        ),
        (
            MeshConfig(data=1, fsdp=2, tensor=2, context=2, sequence_parallel=True),
            {"model__num_kv_heads": 1, "model__implementation": "chunked"},
        ),
    ],
    ids=["fsdp", "zero1", "whole", "tensor", "sequence", "position bias", "sequence+context"],
)
@pytest.mark.long
def test_it_is_one_devices_step(one, mesh, fields):
    changed = {name: value for name, value in fields.items() if name != "model__remat"}
    expected, state = two_steps(MeshConfig(), 1, **changed) if changed else one
    found, sharded = two_steps(mesh, 8, **fields)
    # The same float32 sums over 512 tokens in another order: rounding of 2⁻²⁴ a term, which adds up like a random walk.
    np.testing.assert_allclose(found, expected, rtol=512**0.5 * 2**-20)
    # Adam's first updates are nearly the gradient's sign times the rate, so a parameter with a gradient near 0 moves by
    # up to twice the rate, 3e-3 after warm-up's first third: compared by their mean distance.
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(sharded.params), strict=True):
        assert np.mean(np.abs(np.asarray(a) - np.asarray(b))) < 1e-5


@pytest.mark.long
def test_zero1_cuts_what_the_optimiser_keeps_over_data():
    _, state = two_steps(MeshConfig(data=4, fsdp=2, zero1=True), 8)
    own = lambda tree: sum(leaf.addressable_shards[0].data.size for leaf in jax.tree.leaves(tree))
    whole = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
    # Only what no axis divides is whole: gains and gates of two heads.
    assert own(state.opt_state) < 1.05 * whole(state.opt_state) / 8
    assert own(state.params) > whole(state.params) / 2.2
    table = state.params["embedding"]["table"].sharding.spec
    assert table == PartitionSpec("tensor", "fsdp")


def test_what_is_whole_is_said_by_name_and_refused_if_strict():
    config = cases.small_config("", model__vocab_size=64, model__d_model=50, model__num_kv_heads=1)
    parts, mesh, said = model_parts(config.model), make_mesh(MeshConfig(fsdp=4, tensor=2)), []
    check_split(parts, mesh, False, said.append)
    assert len(said) == 2
    assert said[0].startswith("mesh.tensor = 2 does not divide kv_heads = 1") or said[0].startswith("mesh.fsdp = 4")
    assert any("mesh.fsdp = 4 does not divide embed = 50: every device holds all of blocks.0" in line for line in said)
    with pytest.raises(ValueError, match=r"does not divide embed = 50.*or set mesh.strict=False"):
        check_split(parts, mesh, True, said.append)
    whole = []
    check_split(parts, make_mesh(MeshConfig(data=8)), True, whole.append)
    assert not whole
    # Neither 50 nor the heads' widths can be split over data, but the vocabulary can.
    check_split(parts, make_mesh(MeshConfig(data=8)), False, whole.append, zero1=True)
    (line,) = whole
    assert line.startswith("mesh.data = 8 divides no size of blocks.0.") and "as mesh.zero1 needs" in line
    assert "table" not in line
    even = model_parts(cases.small_config("", model__vocab_size=64).model)
    check_split(even, make_mesh(MeshConfig(data=8)), True, whole.append, zero1=True)
    assert len(whole) == 1
