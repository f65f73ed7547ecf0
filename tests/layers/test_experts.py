"""Mixtures of experts against the sum over experts in float64, and what their routing must keep."""

import dataclasses
import functools
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
from deltaformer_jax.ops.grouped_product import _at_once, _ragged, from_blocks, grouped_product, layout, to_blocks
from deltaformer_jax.training.loss import router_terms, summed_nats

rng = np.random.default_rng(0)
silu = lambda x: x / (1 + np.exp(-x))


@functools.partial(jax.jit, static_argnames="form")
def of_rows(x, matrices, experts, dy, form):
    """Σ_j x_t W_{e(t, j)} and its gradients, by way of the layout."""

    def total(x, matrices):
        at = layout(experts, len(matrices))
        return jnp.sum(from_blocks(form(to_blocks(x, at), matrices, at.group), at), axis=1)

    y, pull = jax.vjp(total, x, matrices)
    return y, *pull(dy)


@settings(max_examples=25, deadline=None)
@given(st.sampled_from([(1, 1, 2), (5, 2, 3), (70, 3, 4), (600, 2, 3)]), st.floats(0, 1), st.integers(0, 99))
@pytest.mark.parametrize("form", [grouped_product, _at_once, _ragged])
def test_a_grouped_product_is_one_product_for_each_row(form, sizes, skew, seed):
    """Values and gradients in float64, where some rows go to no expert and most may go to one."""
    (n, k, number), draw = sizes, np.random.default_rng(seed)
    shares = np.full(number + 1, (1 - skew) / (number + 1)) + skew * np.eye(number + 1)[seed % (number + 1)]
    experts = draw.choice(number + 1, size=(n, k), p=shares)
    x, matrices, dy = draw.normal(size=(n, 3)), draw.normal(size=(number, 3, 4)), draw.normal(size=(n, 4))
    chosen = np.concatenate([np.eye(number), np.zeros((1, number))])[experts].sum(1)  # [n, E], how often
    expected = np.einsum("ne,ni,eio->no", chosen, x, matrices)
    dx, d_matrices = np.einsum("ne,no,eio->ni", chosen, dy, matrices), np.einsum("ne,ni,no->eio", chosen, x, dy)
    with jax.enable_x64(True):
        found = of_rows(*map(jnp.array, (x, matrices, experts, dy)), form)
    for ours, right in zip(found, (expected, dx, d_matrices)):
        np.testing.assert_allclose(ours, right, rtol=1e-11, atol=1e-11)


def test_few_rows_make_few_blocks():
    """A decoding step reads the matrices of its own experts alone; a large batch is filled up by an eighth at most."""
    assert layout(jnp.array([[3, 7]]), 8).group.tolist() == [3, 7]
    at = jax.eval_shape(lambda: layout(jnp.zeros((4096, 2), int), 8))
    assert at.choice.shape == (72, 128)


def test_what_a_grouped_product_refuses():
    with pytest.raises(ValueError, match=re.escape("x [blocks, block, in], matrices [E, in, out] and group [blocks]")):
        grouped_product(jnp.ones((1, 4, 3)), jnp.ones((2, 5, 3)), jnp.zeros(1, int))
    with pytest.raises(TypeError, match="integers group"):
        grouped_product(jnp.ones((1, 4, 3)), jnp.ones((2, 3, 5)), jnp.zeros(1))


def layer_of(num_experts=4, experts_per_token=2, **more):
    return ExpertsFeedForward(
        6, 8, num_experts=num_experts, experts_per_token=experts_per_token, rngs=nnx.Rngs(0), **more
    )


def of_experts(layer, x, weights):
    """Σ_e weights_e FFN_e(x) in float64: x [B,T,d], weights [B,T,E]."""
    gate, up, down = (
        np.asarray(w[...], np.float64) for w in (layer.experts.gate, layer.experts.up, layer.experts.down)
    )
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
        getattr(dense, name)[...] = getattr(layer.experts, name)[...][0]
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


@pytest.mark.parametrize("router", ["softmax", "norm"])
def test_padding_goes_nowhere_and_is_counted_nowhere(router):
    layer = layer_of(shared_experts=1, router=router)
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
    even = Routing(jnp.full((1, 4), 10.0), jnp.full((1, 4), 5.0), jnp.array([20.0]), jnp.array([20.0]))
    assert [float(x) for x in router_losses(even)] == [1, 1]
    one = Routing(jnp.array([[40.0, 0, 0, 0]]), jnp.array([[20.0, 0, 0, 0]]), jnp.array([0.0]), jnp.array([20.0]))
    assert [float(x) for x in router_losses(one)] == [4, 0]
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), even, one)
    assert float(router_losses(both)[0]) == 2.5
    nothing = jax.tree.map(jnp.zeros_like, even)
    assert [float(x) for x in router_losses(nothing)] == [0, 0]


@pytest.mark.parametrize("kind", ["softmax", "norm"])
def test_losses_of_a_router_that_knows_nothing(kind):
    """The logits are 0: all tokens count in z, also where "norm" uses no expert; "softmax" is in balance."""
    router = Router(6, 8, 2, kind=kind, renormalise=True, rngs=nnx.Rngs(0))
    router.kernel[...] = jnp.zeros_like(router.kernel[...])
    _, weights, routing = router(jnp.ones((50, 6)), jnp.arange(50) < 40)
    balance, z = router_losses(jax.tree.map(lambda x: x[None], routing))
    assert float(balance) == (1 if kind == "softmax" else 0) and routing.counts.sum() == 2 * 40
    assert float(z) == pytest.approx(np.log(8) ** 2, rel=1e-6)
    assert np.any(weights) == (kind == "softmax")


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


def test_a_pool_is_the_same_experts_in_every_layer():
    """Values; the pool's gradient is the sum of the layers' gradients; the balance is that of all layers together."""
    fields = dict(mixers=("softmax_attention",), feed_forward="moe", num_experts=3, balance_loss=0.0)
    config = ModelConfig(**TINY, **fields)
    pooled, apart = (
        LanguageModel(dataclasses.replace(config, expert_pool=pool), rngs=nnx.Rngs(0)) for pool in (True, False)
    )
    of_pool, of_layers = nnx.to_pure_dict(nnx.state(pooled)), nnx.to_pure_dict(nnx.state(apart))
    pool = of_pool["pool"]
    of_layers["blocks"][0]["mlp"]["experts"] = jax.tree.map(lambda x: jnp.broadcast_to(x, (2, *x.shape)), pool)
    assert "experts" not in of_pool["blocks"][0]["mlp"]
    of_pool["blocks"][0]["mlp"]["router"] = of_layers["blocks"][0]["mlp"]["router"]
    of_pool |= {name: of_layers[name] for name in ("embedding", "final_norm")}
    for name in ("mixer", "mixer_norm", "mlp_norm"):
        of_pool["blocks"][0][name] = of_layers["blocks"][0][name]
    tokens = rng.integers(0, 32, (2, 9))
    batch = {"tokens": tokens, "targets": np.roll(tokens, 1, 1), "segment_ids": np.ones_like(tokens)}

    def run(model, params):
        graph = nnx.split(model)[0]
        nats = lambda params: summed_nats(graph, params, batch)
        (value, routing), gradient = jax.jit(jax.value_and_grad(nats, has_aux=True))(params)
        return value, routing, gradient, router_terms(graph, params, routing, batch)[1]["balance"] / tokens.size

    value, routing, gradient, balance = run(pooled, of_pool)
    expected, same, by_layer, of_each = run(apart, of_layers)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), routing, same)
    for name, layers in by_layer["blocks"][0]["mlp"]["experts"].items():
        found, total = gradient["pool"][name], layers.sum(0)
        np.testing.assert_allclose(found, total, rtol=1e-4, atol=1e-5 * np.abs(total).max())
    counts, shares = routing.counts, routing.probabilities / tokens.size
    even = 3 * np.sum((counts.sum(0) / counts.sum()) * shares.sum(0) / 2)
    np.testing.assert_allclose(balance, even, rtol=1e-5)
    each = np.mean(3 * np.sum(counts / counts.sum(-1, keepdims=True) * shares, axis=-1))
    np.testing.assert_allclose(of_each, each, rtol=1e-5)


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
            "model.num_experts: is one for all layers of experts; set the field, not an entry of model.mixers",
        ),
    ],
)
def test_what_is_refused(fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        jax.eval_shape(lambda: LanguageModel(ModelConfig(**TINY | fields), rngs=nnx.Rngs(0)))
