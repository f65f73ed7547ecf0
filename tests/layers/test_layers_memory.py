"""The mixers with a memory of fixed size against their definitions, token by token in NumPy, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support.layers_cases import (
    D_MODEL,
    HEAD_DIM,
    HEADS,
    LENGTH,
    MEMORY_CASES,
    MEMORY_IDS,
    ROWS,
    make_mixer,
    normal,
    outputs,
)
from test_layers_reference import numbers, rms, rotate

from deltaformer_jax.layers.mixers.delta_net import DeltaNet
from deltaformer_jax.layers.mixers.delta_rule import DeltaRuleMixer
from deltaformer_jax.layers.mixers.delta_rules.delta_product import DeltaProduct, GatedDeltaProduct
from deltaformer_jax.layers.mixers.delta_rules.gated_delta_net_2 import GatedDeltaNet2
from deltaformer_jax.layers.mixers.delta_rules.rwkv7 import RWKV7
from deltaformer_jax.layers.mixers.gated_delta_net import GatedDeltaNet
from deltaformer_jax.layers.mixers.gated_linear_attention import GatedLinearAttention
from deltaformer_jax.layers.mixers.kimi_delta_attention import KimiDeltaAttention
from deltaformer_jax.layers.mixers.linear_attention import LinearAttention
from deltaformer_jax.layers.mixers.retention import Retention
from deltaformer_jax.layers.short_convolution import ShortConvolution


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def softplus(x):
    return np.log1p(np.exp(x))


def convolved(x, weight):
    """x [T,H,K] by weight [W,H,K], then SiLU."""
    out = np.zeros_like(x)
    for t in range(len(x)):
        for j in range(min(len(weight), t + 1)):
            out[t] += weight[j] * x[t - j]
    return silu(out)


def projections(module, x):
    maps = [np.einsum("td,dhk->thk", x, numbers(w)) for w in (module.query, module.key, module.value)]
    if module.convolutions is not None:
        maps = [convolved(mapped, numbers(part.weight)) for mapped, part in zip(maps, module.convolutions)]
    return maps


def unit(x):
    return x / np.sqrt(np.sum(x**2, -1, keepdims=True) + 1e-6)


def decays(layer, x):
    """log decay of a HeadDecay [T,H] or a ChannelDecay [T,H,K]."""
    if hasattr(layer, "down"):
        step = np.einsum("tr,rhk->thk", x @ numbers(layer.down), numbers(layer.up)) + numbers(layer.bias)
        if layer.lower_bound:
            return layer.lower_bound * sigmoid(np.exp(numbers(layer.log_rate))[:, None] * step)
        return -np.exp(numbers(layer.log_rate))[:, None] * softplus(step)
    return -np.exp(numbers(layer.log_rate)) * softplus(x @ numbers(layer.kernel) + numbers(layer.bias))


def remembered(q, k, v, decay, beta, scale):
    """o [T,Hv,V]; decay [T,Hv] or [T,Hv,K] or None, beta [T,Hv] or None for no delta rule."""
    time, heads, width = v.shape
    group = heads // q.shape[1]
    out = np.zeros((time, heads, width))
    for h in range(heads):
        state = np.zeros((q.shape[2], width))
        for t in range(time):
            if decay is not None:
                state = np.exp(decay[t, h])[..., None] * state if decay.ndim == 3 else np.exp(decay[t, h]) * state
            u = v[t, h]
            if beta is not None:
                u = beta[t, h] * (u - k[t, h // group] @ state)
            state = state + np.outer(k[t, h // group], u)
            out[t, h] = scale * q[t, h // group] @ state
    return out


def remembered_by_products(q, k, v, decay, beta, scale):
    """o [T,Hv,V] of n steps a token: k [T,n·H,K], v [T,n·Hv,V], beta [T,n·Hv], the steps of a head side by side."""
    steps = k.shape[1] // q.shape[1]
    out = np.zeros((len(v), v.shape[1] // steps, v.shape[2]))
    group = out.shape[1] // q.shape[1]
    for h in range(out.shape[1]):
        state = np.zeros((q.shape[2], v.shape[2]))
        for t in range(len(v)):
            state = state if decay is None else np.exp(decay[t, h]) * state
            for j in range(steps):
                key = k[t, h // group * steps + j]
                state = state + beta[t, h * steps + j] * np.outer(key, v[t, h * steps + j] - key @ state)
            out[t, h] = scale * q[t, h // group] @ state
    return out


def remembered_with_two_gates(q, k, v, decay, erase, write, scale):
    """o [T,Hv,V] of Gated DeltaNet-2; decay and erase [T,Hv,K], write [T,Hv,V]."""
    out = np.zeros(v.shape)
    for h in range(v.shape[1]):
        query, key, state = (*(y[:, h * y.shape[1] // v.shape[1]] for y in (q, k)), np.zeros((q.shape[2], v.shape[2])))
        for t in range(len(v)):
            state = np.exp(decay[t, h])[:, None] * state
            erased = (erase[t, h] * key[t]) @ state
            state = state + np.outer(key[t], write[t, h] * v[t, h] - erased)
            out[t, h] = scale * query[t] @ state
    return out


def rwkv7(module, x):
    before = np.concatenate([np.zeros_like(x[:1]), x[:-1]])
    of_read, of_key, of_value, of_decay, of_rate, of_gate = (x + (before - x) * mix for mix in numbers(module.mix))
    heads = lambda y, weight: np.einsum("td,dhk->thk", y, numbers(weight))
    low = lambda y, part: heads(y, part.up) + (0 if part.bias is None else numbers(part.bias))
    r, k, v = heads(of_read, module.read), heads(of_key, module.key), heads(of_value, module.value)
    decay = np.exp(-np.exp(-0.5) * sigmoid(low(np.tanh(of_decay @ numbers(module.decay.down)), module.decay)))
    rate = sigmoid(low(of_rate @ numbers(module.rate.down), module.rate))
    gate = low(sigmoid(of_gate @ numbers(module.gate.down)), module.gate)
    erase, written = unit(k * numbers(module.erased)), k * (1 + (rate - 1) * numbers(module.written))
    o = np.zeros(v.shape)
    for h in range(v.shape[1]):
        state = np.zeros((k.shape[2], v.shape[2]))
        for t in range(len(x)):
            transition = np.diag(decay[t, h]) - np.outer(rate[t, h] * erase[t, h], erase[t, h])
            state = transition @ state + np.outer(written[t, h], v[t, h])
            o[t, h] = r[t, h] @ state
    o = rms(o, module.norm.norm.scale) + np.sum(r * numbers(module.bonus) * written, -1, keepdims=True) * v
    return np.einsum("thv,hvd->td", o * gate, numbers(module.output))


def returned(module, o, x):
    o = rms(o, module.norm.norm.scale)
    if module.gate is not None:
        rows = x if module.gate_down is None else x @ numbers(module.gate_down)
        gate = np.einsum("tr,rhv->thv", rows, numbers(module.gate))
        o = o * {"swish": silu, "sigmoid": sigmoid}[module.norm.activation](gate)
    return np.einsum("thv,hvd->td", o, numbers(module.output))


def definition(module, x, options):
    if isinstance(module, RWKV7):
        return rwkv7(module, x)
    q, k, v = projections(module.inputs, x)
    scale = q.shape[2] ** -0.5
    if isinstance(module, LinearAttention):
        q, k = (np.where(y > 0, y + 1, np.exp(np.minimum(y, 0))) for y in (q, k))
        o = remembered(q, k, v, None, None, 1.0)
        total = remembered(q, k, np.ones((*v.shape[:2], 1)), None, None, 1.0)
        return np.einsum("thv,hvd->td", o / total, numbers(module.output))
    if isinstance(module, GatedDeltaNet2):
        erase, write = (
            sigmoid(np.einsum("td,dhk->thk", x, numbers(gate.kernel)) + numbers(gate.bias))
            for gate in (module.erase, module.write)
        )
        o = remembered_with_two_gates(unit(q), unit(k), v, decays(module.decay, x), erase, write, scale)
        return returned(module.output, o, x)
    beta = decay = None
    if isinstance(module, DeltaRuleMixer):
        q, k = unit(q), unit(k)
        beta = sigmoid(x @ numbers(module.beta.kernel) + numbers(module.beta.bias))
        beta = 2 * beta if options.get("negative_eigenvalues") else beta
    if isinstance(module, DeltaRuleMixer) and module.decay is not None:
        decay = decays(module.decay, x)
    if isinstance(module, GatedDeltaProduct):
        return returned(module.output, remembered_by_products(q, k, v, decay, beta, scale), x)
    if isinstance(module, GatedLinearAttention):
        low = x @ numbers(module.decay_down)
        gate = np.einsum("tr,rhk->thk", low, numbers(module.decay_up)) + numbers(module.decay_bias)
        decay = -softplus(-gate) / 16
    if isinstance(module, Retention):
        decay = np.broadcast_to(np.log(1 - 2.0 ** (-5 - np.arange(HEADS))), (len(x), HEADS))
        if options.get("rope_base", 1e4) is not None:
            q, k = rotate(q, 1e4), rotate(k, 1e4)
    return returned(module.output, remembered(q, k, v, decay, beta, scale), x)


@pytest.mark.parametrize("mixer, name, options", MEMORY_CASES, ids=MEMORY_IDS)
def test_definition(mixer, name, options):
    x = normal((ROWS, LENGTH, D_MODEL))
    with jax.enable_x64(True):
        module = make_mixer(mixer, options, dtype=jnp.float64)
        y = outputs(module, jnp.asarray(x))
        assert y.dtype == jnp.float64
        y = np.asarray(y)
    for row in range(len(x)):
        np.testing.assert_allclose(y[row], definition(module, x[row], options), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("mixer, name, options", MEMORY_CASES, ids=MEMORY_IDS)
def test_flops(mixer, name, options):
    """Every kernel once with each token, and the memory; whatever the length, stacked or not."""
    module = make_mixer(mixer, options)
    kernels = sum(
        leaf.size
        for path, leaf in jax.tree.leaves_with_path(module)
        if leaf.ndim > 1 and "bias" not in jax.tree_util.keystr(path)
    )
    heads, key_dim, value_dim = module.state_shape
    touched = 6 if isinstance(module, DeltaRuleMixer | GatedDeltaNet2) else 4
    touched = {RWKV7: 8, GatedDeltaProduct: 14}.get(mixer, touched)
    expected = 2 * kernels + touched * heads * key_dim * value_dim
    assert module.flops_per_token(10) == module.flops_per_token(10_000) == expected
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), module)
    assert stacked.flops_per_token(10) == expected


@pytest.mark.parametrize(
    "mixer",
    [
        *(LinearAttention, Retention, GatedLinearAttention, DeltaNet, GatedDeltaNet, KimiDeltaAttention),
        *(GatedDeltaNet2, RWKV7),
    ],
)
def test_bfloat16_is_near_float32(mixer):
    """As for attention: a few roundings of 2^-8 each on the way, of which the memory, float32, adds none."""
    low, high = make_mixer(mixer, {}, dtype=jnp.bfloat16), make_mixer(mixer, {})
    leaves = [leaf.astype(jnp.float32) for leaf in jax.tree.leaves(low)]
    high = jax.tree.unflatten(jax.tree.structure(high), leaves)
    x = jnp.asarray(normal((ROWS, LENGTH, D_MODEL)), jnp.bfloat16)
    exact, near = outputs(high, x.astype(jnp.float32)), outputs(low, x)
    assert near.dtype == jnp.bfloat16
    error = np.linalg.norm(exact - near.astype(jnp.float32)) / np.linalg.norm(exact)
    assert 1e-5 < error < 8 * 2.0**-8


def test_initial_gates():
    """e^A in [1, 16), softplus(b) in [0.001, 0.1]: decays from almost none to what forgets in a few tokens."""
    from flax import nnx

    module = GatedDeltaNet(64, num_heads=64, head_dim=1, rngs=nnx.Rngs(0))
    rate, step = np.exp(module.decay.log_rate[...]), softplus(np.asarray(module.decay.bias[...], np.float64))
    assert rate.min() >= 1 and rate.max() < 16 and rate.max() - rate.min() > 10
    assert step.min() > 0.9e-3 and step.max() < 0.11 and step.max() / step.min() > 30
    assert module.decay.log_rate.get_metadata("decay") is False


@pytest.mark.parametrize(
    "mixer, options, message",
    [
        (DeltaNet, dict(num_value_heads=6), "num_value_heads=6 must be a multiple of num_heads=4"),
        (Retention, dict(head_dim=5), "head_dim=5 must be even"),
        (DeltaProduct, dict(householder_steps=0), "householder_steps=0 must be at least 1"),
        (RWKV7, dict(head_dim=0), "head_dim=0 must be at least 1"),
        (GatedDeltaNet, dict(conv_size=-2), "conv_size=-2 must be at least 1 token, or 0"),
        (LinearAttention, dict(head_dim=0), "head_dim=0 must be at least 1"),
        (GatedDeltaNet, dict(implementation="parallel"), "implementation='parallel' is unknown"),
    ],
)
def test_what_does_not_fit(mixer, options, message):
    sizes = {name: options[name] for name in ("head_dim",) if name in options}
    rest = {name: value for name, value in options.items() if name not in sizes}
    with pytest.raises(ValueError, match=message):
        make_mixer(mixer, rest, **sizes)(jnp.zeros((1, 3, D_MODEL)))


def test_a_convolution_of_one_token_has_no_tail():
    from flax import nnx

    layer = ShortConvolution(1, 2, HEAD_DIM, rngs=nnx.Rngs(0))
    x = jnp.asarray(normal((ROWS, 5, 2, HEAD_DIM)), jnp.float32)
    y, tail = layer(x, tail=layer.empty_tail(ROWS, jnp.float32))
    assert tail.shape == (ROWS, 0, 2, HEAD_DIM)
    np.testing.assert_allclose(y, silu(x * layer.weight[...][0]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("base", [1.0, 0.5, -3.0, float("nan")])
def test_retention_refuses_a_base_that_cannot_turn(base):
    with pytest.raises(ValueError, match="must be greater than 1"):
        Retention(16, num_heads=2, head_dim=8, rope_base=base, rngs=nnx.Rngs(0))
