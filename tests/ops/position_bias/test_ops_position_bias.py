"""causal_attention and delta_attention with position biases: every form against the definition, and that against
NumPy."""

import functools
import itertools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from support.ops_cases import poison, segment_rows

from deltaformer_jax import causal_attention, delta_attention, delta_values, ops

HEADS, KV_HEADS, TIME, HIDDEN = 4, 2, 19, 5
KINDS = ("alibi", "kerple", "fire", "dape")


def draw_bias(kind, seed=0, heads=HEADS):
    """A bias with random numbers; DAPE's is around FIRE's, which depends on i too."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape))
    if kind == "alibi":
        return ops.Alibi(jnp.exp(normal(heads)))
    if kind == "kerple":
        return ops.Kerple(jnp.exp(normal(heads)), jnp.exp(normal(heads)))
    if kind == "fire":
        # L lies among the positions, so that rows before and behind it are seen.
        return ops.Fire(jnp.asarray([0.7]), jnp.asarray([6.5]), *(normal(1, HIDDEN) for _ in range(2)),
                        normal(heads, HIDDEN))  # fmt: skip
    return ops.Dape(draw_bias("fire", seed, heads), normal(heads, HIDDEN), normal(heads, HIDDEN), normal(1, HIDDEN),
                    normal(heads, HIDDEN))  # fmt: skip


def draw(time=TIME, seed=0, batch=2, options=()):
    rng = np.random.default_rng(seed)
    shapes = dict(query=(HEADS, 5), key=(KV_HEADS, 5), value=(KV_HEADS, 3))
    inputs = {name: jnp.asarray(rng.standard_normal((batch, time, *shape))) for name, shape in shapes.items()}
    if "forget" in options:
        inputs["log_decay"] = -jnp.asarray(rng.uniform(0, 1, (batch, time, HEADS)))
    if "sinks" in options:
        inputs["sinks"] = jnp.asarray(rng.standard_normal(HEADS))
    return inputs


@functools.cache
def compiled(implementation, window=None, initial=0):
    @jax.jit
    def run(inputs, bias, segment_ids, cotangent):
        attend = lambda inputs, bias: causal_attention(
            **inputs,
            position_bias=bias,
            window=window,
            initial=initial,
            segment_ids=segment_ids,
            implementation=implementation,
        )
        out, pullback = jax.vjp(attend, inputs, bias)
        return out, pullback(cotangent)

    return run


def check(expected, actual, terms):
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(actual), strict=True):
        # Each number is a sum of at most `terms` products of which none is amplified: as many roundings.
        np.testing.assert_allclose(b, a, rtol=0, atol=16 * terms * np.finfo(float).eps * max(np.abs(a).max(), 1))


COTANGENT = np.cos(np.arange(2 * TIME * HEADS * 3.0)).reshape(2, TIME, HEADS, 3)


@pytest.mark.parametrize(
    "kind, window, initial, options",
    [("kerple", None, 0, ("forget",)), ("fire", 6, 2, ("sinks",)), ("dape", 7, 0, ("forget", "sinks"))],
)
@hypothesis.settings(max_examples=5)
@hypothesis.given(data=st.data())
def test_forms_agree(kind, window, initial, options, data):
    with jax.enable_x64(True):
        segment_ids, seed = data.draw(segment_rows(TIME)), data.draw(st.integers(0, 99))
        inputs, bias = draw(seed=seed, options=options), draw_bias(kind, seed)
        inputs = {**inputs, **poison({name: x for name, x in inputs.items() if name != "sinks"}, segment_ids)}
        given = (inputs, bias, segment_ids, jnp.asarray(COTANGENT))
        expected = compiled("recurrent", window, initial)(*given)
        for implementation in ("parallel", "chunked"):
            # A gradient of the bias adds up those of all pairs of both rows.
            check(expected, compiled(implementation, window, initial)(*given), 2 * TIME * TIME * HIDDEN)


def draw_delta(write_heads, seed=0, batch=2, most=1.0):
    """The arrays of delta_attention, with α and β in [0, most] of `write_heads` heads."""
    rng = np.random.default_rng(seed)
    gates = {name: jnp.asarray(rng.uniform(0, most, (batch, TIME, write_heads))) for name in ("alpha", "beta")}
    return draw(seed=seed, batch=batch) | gates


@functools.cache
def compiled_delta(implementation, options):
    @jax.jit
    def run(inputs, biases, segment_ids, keep, cotangent):
        attend = lambda inputs, biases: delta_attention(
            **inputs,
            **dict(options),
            write_bias=biases[0],
            read_bias=biases[1],
            segment_ids=segment_ids,
            keep=keep,
            chunk_size=8,
            implementation=implementation,
        )
        out, pullback = jax.vjp(attend, inputs, biases)
        return out, pullback(cotangent)

    return run


# "query" with two softmaxes is one pass without a bias. With a linear write or read, a bias adds to weights that have
# no bound.
@pytest.mark.parametrize(
    "write_query, kinds, options",
    [
        ("query", ("dape", "kerple"), {}),
        pytest.param("key", ("fire", None), dict(window=7, initial=2), marks=pytest.mark.long),
        pytest.param("key", ("kerple", "dape"), dict(write_similarity="linear", read_similarity="linear", window=7),
                     marks=pytest.mark.long),
    ],
)  # fmt: skip
@hypothesis.settings(max_examples=5)
@hypothesis.given(data=st.data())
def test_forms_of_deltaformers_biases_agree(write_query, kinds, options, data):
    """Values and gradients. The parallel form is compared with the recurrent one in `test_decoding_of_deltaformer`."""
    with jax.enable_x64(True):
        segment_ids, seed = data.draw(segment_rows(TIME)), data.draw(st.integers(0, 99))
        keep = jnp.asarray(np.random.default_rng(seed).random((2, TIME)) < 0.2) if "window" in options else None
        heads = (HEADS if write_query == "query" else KV_HEADS, HEADS)
        inputs = draw_delta(heads[0], seed, most=0.001 if "write_similarity" in options else 0.5)
        biases = tuple(kind and draw_bias(kind, seed, own) for kind, own in zip(kinds, heads))
        given = (poison(inputs, segment_ids), biases, segment_ids, keep, jnp.asarray(COTANGENT))
        options = (*options.items(), ("write_query", write_query))
        expected, actual = (compiled_delta(form, options)(*given) for form in ("parallel", "chunked"))
        # β A, with a softmax write or with the small β of the linear one, has rows whose magnitudes sum to at most 1/2,
        # so that the solve magnifies an error by at most ‖(I + β A)⁻¹‖ ≤ 2.
        check(expected, actual, 2 * 2 * TIME * TIME * HIDDEN)


@pytest.mark.parametrize(
    "similarity",
    ["relu", *(pytest.param(name, marks=pytest.mark.long) for name in ("softmax", "exp", "linear", "round"))],
)
def test_alibi_in_the_write_is_two_more_features(similarity, x64):
    """(w, −m t/c, 1)·(k, 1, m i/c) c = c w·k − m (t − i): values and gradients of the chunked form against the parallel
    one without a bias. m = 0 is no bias."""
    inputs, how = draw_delta(KV_HEADS, most=0.004), dict(write_similarity=similarity, write_scale=0.3)
    inputs["write_query"] = inputs.pop("query")[:, :, ::2]

    @jax.jit
    def both(inputs, slope, cotangent):
        ones = jnp.ones((2, TIME, KV_HEADS, 1))
        far = ones * slope[None, None, :, None] * jnp.arange(TIME, dtype=jnp.float64)[None, :, None, None] / 0.3

        def as_features(inputs):
            more = dict(write_query=(-far, ones), key=(ones, far))
            wide = {name: jnp.concatenate([inputs[name], *more[name]], axis=-1) for name in more}
            return delta_values(**inputs | wide, **how, implementation="parallel")

        written = lambda inputs: delta_values(**inputs, **how, write_bias=ops.Alibi(slope), chunk_size=8)
        return [(out, back(cotangent)) for out, back in (jax.vjp(form, inputs) for form in (as_features, written))]

    for slope in ([0.3, 0.02], [0.0, 0.0]):
        # No weight is above 8, so that a row of β A sums to 2/3, and the solve magnifies an error by 3. The features
        # are as large as m T/c = 19: so much more is rounded before it cancels.
        check(*both(inputs, jnp.asarray(slope), jnp.asarray(COTANGENT[:, :, :KV_HEADS])), 3 * 19 * TIME * TIME)


def test_decoding_of_deltaformer(x64):
    """A prompt of 9 tokens, padded on the left with NaN, then token by token through a cache that drops what is seen no
    more: the recurrence, and the parallel form."""
    inputs = draw_delta(KV_HEADS)
    biases = dict(write_bias=draw_bias("dape", 1, KV_HEADS), read_bias=draw_bias("dape"))
    options, keep = biases | dict(window=4, initial=1), jnp.arange(TIME)[None].repeat(2, 0) % 5 == 2
    forms = [delta_attention(**inputs, **options, keep=keep, implementation=form) for form in ("recurrent", "parallel")]

    @jax.jit
    def step(part, keep, ids, cache):
        out, cache = delta_attention(**part, **options, keep=keep, segment_ids=ids, cache=cache)
        return out, ops.compact_cache(cache, ops.visible_entries(cache, 4))

    padded = {name: jnp.pad(x[:, :9], [(0, 0), (3, 0)] + [(0, 0)] * (x.ndim - 2)) for name, x in inputs.items()}
    ids = np.array([[0] * 3 + [1] * 9] * 2, np.int32)
    cache = ops.SelectedKUCache.empty(2, TIME, KV_HEADS, KV_HEADS, 5, 3, jnp.float64)
    out, cache = step(poison(padded, ids), jnp.pad(keep[:, :9], [(0, 0), (3, 0)]), jnp.asarray(ids), cache)
    outputs = [out[:, 3:]]
    for t in range(9, TIME):
        part = {name: x[:, t : t + 1] for name, x in inputs.items()}
        out, cache = step(part, keep[:, t : t + 1], jnp.ones((2, 1), jnp.int32), cache)
        outputs.append(out)
    for found in (forms[1], jnp.concatenate(outputs, axis=1)):
        np.testing.assert_allclose(found, forms[0], rtol=0, atol=1e-13)
    narrow = jax.tree.map(lambda x: x.astype(jnp.float32), inputs)
    for (name, bias), form in itertools.product(biases.items(), ("triton", "pallas_tpu")):
        with pytest.raises(NotImplementedError, match=f"no {name}|it needs"):
            delta_attention(**narrow, **{name: bias}, implementation=form)


@pytest.mark.parametrize("kind", ["kerple", "dape"])
def test_many_chunks(kind, x64):
    """300 tokens: three chunks of 128, the last one short; a document that begins inside the second."""
    inputs, bias = draw(300, batch=1), draw_bias(kind)
    given = (inputs, bias, jnp.asarray([[1] * 140 + [2] * 160]), jnp.ones((1, 300, HEADS, 3)))
    check(compiled("parallel")(*given), compiled("chunked")(*given), 300 * 300)


def numpy_bias(bias, scores, distance, position):
    """The formulas of `ops.position_bias` for one pair: scores [H] -> [H]."""
    if isinstance(bias, ops.Alibi):
        return -np.asarray(bias.slope) * distance
    if isinstance(bias, ops.Kerple):
        return -np.asarray(bias.p) * np.log(1 + np.asarray(bias.a) * distance)
    if isinstance(bias, ops.Fire):
        grown = lambda x: np.log(1 + float(bias.c[0]) * x)
        x = grown(distance) / grown(max(float(bias.length[0]), position))
        hidden = np.maximum(x * np.asarray(bias.weight_in[0]) + np.asarray(bias.bias_in[0]), 0)
        return np.asarray(bias.weight_out) @ hidden
    static = numpy_bias(bias.static, scores, distance, position)
    both = np.concatenate([scores, static])
    first = np.concatenate([np.asarray(bias.scores_in), np.asarray(bias.static_in)])
    hidden = both @ first + np.asarray(bias.bias_in[0])
    hidden = np.where(hidden > 0, hidden, 0.01 * hidden)
    return static + np.asarray(bias.weight_out) @ hidden


@pytest.mark.parametrize("kind", KINDS)
def test_the_definition_against_numpy(kind, x64):
    """Pair by pair, in two documents: positions start at 0 in each."""
    inputs, bias = draw(11, batch=1), draw_bias(kind)
    segments = np.array([3, 3, 3, 0, 0, 5, 5, 5, 5, 5, 5])
    query, key, value = (np.asarray(inputs[name][0]) for name in ("query", "key", "value"))
    key, value = (np.repeat(x, HEADS // KV_HEADS, axis=1) for x in (key, value))
    expected = np.zeros((11, HEADS, 3))
    for t in np.flatnonzero(segments):
        start = np.flatnonzero(segments == segments[t])[0]
        plain = np.einsum("hk,jhk->jh", query[t], key[start : t + 1]) * 5**-0.5
        biases = [numpy_bias(bias, plain[j - start], t - j, t - start) for j in range(start, t + 1)]
        weights = np.exp(plain + np.array(biases))
        expected[t] = np.einsum("jh,jhv->hv", weights / weights.sum(0), value[start : t + 1])
    actual = causal_attention(
        **inputs, position_bias=bias, segment_ids=jnp.asarray(segments)[None], implementation="recurrent"
    )
    np.testing.assert_allclose(actual[0], expected, rtol=1e-12, atol=1e-13)


def test_alibi_is_a_constant_log_decay_and_dape_starts_as_its_static_bias(x64):
    """Values and gradients of the first pair; DAPE with a last layer of 0 is its static bias bit for bit."""
    inputs, alibi = draw(), draw_bias("alibi")
    decayed = {**inputs, "log_decay": jnp.broadcast_to(-alibi.slope, (2, TIME, HEADS))}
    given = (None, jnp.asarray(COTANGENT))
    expected, (of_inputs, _) = compiled("chunked")(decayed, None, *given)
    actual, (gradients, _) = compiled("chunked")(inputs, alibi, *given)
    check((expected, {name: of_inputs[name] for name in inputs}), (actual, gradients), TIME)
    dape = draw_bias("dape")
    started = ops.Dape(dape.static, dape.scores_in, dape.static_in, dape.bias_in, 0 * dape.weight_out)
    pairs = (jnp.asarray(np.random.default_rng(0).standard_normal((2, HEADS, 3, 3))), jnp.arange(9).reshape(1, 3, 3))
    position = jnp.asarray([[2, 5, 8]])
    assert np.all(started(*pairs, position) == dape.static(*pairs, position))
    plain, same = (causal_attention(**inputs, position_bias=bias) for bias in (dape.static, started))
    np.testing.assert_allclose(same, plain, rtol=0, atol=1e-14)


def test_heads_permuted(x64):
    """Heads permuted in the inputs and in the arrays of the bias are permuted in the output, and otherwise the same."""
    inputs, bias = draw(), draw_bias("dape")
    order = np.array([2, 0, 3, 1])
    inputs |= {name: jnp.repeat(inputs[name], HEADS // KV_HEADS, axis=2) for name in ("key", "value")}
    swapped = jax.tree.map(lambda x: x[order] if x.shape[0] == HEADS else x, bias)
    out = causal_attention(**inputs, position_bias=bias, implementation="chunked")
    moved = {name: x[:, :, order] for name, x in inputs.items()}
    again = causal_attention(**moved, position_bias=swapped, implementation="chunked")
    np.testing.assert_allclose(again, out[:, :, order], rtol=0, atol=1e-13)


@pytest.mark.parametrize("kind, window", [("kerple", 6), ("dape", None)])
def test_prefill_and_decoding(kind, window, x64):
    """A prompt padded on the left, with NaN there, a second padded piece, then token by token."""
    inputs, bias = draw(), draw_bias(kind)
    expected = causal_attention(**inputs, position_bias=bias, window=window, implementation="recurrent")
    extend = jax.jit(
        lambda part, ids, cache: causal_attention(
            **part, position_bias=bias, window=window, segment_ids=ids, cache=cache, return_cache=True
        )
    )
    padded = jax.tree.map(lambda x: jnp.pad(x[:, :9], [(0, 0), (3, 0), (0, 0), (0, 0)]), inputs)
    ids = np.array([[0] * 3 + [1] * 9] * 2, np.int32)
    out, cache = causal_attention(
        **poison(padded, ids), position_bias=bias, window=window, segment_ids=jnp.asarray(ids), return_cache=True
    )
    if window is None:  # room for all
        cache = ops.KVCache.empty(2, TIME, KV_HEADS, 5, 3, jnp.float64)
        out, cache = extend(poison(padded, ids), jnp.asarray(ids), cache)
    outputs = [out[:, 3:]]
    piece = jax.tree.map(lambda x: jnp.pad(x[:, 9:12], [(0, 0), (9, 0), (0, 0), (0, 0)]), inputs)
    ids = np.array([[0] * 9 + [1] * 3] * 2, np.int32)
    out, cache = extend(poison(piece, ids), jnp.asarray(ids), cache)
    outputs.append(out[:, 9:])
    for t in range(12, TIME):
        out, cache = extend({name: x[:, t : t + 1] for name, x in inputs.items()}, None, cache)
        outputs.append(out)
    np.testing.assert_allclose(jnp.concatenate(outputs, axis=1), expected, rtol=0, atol=1e-13)


def test_narrow_inputs():
    """bfloat16 queries, keys and values: the bias is computed in float32, as the scores are."""
    inputs = jax.tree.map(lambda x: x.astype(jnp.bfloat16), draw())
    bias = jax.tree.map(lambda x: x.astype(jnp.float32), draw_bias("fire"))
    out, (gradients, of_bias) = compiled("chunked")(inputs, bias, None, jnp.asarray(COTANGENT, jnp.bfloat16))
    expected = compiled("parallel")(inputs, bias, None, jnp.asarray(COTANGENT, jnp.bfloat16))[0]
    assert out.dtype == jnp.bfloat16 and {x.dtype for x in jax.tree.leaves(of_bias)} == {jnp.dtype("float32")}
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves((gradients, of_bias)))
    # Weights and outputs, both at most a few, are rounded to 8 bits once each.
    np.testing.assert_allclose(out.astype(jnp.float32), expected.astype(jnp.float32), rtol=0, atol=0.05)


@pytest.mark.parametrize(
    "bias, error, message",
    [
        (ops.Kerple(jnp.ones(3), jnp.ones(4)), ValueError, r"position_bias\.p has shape \(3,\): its first axis"),
        (ops.Kerple(jnp.ones(4), jnp.ones(())), ValueError, r"position_bias\.a has shape \(\): its first axis"),
        (ops.Kerple(jnp.ones(4), jnp.ones(4, jnp.int32)), TypeError, r"position_bias\.a has dtype int32"),
        (ops.Kerple(jnp.ones(4), 2.0), TypeError, r"position_bias\.a must be an array, not float"),
        (lambda *pair: 0, TypeError, r"position_bias must be an array, not function"),
        ("kerple", TypeError, r"position_bias must be a PositionBias, such as ops\.Kerple\(p, a\), not str"),
    ],
)
def test_what_is_no_bias(bias, error, message):
    inputs = jax.tree.map(lambda x: x.astype(jnp.float32), draw(4))
    with pytest.raises(error, match=message):
        causal_attention(**inputs, position_bias=bias)


@pytest.mark.parametrize("implementation", ["triton", "cudnn", "splash"])
def test_kernels_have_none(implementation):
    inputs = jax.tree.map(lambda x: x.astype(jnp.float32), draw(4))
    with pytest.raises(NotImplementedError, match=f"{implementation}.*(no position_bias|it needs)"):
        causal_attention(**inputs, position_bias=ops.Alibi(jnp.ones(4)), implementation=implementation)
