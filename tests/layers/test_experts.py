"""Mixtures of experts against the sum over experts in float64, and what their routing must keep."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaformer_jax.config import Mixer, ModelConfig
from deltaformer_jax.layers.feed_forward import ExpertsFeedForward, SwiGLU
from deltaformer_jax.layers.feed_forward.routing import Router, Routing, norm_factor, router_losses
from deltaformer_jax.model import LanguageModel
from deltaformer_jax.ops.grouped_product import BLOCK, grouped_product

rng = np.random.default_rng(0)
silu = lambda x: x / (1 + np.exp(-x))


ROWS = 2 * BLOCK + 40


@jax.jit
def grouped_and_gradients(x, matrices, sizes, dy):
    found, pull = jax.vjp(lambda x, matrices: grouped_product(x, matrices, sizes), x, matrices)
    return found, *pull(dy)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, ROWS), min_size=2, max_size=3), st.integers(0, 99))
def test_a_grouped_product_is_one_product_for_each_group(ends, seed):
    """Values and gradients, with empty groups and NaN after the last group, in float64."""
    ends = sorted(ends)
    sizes, rows = np.diff([0, *ends]), ends[-1]
    draw = np.random.default_rng(seed)
    matrices, x, dy = draw.normal(size=(len(sizes), 3, 4)), draw.normal(size=(ROWS, 3)), draw.normal(size=(ROWS, 4))
    group = np.repeat(np.arange(len(sizes)), sizes)
    expected, dx, d_matrices = np.zeros((ROWS, 4)), np.zeros((ROWS, 3)), np.zeros_like(matrices)
    expected[:rows] = np.einsum("ni,nio->no", x[:rows], matrices[group])
    dx[:rows] = np.einsum("no,nio->ni", dy[:rows], matrices[group])
    np.add.at(d_matrices, group, np.einsum("ni,no->nio", x[:rows], dy[:rows]))
    x[rows:] = np.nan
    with jax.enable_x64(True):
        found = grouped_and_gradients(*map(jnp.array, (x, matrices, sizes, dy)))
    for ours, right in zip(found, (expected, dx, d_matrices)):
        np.testing.assert_allclose(ours, right, rtol=1e-12, atol=1e-12)


def test_what_a_grouped_product_refuses():
    with pytest.raises(ValueError, match=re.escape("x [n, in], matrices [E, in, out] and sizes [E]")):
        grouped_product(jnp.ones((4, 3)), jnp.ones((2, 5, 3)), jnp.ones(2, int))
    with pytest.raises(TypeError, match="integer sizes"):
        grouped_product(jnp.ones((4, 3)), jnp.ones((2, 3, 5)), jnp.ones(2))


def layer_of(num_experts=4, experts_per_token=2, **more):
    return ExpertsFeedForward(
        6, 8, num_experts=num_experts, experts_per_token=experts_per_token, rngs=nnx.Rngs(0), **more
    )


def of_experts(layer, x, weights):
    """Σ_e weights_e FFN_e(x) in float64: x [B,T,d], weights [B,T,E]."""
    gate, up, down = (np.asarray(w[...], np.float64) for w in (layer.gate, layer.up, layer.down))
    hidden = silu(np.einsum("btd,edf->btef", x, gate)) * np.einsum("btd,edf->btef", x, up)
    return np.einsum("bte,btef,efd->btd", weights, hidden, down)


@pytest.mark.parametrize("router", ["softmax", "not renormalised", "norm", "shared"])
def test_it_is_the_sum_over_the_largest(router):
    more = {"router": "norm"} if router == "norm" else {"shared_experts": 2} if router == "shared" else {}
    layer = layer_of(**more, renormalise_experts=router != "not renormalised")
    x = rng.normal(size=(2, 9, 6))
    numbers = x @ np.asarray(layer.router.kernel[...], np.float64)
    if router == "norm":
        scores = norm_factor(4, 2) * np.maximum(numbers, 0) / np.linalg.norm(numbers, axis=-1, keepdims=True)
    else:
        scores = np.exp(numbers) / np.exp(numbers).sum(-1, keepdims=True)
    weights = np.where(scores >= np.sort(scores, axis=-1)[..., -2:-1], scores, 0)
    if router in ("softmax", "shared"):
        weights /= weights.sum(-1, keepdims=True)
    expected = of_experts(layer, x, weights)
    if router == "shared":
        assert layer.shared.mlp_dim == 16
        expected = expected + np.asarray(layer.shared(x.astype(np.float32)))
    y, routing = jax.jit(lambda x: layer.routed(x))(x.astype(np.float32))
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
    assert routing.counts.sum() == 2 * 18 and routing.probabilities.sum() == pytest.approx(18, rel=1e-6)
    assert routing.squares == pytest.approx((np.log(np.exp(numbers).sum(-1)) ** 2).sum(), rel=1e-5)
    flops = 2 * 6 * 4 + 6 * 6 * 8 * (4 if router == "shared" else 2)
    assert layer.flops_per_token(3) == flops


def test_one_expert_is_a_dense_layer_bit_for_bit():
    layer, dense = layer_of(1, 1), SwiGLU(6, 8, rngs=nnx.Rngs(1))
    for name in ("gate", "up", "down"):
        getattr(dense, name)[...] = getattr(layer, name)[...][0]
    x = jnp.asarray(rng.normal(size=(2, 5, 6)), jnp.float32)
    np.testing.assert_array_equal(jax.jit(lambda x: layer(x))(x), jax.jit(lambda x: dense(x))(x))


def test_equal_experts_are_one_and_their_order_does_not_matter():
    layer = layer_of()
    x = jnp.asarray(rng.normal(size=(2, 5, 6)), jnp.float32)
    graph, state = nnx.split(layer)
    run = jax.jit(lambda state: nnx.merge(graph, state)(x))
    order = jnp.array([2, 0, 3, 1])
    moved = jax.tree.map(lambda leaf: leaf[:, order] if leaf.shape == (6, 4) else leaf[order], state)
    np.testing.assert_allclose(run(moved), run(state), rtol=1e-6, atol=1e-6)
    alike = jax.tree.map(lambda leaf: leaf if leaf.shape == (6, 4) else jnp.broadcast_to(leaf[:1], leaf.shape), state)
    dense = of_experts(nnx.merge(graph, alike), np.asarray(x, np.float64), np.eye(4)[0] * np.ones((2, 5, 1)))
    np.testing.assert_allclose(run(alike), dense, rtol=1e-5, atol=1e-6)


def test_padding_goes_nowhere_and_is_counted_nowhere():
    layer = layer_of(shared_experts=1)
    x = rng.normal(size=(1, 7, 6)).astype(np.float32)
    segment_ids = np.array([[0, 1, 1, 2, 2, 0, 0]])
    dirty = np.where(segment_ids[..., None] != 0, x, np.nan)

    def total(x, segment_ids):
        y, routing = layer.routed(x, segment_ids)
        return jnp.sum(y**2), (y, routing)

    run = jax.jit(jax.value_and_grad(total, has_aux=True))
    (_, (y, routing)), slope = run(dirty, segment_ids)
    (_, (alone, of_real)), slope_alone = run(x[:, 1:5], np.ones((1, 4), int))
    np.testing.assert_allclose(y[:, 1:5], alone, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(slope[:, 1:5], slope_alone, rtol=1e-5, atol=1e-6)
    assert not np.any(y[segment_ids == 0]) and not np.any(slope[segment_ids == 0])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), routing, of_real)


def test_losses_of_routers():
    """1 where all experts are used alike, E where one has all tokens; their sum over parts is that of the whole."""
    even = Routing(jnp.full((1, 4), 10.0), jnp.full((1, 4), 5.0), jnp.array([20.0]))
    assert [float(x) for x in router_losses(even)] == [1, 1]
    one = Routing(jnp.array([[40.0, 0, 0, 0]]), jnp.array([[20.0, 0, 0, 0]]), jnp.array([0.0]))
    assert [float(x) for x in router_losses(one)] == [4, 0]
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), even, one)
    assert float(router_losses(both)[0]) == 2.5
    nothing = jax.tree.map(jnp.zeros_like, even)
    assert [float(x) for x in router_losses(nothing)] == [0, 0]


def test_a_norm_router_does_not_see_its_kernels_length():
    router = Router(6, 8, 2, kind="norm", renormalise=True, rngs=nnx.Rngs(0))
    x, real = jnp.asarray(rng.normal(size=(50, 6)), jnp.float32), jnp.ones(50, bool)
    experts, weights, _ = router(x, real)
    router.kernel[...] = 7 * router.kernel[...]
    again, same, _ = router(x, real)
    np.testing.assert_array_equal(experts, again)
    np.testing.assert_allclose(weights, same, rtol=1e-5)
    # The mean square length of a token's weights is 1 where the logits are normal: the factor by its definition.
    z = np.random.default_rng(1).normal(size=(100_000, 8))
    top = np.sort(np.maximum(z, 0) / np.linalg.norm(z, axis=-1, keepdims=True), axis=-1)[:, -2:]
    assert norm_factor(8, 2) ** 2 * np.mean(np.sum(top**2, axis=-1)) == pytest.approx(1, rel=0.01)


TINY = dict(vocab_size=32, d_model=16, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=8, mlp_dim=24)


def test_a_model_with_experts():
    """Decoding is the forward pass; packed documents are separate ones; layers without experts stand beside."""
    mixers = ("softmax_attention", Mixer("softmax_attention", feed_forward="relu"))
    config = ModelConfig(**TINY, mixers=mixers, feed_forward="moe", num_experts=3, shared_experts=1)
    model = LanguageModel(config, rngs=nnx.Rngs(0))
    experts, other = (block.mlp for block in model.blocks)
    assert experts.expert_dim == 8 and type(other).__name__ == "ReluFeedForward"
    tokens = rng.integers(0, 32, (2, 8))
    whole, _ = model(tokens)
    cache, parts = model.init_cache(2, 8), []
    for piece in (tokens[:, :7], tokens[:, 7:]):
        logits, cache = model(piece, cache=cache)
        parts.append(logits)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, rtol=1e-4, atol=1e-5)
    packed, _ = model(tokens.reshape(1, -1), segment_ids=np.repeat([[1, 2]], 8, axis=1))
    np.testing.assert_allclose(packed.reshape(whole.shape), whole, rtol=1e-4, atol=1e-5)
    x, routing = model.routed(tokens)
    assert routing.counts.shape == (1, 3) and routing.counts.sum() == 2 * 16
    off, routing = model.routed(tokens, active=jnp.array([False, True]))
    assert routing.counts.sum() == 0 and np.any(np.asarray(off) != np.asarray(x))
    no_experts = LanguageModel(ModelConfig(**TINY), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="no layer is a mixture of experts"):
        no_experts.routed(tokens)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(feed_forward="moe", experts_per_token=9), "model.experts_per_token=9 must be at most num_experts=8"),
        (dict(num_experts=4), "model.num_experts = 4: no layer has model.feed_forward = 'moe', which alone reads it"),
        (dict(balance_loss=0.0), "model.balance_loss = 0.0: no layer has"),
        (dict(feed_forward_similarity="relu"), "no layer has model.feed_forward = 'memory'"),
        (dict(feed_forward="moe", router="hash"), "model.router = 'hash'"),
        (
            dict(feed_forward="moe", mixers=("delta_former", Mixer("delta_net", num_experts=2))),
            "model.num_experts: must be one for all layers of experts; there are [2, 8]",
        ),
    ],
)
def test_what_is_refused(fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        jax.eval_shape(lambda: LanguageModel(ModelConfig(**TINY | fields), rngs=nnx.Rngs(0)))
