"""Training with sequences over several devices has the losses of one device."""

import functools

import jax
import numpy as np
import pytest
from support import training_cases as cases

from deltaformer_jax.config import MeshConfig, Mixer
from deltaformer_jax.sharding.mesh import batch_sharding, make_mesh
from deltaformer_jax.training import step
from deltaformer_jax.training.program import Program
from deltaformer_jax.training.setup import check_batch

LENGTH = 64
WIDE = Mixer("delta_former", write_query="query", kv_shift_window=3, ffn_shift_rank=3)
# At 4 devices: 2 KV heads take the chain and the ring, 4 heads the all-to-all; states; convolutions and KV shifting.
MIXERS = (Mixer("delta_former", write_rope_base=0.0), Mixer("softmax_attention", window=9), WIDE)
MORE = ("gated_delta_net", "gated_linear_attention")
NEWER = ("gated_delta_net_2", "gated_delta_product", "rwkv7")


def losses_on(mesh_config, devices, mixers=MIXERS, steps=3):
    fields = dict(num_heads=4, head_dim=8, implementation=None, vocab_size=64, mixers=mixers)
    fields |= dict(kv_shift=mixers not in (MORE, NEWER), conv_size=3, num_layers=len(mixers))
    config = cases.small_config("", **{f"model__{name}": value for name, value in fields.items()})
    config.data.sequence_length, config.mesh = LENGTH, mesh_config
    mesh = make_mesh(mesh_config, jax.devices()[:devices])
    check_batch(config, mesh)
    program = Program(config, mesh)
    state, train_step = program.create_state(config.run.seed), program.train_step
    draw, losses = np.random.default_rng(0), []
    for _ in range(steps):
        tokens, targets = draw.integers(0, 64, (2, 8, LENGTH), dtype=np.int32)
        # Documents that cross devices, two of them begin at a device's first token, and padding.
        segments = np.repeat([[1, 2, 3, 4, 0]], 8, axis=0).repeat([16, 5, 11, 29, 3], axis=1).astype(np.int32)
        segments[:3] = 1
        segments[0, :35] = 0
        batch = {"tokens": tokens, "targets": targets, "segment_ids": segments}
        state, metrics = train_step(state, jax.device_put(batch, batch_sharding(mesh)))
        losses.append([float(metrics["loss"]), float(metrics["grad_norm"])])
    nats = program.evaluation_step(state.params, jax.device_put(batch, batch_sharding(mesh)))["nats"]
    losses.append([float(np.sum(nats)) / np.sum(segments > 0), losses[-1][1]])
    return np.array(losses)


one_device = functools.cache(functools.partial(losses_on, MeshConfig(), 1))


def check_losses(found, expected):
    # The same sums in another order, through AdamW's division by the gradient's size.
    np.testing.assert_allclose(found[:, 0], expected[:, 0], atol=1e-4)
    np.testing.assert_allclose(found[:, 1], expected[:, 1], rtol=1e-3)


def test_context_over_four_devices():
    mixers = (Mixer("delta_former", ffn_shift_rank=3),)
    check_losses(losses_on(MeshConfig(data=2, context=4), 8, mixers), one_device(mixers))


@pytest.mark.long
@pytest.mark.parametrize(
    "mesh, mixers",
    [
        (MeshConfig(data=2, context=4), MORE),
        # The other meshes take a minute each: on demand.
        pytest.param(MeshConfig(fsdp=2, tensor=2, context=2), MIXERS, marks=pytest.mark.rare),
        pytest.param(MeshConfig(data=2, context=4), MIXERS, marks=pytest.mark.rare),
        pytest.param(MeshConfig(fsdp=2, tensor=2, context=2), MORE, marks=pytest.mark.rare),
        pytest.param(MeshConfig(context=8), MIXERS, marks=pytest.mark.rare),
        pytest.param(MeshConfig(fsdp=2, tensor=2, context=2), NEWER, marks=pytest.mark.rare),
    ],
)
def test_other_meshes_and_mixers(mesh, mixers):
    check_losses(losses_on(mesh, 8, mixers), one_device(mixers))


@pytest.mark.long
def test_logits_in_pieces(monkeypatch):
    """Each device has its own tokens of every piece."""
    monkeypatch.setattr(step, "logits_at_once", lambda mesh: 128 * 4)
    check_losses(losses_on(MeshConfig(data=2, context=4), 8, ("delta_former",)), one_device(("delta_former",)))


def test_a_length_that_does_not_divide():
    config = cases.small_config("", data__sequence_length=30)
    with pytest.raises(ValueError, match=r"data.sequence_length = 30: not a multiple of mesh.context = 4"):
        check_batch(config, make_mesh(MeshConfig(data=2, context=4)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        # Two KV heads on four devices are a chain.
        (
            dict(data__sequence_length=24),
            r"sequence \(data.sequence_length\) a multiple of 16 tokens, or .*_kv_heads\)",
        ),
        (
            dict(model__implementation="parallel"),
            "leave model.implementation out, or give a mesh.context that divides",
        ),
    ],
)
def test_what_the_chain_can_not_do_names_the_fields(fields, message):
    config = cases.small_config("", model__vocab_size=64, **(dict(model__implementation=None) | fields))
    with pytest.raises((ValueError, NotImplementedError), match=message):
        Program(config, make_mesh(MeshConfig(data=2, context=4))).lower_train_step(config.data)


def test_a_mixer_of_your_own():
    config = cases.small_config("", model__mixers=("delta_former", "somewhere:Mixer"))
    with pytest.raises(ValueError, match=r"mesh.context = 4: the mixer somewhere:Mixer is your own"):
        check_batch(config, make_mesh(MeshConfig(data=2, context=4)))
    check_batch(config, make_mesh(MeshConfig(data=8)))
