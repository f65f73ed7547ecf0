"""What devices of the mesh axis "tensor" send of the activations in a layer, counted in programs compiled here."""

import functools
from collections import Counter

import jax
import numpy as np
import pytest
from support import training_cases as cases

from deltaformer_jax.compiled.collectives import collectives, in_layers
from deltaformer_jax.compiled.hlo import sizes_of
from deltaformer_jax.config import MeshConfig, Mixer
from deltaformer_jax.model_parts import model_parts
from deltaformer_jax.sharding.mesh import make_mesh, on_mesh
from deltaformer_jax.training.program import abstract_batch
from deltaformer_jax.training.setup import check_batch
from deltaformer_jax.training.state import parameter_shardings
from deltaformer_jax.training.step import loss_and_gradient

BATCH, LENGTH, WIDTH, LAYERS = 4, 16, 48, 2
# More kernels that read x than q, k and v: a projected write query, an output gate, gates of one number a head. And a
# second key, which is made of the first.
GATED = Mixer(
    "delta_former", write_query="projected", output_gate="on", alpha="sigmoid", write_rope_base=0.0, ffn_shift_rank=4
)
MORE = [("softmax_attention", "on"), ("gated_delta_net", "on"), ("kimi_delta_attention", "on"), ("retention", "on")]


def sent_in_a_layer(mixer, *, sequence_parallel):
    """Kind -> how many arrays as large as the activations [B, T, d_model] a layer sends by it, forward and backward."""
    config = cases.small_config(
        "", model__mixers=(mixer,), model__vocab_size=64, model__num_layers=LAYERS, model__d_model=WIDTH,
        model__remat="block", data__batch_size=BATCH, data__sequence_length=LENGTH,
    )  # fmt: skip
    if mixer is not GATED:
        config.model.implementation = None
    config.mesh = MeshConfig(tensor=2, sequence_parallel=sequence_parallel)
    mesh, parts = make_mesh(config.mesh, jax.devices()[:2]), model_parts(config.model)

    def gradient(params, batch):
        return loss_and_gradient(parts, params, batch, 1)

    params = jax.tree.map(lambda x, cut: x.update(sharding=cut), parts.params, parameter_shardings(parts, mesh))
    step = jax.jit(on_mesh(mesh, gradient, sequence_parallel=sequence_parallel))
    text = step.lower(params, abstract_batch(config.data, mesh)).compile().as_text()
    found = Counter()
    for x in in_layers(collectives(text, 2)):
        sizes = [int(np.prod(sizes_of(size))) for size in _shapes(x.shape)]
        whole = BATCH * LENGTH * WIDTH // (2 if x.kind == "reduce-scatter" else 1)
        assert x.turns == LAYERS
        found[x.kind] += sizes.count(whole) if x.group > 1 else 0
    return +found


def _shapes(shape):
    return [part.partition("]")[0] for part in shape.split("[")[1:]]


def test_activations_are_summed_twice_forward_and_three_times_backward():
    """After the mixer and the feed-forward layer; before each, and once again where a layer is computed again."""
    assert sent_in_a_layer(GATED, sequence_parallel=False) == {"all-reduce": 5}


@pytest.mark.long
@pytest.mark.parametrize("name, gate", MORE)
def test_so_they_are_in_other_mixers(name, gate):
    assert sent_in_a_layer(Mixer(name, output_gate=gate), sequence_parallel=False) == {"all-reduce": 5}


@pytest.mark.parametrize("mixer", [GATED, pytest.param("kimi_delta_attention", marks=pytest.mark.long)])
def test_sums_are_scattered_over_tokens_with_sequence_parallelism(mixer):
    """A sum becomes a reduce-scatter, and an all-gather where the next product needs all tokens. The last layer of what
    is computed again ends before its scatter; its product's cotangent is gathered."""
    assert sent_in_a_layer(mixer, sequence_parallel=True) == {"all-gather": 6, "reduce-scatter": 5}


def test_what_sequence_parallelism_needs():
    make = functools.partial(cases.small_config, "", data__batch_size=8)
    with pytest.raises(ValueError, match=r"mesh.sequence_parallel = True: .*mesh.tensor, which is 1; set mesh.tensor"):
        check_batch(make(mesh__sequence_parallel=True), make_mesh(MeshConfig()))
    odd = make(mesh__sequence_parallel=True, data__sequence_length=30)
    with pytest.raises(ValueError, match=r"sequence_length = 30: not a multiple of .* = 1 \* 4, as mesh.sequence_par"):
        check_batch(odd, make_mesh(MeshConfig(data=2, tensor=4)))
