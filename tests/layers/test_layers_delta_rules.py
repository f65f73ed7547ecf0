"""The mixers of newer delta rules are older ones in their simplest settings, with the same parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support.layers_cases import D_MODEL, LENGTH, ROWS, make_mixer, normal, outputs

from deltaformer_jax.layers.mixers.delta_net import DeltaNet
from deltaformer_jax.layers.mixers.delta_rules.delta_product import DeltaProduct, GatedDeltaProduct
from deltaformer_jax.layers.mixers.delta_rules.gated_delta_net_2 import GatedDeltaNet2
from deltaformer_jax.layers.mixers.gated_delta_net import GatedDeltaNet
from deltaformer_jax.layers.mixers.kimi_delta_attention import KimiDeltaAttention


@pytest.mark.parametrize("one, other", [(DeltaProduct, DeltaNet), (GatedDeltaProduct, GatedDeltaNet)])
def test_one_step_a_token_is_delta_net(one, other):
    """The same parameters from a seed, by name and value, and the same output."""
    sizes = dict(num_heads=2, num_value_heads=4, head_dim=6, negative_eigenvalues=True)
    product = one(D_MODEL, **sizes, householder_steps=1, rngs=nnx.Rngs(3))
    net = other(D_MODEL, **sizes, rngs=nnx.Rngs(3))
    named = lambda module: {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(module)}
    ours, theirs = named(product), named(net)
    assert ours.keys() == theirs.keys() and all(np.array_equal(ours[name], theirs[name]) for name in ours)
    assert product.flops_per_token(9) == net.flops_per_token(9)
    x = jnp.asarray(normal((ROWS, LENGTH, D_MODEL)), jnp.float32)
    np.testing.assert_array_equal(outputs(product, x), outputs(net, x))


@pytest.mark.parametrize("options", [dict(negative_eigenvalues=True), dict(num_value_heads=8, decay_lower_bound=-5.0)])
def test_gated_delta_net_2_with_equal_gates_is_kimi_delta_attention(options):
    """b = w = β: every channel of a head has the kernel and bias of its β."""
    with jax.enable_x64(True):
        kimi = make_mixer(KimiDeltaAttention, options, dtype=jnp.float64)
        two = make_mixer(GatedDeltaNet2, options, dtype=jnp.float64)
        two.inputs, two.decay, two.output = kimi.inputs, kimi.decay, kimi.output
        for gate in (two.erase, two.write):
            for ours, theirs in ((gate.kernel, kimi.beta.kernel), (gate.bias, kimi.beta.bias)):
                ours[...] = jnp.broadcast_to(theirs[...][..., None], ours.shape)
        x = jnp.asarray(normal((ROWS, LENGTH, D_MODEL)))
        np.testing.assert_allclose(outputs(two, x), outputs(kimi, x), rtol=1e-10, atol=1e-11)


def test_a_cache_counts_tokens_and_not_steps():
    mixer = make_mixer(DeltaProduct, dict(householder_steps=3))
    x = jnp.asarray(normal((ROWS, 5, D_MODEL)), jnp.float32)
    segment_ids = jnp.asarray([[1, 1, 1, 1, 0], [0, 0, 1, 1, 1]])
    _, cache = jax.jit(lambda x, cache: mixer(x, segment_ids=segment_ids, cache=cache))(x, mixer.init_cache(ROWS, 9))
    np.testing.assert_array_equal(cache.length, [4, 3])
