"""The mixers against their definitions, written out token by token in NumPy, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support.layers_cases import (
    CASE_IDS,
    CASES,
    D_MODEL,
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    LENGTH,
    ROWS,
    make_mixer,
    normal,
    outputs,
)

from deltaformer_jax.layers.mixers.delta_former import DeltaFormer
from deltaformer_jax.layers.mixers.softmax_attention import SoftmaxAttention
from deltaformer_jax.ops import Round


def numbers(parameter):
    return np.asarray(parameter[...], np.float64)


def rms(x, gain=None):
    x = x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-6)
    return x if gain is None else x * numbers(gain)


def rotate(x, base):
    """Each pair of features is a complex number; x [T,H,K]."""
    half = x.shape[-1] // 2
    angle = np.arange(len(x))[:, None, None] * base ** (-2.0 * np.arange(half) / x.shape[-1])
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angle)
    return np.concatenate([turned.real, turned.imag], -1)


def shifted(x, current, previous, older):
    weights = [numbers(current), numbers(previous), *([] if older is None else numbers(older))]
    back = lambda j: np.concatenate([np.zeros_like(x[:j]), x[: len(x) - j]])
    return sum(weight[:, None] * back(j) for j, weight in enumerate(weights))


def heads(x, weight):
    return np.einsum("td,dhk->thk", x, numbers(weight))


def convolved(x, part):
    """silu of each feature of x [T,H,K] with those before it."""
    weight = numbers(part.weight)
    total = np.zeros_like(x)
    for t in range(len(x)):
        for j in range(min(len(weight), t + 1)):
            total[t] += weight[j] * x[t - j]
    return total / (1 + np.exp(-total))


def gated(out, module, x, options):
    if not options.get("output_gate"):
        return out
    return out / (1 + np.exp(-heads(x, module.output_gate.kernel)))


def inputs(module, x, options):
    """q, k, v [T,H,K] of one sequence x [T,D], up to the rotation."""
    maps = module.inputs
    q, k, v = heads(x, maps.query), heads(x, maps.key), heads(x, maps.value)
    if options.get("conv_size"):
        q, k, v = (convolved(mapped, part) for mapped, part in zip((q, k, v), maps.convolutions))
    if options.get("kv_shift"):
        shift, parts = maps.shift, options.get("kv_shift_parts", "both")
        if parts != "value":
            k = shifted(k, shift.current_key, shift.previous_key, shift.older_key)
        if parts != "key":
            v = shifted(v, shift.current_value, shift.previous_value, shift.older_value)
    if options.get("qk_norm"):
        q, k = rms(q, maps.query_norm.scale), rms(k, maps.key_norm.scale)
    return q, k, v


def turned(options, *arrays, write=False):
    """The queries or keys of the read, or those of the write, after their rotation."""
    base = options.get("rope_base", 10_000.0)
    base = options.get("write_rope_base", base) if write else base
    return [x if base is None else rotate(x, base) for x in arrays]


def similarity(kind, scores):
    if kind == "softmax":
        return np.exp(scores) / np.sum(np.exp(scores)) if len(scores) else scores
    if kind == "self_adjust":
        low, high = min(0, *scores), max(0, *scores)
        return similarity("softmax", scores) * (scores - low) / (high - low)
    if kind == "self_adjust_basic":
        return similarity("softmax", scores) * scores
    return {
        "linear": lambda s: s,
        "relu": lambda s: np.maximum(s, 0),
        "exp": np.exp,
        Round(3): lambda s: np.round(s, 3),
    }[kind](scores)


def fire(bias, distance, position):
    """[H, n] for n distances of the row at `position`; L starts at 4 tokens."""
    grown = lambda x: np.log1p(np.exp(numbers(bias.log_c)) * x)
    ratio = grown(distance) / grown(np.maximum(4 * np.exp(numbers(bias.log_length)), position))
    hidden = np.maximum(ratio * numbers(bias.weight_in).T + numbers(bias.bias_in).T, 0)
    return numbers(bias.weight_out) @ hidden


def dape(bias, scores, distance):
    """[H, n] for the scores [H, n] of n distances; the static bias is Kerple's."""
    p, a = (0.01 + np.exp(numbers(x))[:, None] for x in (bias.static.log_p, bias.static.log_a))
    static = -p * np.log1p(a * distance)
    hidden = numbers(bias.scores_in).T @ scores + numbers(bias.static_in).T @ static + numbers(bias.bias_in).T
    hidden = np.where(hidden > 0, hidden, 0.01 * hidden)
    return static + numbers(bias.weight_out) @ hidden


def seen(t, options):
    """The tokens that token t sees, in order, itself last."""
    window, initial = options.get("window", t + 1), options.get("initial_tokens", 0)
    return np.array([i for i in range(t + 1) if t - i < window or i < initial])


def softmax_attention(module, x, options):
    q, k, v = inputs(module, x, options)
    q, k = turned(options, q, k)
    out = np.zeros((len(x), HEADS, HEAD_DIM))
    if options.get("forget_gate"):
        decay = -np.log1p(np.exp(-(x @ numbers(module.forget.kernel) + numbers(module.forget.bias))))
    for t in range(len(x)):
        at = seen(t, options)
        for h in range(HEADS):
            g = h * KV_HEADS // HEADS
            scores = k[at, g] @ q[t, h] * HEAD_DIM**-0.5
            if options.get("alibi"):
                scores -= 2.0 ** (-8 * (h + 1) / HEADS) * (t - at)
            if options.get("dape_dim"):
                every = np.einsum("jhk,hk->hj", np.repeat(k, HEADS // KV_HEADS, 1)[at], q[t])
                scores += dape(module.position_bias, every * HEAD_DIM**-0.5, t - at)[h]
            elif options.get("position_bias"):
                scores += fire(module.position_bias, t - at, t)[h]
            if options.get("forget_gate"):
                scores += np.array([decay[i + 1 : t + 1, h].sum() for i in at])
            sink = np.exp(numbers(module.sinks)[h]) if options.get("sinks") else 0
            out[t, h] = np.exp(scores) @ v[at, g] / (np.exp(scores).sum() + sink)
            if kind := options.get("read_similarity"):
                out[t, h] = similarity(kind, scores) @ v[at, g]
    return np.einsum("thk,hkd->td", gated(out, module, x, options), numbers(module.output))


def delta_former(module, x, options):
    q, k, v = inputs(module, x, options)
    kind = options.get("write_query", "key")
    write, read = options.get("write_similarity", "softmax"), options.get("read_similarity", "softmax")
    norm = options.get("write_key_norm", "auto")
    unit = norm == "on" or (norm == "auto" and write != "softmax")
    if kind == "projected":
        w = heads(x, module.write_kernel)
        w = convolved(w, module.write_convolution) if options.get("conv_size") else w
        w = rms(w, module.write_norm.scale) if options.get("qk_norm") else w
    else:
        w = k if kind == "key" else q
    w, write_keys = turned(options, w, k, write=True)
    q, k = turned(options, q, k)
    write_scale = options.get("write_scale", 1.0 if unit else HEAD_DIM**-0.5)
    if unit:  # unit vectors for the write; the read's keys are √K as long
        w, write_keys = rms(w) / np.sqrt(HEAD_DIM), rms(write_keys) / np.sqrt(HEAD_DIM)
        k = rms(k)
    u_heads = w.shape[1]

    def gate(layer, squash):
        logits = x @ numbers(layer.kernel) + numbers(layer.bias)
        return 1 / (1 + np.exp(-logits)) if squash else logits

    alpha = gate(module.alpha_gate, True) if options.get("alpha") == "sigmoid" else np.ones((len(x), u_heads))
    beta = options.get("beta", "sigmoid")
    beta = np.ones((len(x), u_heads)) if beta == "one" else gate(module.beta_gate, beta == "sigmoid")
    u = np.zeros((len(x), u_heads, HEAD_DIM))
    for t in range(len(x)):
        for h in range(u_heads):
            g = h * KV_HEADS // u_heads
            before = seen(t, options)[:-1]
            scores = write_keys[before, g] @ w[t, h] * write_scale
            if options.get("position_bias_in") == "both":
                scores += fire(module.write_bias, t - before, t)[h]
            weights = similarity(write, scores)
            u[t, h] = alpha[t, h] * v[t, g] - beta[t, h] * (weights @ u[before, h])
    out = np.zeros((len(x), HEADS, HEAD_DIM))
    for t in range(len(x)):
        for h in range(HEADS):
            at = seen(t, options)
            scores = k[at, h * KV_HEADS // HEADS] @ q[t, h] * options.get("read_scale", HEAD_DIM**-0.5)
            if options.get("position_bias"):
                scores += fire(module.read_bias, t - at, t)[h]
            out[t, h] = similarity(read, scores) @ u[at, h * u_heads // HEADS]
    return np.einsum("thk,hkd->td", gated(out, module, x, options), numbers(module.output))


@pytest.mark.parametrize("mixer, name, options", CASES, ids=CASE_IDS)
def test_definition(mixer, name, options):
    x = normal((ROWS, LENGTH, D_MODEL))
    with jax.enable_x64(True):
        module = make_mixer(mixer, options | {"implementation": "parallel"}, dtype=jnp.float64)
        y = outputs(module, jnp.asarray(x))
        assert y.dtype == jnp.float64
        y = np.asarray(y)
    reference = softmax_attention if mixer is SoftmaxAttention else delta_former
    for row in range(len(x)):
        np.testing.assert_allclose(y[row], reference(module, x[row], options), rtol=1e-9, atol=1e-10)


def test_a_write_with_a_base_of_its_own_has_a_second_key_and_no_more_parameters():
    x = jnp.ones((1, 4, D_MODEL))
    default, same, other = (
        make_mixer(DeltaFormer, options) for options in ({}, dict(write_rope_base=1e4), dict(write_rope_base=None))
    )
    text = lambda mixer: str(jax.make_jaxpr(lambda x: mixer(x)[0])(x))
    assert text(same) == text(default) != text(other)
    shapes = [jax.tree.map(jnp.shape, nnx.state(mixer)) for mixer in (default, same, other)]
    assert shapes[0] == shapes[1] == shapes[2]
    widths = [mixer.init_cache(1, 4).memory.key.shape[-1] for mixer in (default, same, other)]
    assert widths == [HEAD_DIM, HEAD_DIM, 2 * HEAD_DIM]
    for base, message in ((1.0, "write_rope_base=1.0 must be greater than 1"), ("none", "'none': give a number")):
        with pytest.raises(ValueError, match=message):
            make_mixer(DeltaFormer, dict(write_rope_base=base))
