"""Position biases of the attention mixers: how they start, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support.layers_cases import D_MODEL, HEAD_DIM, HEADS, KV_HEADS, LENGTH, ROWS, make_mixer, normal, outputs

from deltaformer_jax.config import Mixer, ModelConfig
from deltaformer_jax.layers.bias.position_bias import LEAST
from deltaformer_jax.layers.mixers.build import build_mixer
from deltaformer_jax.layers.mixers.delta_former import DeltaFormer
from deltaformer_jax.layers.mixers.softmax_attention import SoftmaxAttention
from deltaformer_jax.sharding.context.over_context import over_context

SIZES = dict(d_model=D_MODEL, num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM, rope_base=None)


def test_how_they_start():
    """Off: no new parameter. Kerple: p and a above 0.01. FIRE: c and L as in the paper. DAPE around ALiBi: ALiBi, and a
    gradient for the last layer of f."""
    make = lambda **options: SoftmaxAttention(**SIZES, **options, rngs=nnx.Rngs(3))
    off = make()
    assert off.position_bias is None
    assert not any("bias" in jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(off))
    kerple = make(position_bias="kerple").position_bias()
    assert np.all(kerple.p >= 2 * LEAST) and np.all(kerple.p <= 2 + LEAST) and np.all(kerple.a <= 1 + LEAST)
    fire = make(position_bias="fire", fire_length=4).position_bias()
    np.testing.assert_allclose([*fire.c, *fire.length], [0.1, 4], rtol=1e-6)
    alibi, dape = make(alibi=True), make(alibi=True, dape_dim=3)
    alibi.inputs, alibi.output = dape.inputs, dape.output
    x = jnp.asarray(normal((ROWS, LENGTH, D_MODEL)), jnp.float32)
    # ALiBi alone is a log decay, whose sums are rounded once per token; the scores are fused in other ways.
    np.testing.assert_allclose(outputs(dape, x), outputs(alibi, x), rtol=0, atol=1e-5)
    gradient = nnx.jit(nnx.grad(lambda mixer: jnp.sum(mixer(x)[0] ** 2)))(dape)
    assert np.abs(np.asarray(gradient["position_bias"]["weight_out"][...])).min() > 0


def test_where_delta_former_has_it():
    """By default its read; each of read and write has its own numbers, those of the write for u's heads."""
    make = lambda **options: make_mixer(DeltaFormer, dict(rope_base=None, position_bias="kerple") | options)
    read, write, both = make(), make(position_bias_in="write", write_query="query"), make(position_bias_in="both")
    assert read.write_bias is write.read_bias is None
    assert both.read_bias().p.shape == write.write_bias().p.shape == (HEADS,) and both.write_bias().p.shape == (2,)
    both.implementation = "parallel"
    gradient = nnx.jit(nnx.grad(lambda mixer, x: jnp.sum(mixer(x)[0] ** 2)))(both, normal((1, 8, D_MODEL)))
    for bias, name in ((bias, name) for bias in ("read_bias", "write_bias") for name in ("log_p", "log_a")):
        assert np.abs(np.asarray(gradient[bias][name][...])).min() > 0
    with pytest.raises(ValueError, match='position_bias_in=\'write\' needs position_bias="kerple" or "fire"'):
        make(position_bias="none", position_bias_in="write")
    with pytest.raises(ValueError, match="position_bias_in='writes' must be one of 'read', 'write', 'both'"):
        make(position_bias_in="writes")


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(position_bias="kerple", alibi=True), "position_bias='kerple' and alibi=True are two biases"),
        (dict(dape_dim=32), "dape_dim=32 needs a static bias: give position_bias="),
        (dict(position_bias="kerpel"), "position_bias='kerpel' must be one of 'none', 'kerple', 'fire'"),
        (dict(dape_dim=-1), "dape_dim=-1 must be at least 0"),
        (dict(position_bias="fire", fire_length=0), "fire_length=0 must be at least 1"),
    ],
)
def test_what_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SoftmaxAttention(**SIZES, **options, rngs=nnx.Rngs(0))


def test_a_config_names_the_field_and_a_layer_has_its_own():
    config = ModelConfig(d_model=8, num_heads=2, num_kv_heads=1, head_dim=4, mixers=("softmax_attention",), dape_dim=2)
    with pytest.raises(ValueError, match=r"model\.dape_dim=2 needs a static bias"):
        build_mixer(config, "softmax_attention", output_scale=1.0, rngs=nnx.Rngs(0))
    own = build_mixer(config, Mixer("softmax_attention", position_bias="fire"), output_scale=1.0, rngs=nnx.Rngs(0))
    assert own.position_bias().static.length == 512 and own.position_bias().scores_in.shape == (2, 2)


def test_what_cannot_be_done_with_one():
    """Biased scores have no KL in `drift`, which shows the rest; a sequence over devices is refused."""
    biased = dict(position_bias="kerple", rope_base=None)
    mixer, read = make_mixer(SoftmaxAttention, biased), make_mixer(DeltaFormer, biased)
    written = make_mixer(DeltaFormer, dict(biased, position_bias_in="write"))
    x, positions = jnp.zeros((1, 3, D_MODEL)), jnp.zeros((1, 3), jnp.int32)
    for one, left in ((mixer, []), (read, ["write"]), (written, ["read"])):
        assert list(one.compared(x, segment_ids=None, positions=positions)) == left
    for name, bias in (("position_bias", mixer.position_bias()), ("write_bias", written.write_bias())):
        with pytest.raises(NotImplementedError, match=rf"{name}: .* set mesh\.context=1"):
            over_context(None, {"query": x, name: bias}, "context")
