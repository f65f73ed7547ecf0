"""Norm, rotation, feed-forward, gate, shift and initialisation, each against its formula in NumPy."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support.layers_cases import CASE_IDS, CASES, D_MODEL, make_mixer, normal, randomise

from deltaformer_jax import ops
from deltaformer_jax.config.rope_scaling import frequencies, magnitude, parse
from deltaformer_jax.layers.embedding import Embedding
from deltaformer_jax.layers.feed_forward import SwiGLU
from deltaformer_jax.layers.kv_shift import KVShift, ShiftTail, last_real_token
from deltaformer_jax.layers.linear import Gate, kernel
from deltaformer_jax.layers.mixers.softmax_attention import SoftmaxAttention, alibi_slopes
from deltaformer_jax.layers.norms import RMSNorm, rms_normalize
from deltaformer_jax.layers.query_key_value import QueryKeyValue
from deltaformer_jax.layers.rotary import rotate


def test_rms_norm():
    x = 50 * normal((2, 3, 8))
    norm = randomise(lambda: RMSNorm(8, epsilon=1e-5))
    expected = x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-5) * np.asarray(norm.scale[...])
    np.testing.assert_allclose(norm(jnp.asarray(x, jnp.float32)), expected, rtol=1e-5)
    # In bfloat16 only the operand and the result are rounded, not what lies between.
    low = jnp.asarray(x, jnp.bfloat16)
    assert norm(low).dtype == jnp.bfloat16
    np.testing.assert_array_equal(norm(low), norm(low.astype(jnp.float32)).astype(jnp.bfloat16))


def test_rms_normalize_has_finite_gradients_at_zero():
    zero = jnp.zeros((4,))
    np.testing.assert_array_equal(rms_normalize(zero), zero)
    assert np.all(np.isfinite(jax.jacobian(rms_normalize)(zero)))


def test_rotation_depends_on_differences_of_positions():
    q, k = jnp.asarray(normal((1, 1, 1, 8)), jnp.float32), jnp.asarray(normal((1, 1, 1, 8), 1), jnp.float32)

    def score(at_q, at_k):
        return jnp.sum(rotate(q, jnp.array([[at_q]]), 100.0) * rotate(k, jnp.array([[at_k]]), 100.0))

    np.testing.assert_allclose(score(7, 3), score(104, 100), rtol=1e-4)
    assert abs(score(7, 3) - score(8, 3)) > 1e-3
    np.testing.assert_array_equal(rotate(q, jnp.array([[0]]), 100.0), q)


def test_rotation_is_a_complex_multiplication():
    x, positions = normal((2, 3, 2, 6)), np.array([[0, 5, 9], [1, 2, 3]])
    angle = positions[:, :, None, None] * 100.0 ** (-np.arange(3) / 3)
    turned = (x[..., :3] + 1j * x[..., 3:]) * np.exp(1j * angle)
    expected = np.concatenate([turned.real, turned.imag], -1)
    np.testing.assert_allclose(rotate(jnp.asarray(x, jnp.float32), jnp.asarray(positions), 100.0), expected, atol=1e-5)


def test_a_key_can_be_moved_to_another_position(x64):
    """rotate(rotate(k, p), p' − p) = rotate(k, p'), so that the keys of a cache can be given other positions."""
    key = jnp.asarray(np.random.default_rng(0).standard_normal((1, 4, 2, 8)))
    before, after = jnp.asarray([[0, 17, 999_999, 123_456]]), jnp.asarray([[1_000_000, 3, 0, 123_455]])
    moved = rotate(rotate(key, before, 10_000.0), after - before, 10_000.0)
    # An angle of 1e6 is off by 1e6 roundings.
    np.testing.assert_allclose(moved, rotate(key, after, 10_000.0), rtol=0, atol=16 * 1e6 * np.finfo(float).eps)


@pytest.mark.parametrize("scaling", ["none", "linear:3", "yarn:4,4096", "llama3:8,1,4,8192"])
def test_angles_are_exact_at_far_positions(scaling):
    """Against float64, to the roundings of the angle (`_angles`) and two of the products. A product is off by 0.03."""
    x, positions = normal((1, 6, 2, 16)), np.array([[0, 5, 4_095, 1_000_003, 2**31 - 1, -999_999]])
    rule = parse(scaling)
    angle = positions[:, :, None, None] * np.array(frequencies(10_000.0, 16, rule))
    turned = (x[..., :8] + 1j * x[..., 8:]) * np.exp(1j * angle) * magnitude(rule)
    expected = np.concatenate([turned.real, turned.imag], -1)
    found = rotate(jnp.asarray(x, jnp.float32), jnp.asarray(positions), 10_000.0, scaling=scaling)
    roundings = (7 * np.pi + 2) * magnitude(rule)
    np.testing.assert_allclose(found, expected, rtol=0, atol=roundings * 2.0**-24 * 2 * np.abs(x).max())


@pytest.mark.parametrize("options", [{}, {"rotary_fraction": 0.5, "rope_scaling": "yarn:2,16"}])
def test_a_cached_key_moves_in_float32(options):
    """Several moves of a key that was rotated, scaled and in part."""
    inputs = QueryKeyValue(
        8,
        2,
        2,
        8,
        rope_base=100.0,
        qk_norm=False,
        kv_shift=False,
        conv_size=0,
        norm_epsilon=1e-6,
        dtype=jnp.float32,
        rngs=nnx.Rngs(0),
        **options,
    )
    key, places = jnp.asarray(normal((1, 3, 2, 8)), jnp.float32), jnp.asarray([[16, 9, 0], [11, 9, 0], [3, 5, 0]])
    moved = inputs.rotated(key, places[:1], 100.0)
    for before, after in itertools.pairwise(places):
        moved = inputs.moved(moved, (after - before)[None], 100.0)
    expected = inputs.rotated(key, places[-1:], 100.0)
    # Four rotations, each to the rounding of its angle and two of its products.
    each = (7 * np.pi + 2) * 2.0**-24 * 2 * float(jnp.abs(key).max())
    np.testing.assert_allclose(moved, expected, rtol=0, atol=4 * each)
    if options:
        np.testing.assert_array_equal(moved[..., 4:], key[..., 4:])


def test_swiglu():
    module = SwiGLU(4, 6, rngs=nnx.Rngs(0))
    x = normal((2, 3, 4))
    gate, up, down = (np.asarray(w[...], np.float64) for w in (module.gate, module.up, module.down))
    expected = (x @ gate / (1 + np.exp(-x @ gate)) * (x @ up)) @ down
    np.testing.assert_allclose(module(jnp.asarray(x, jnp.float32)), expected, rtol=1e-4, atol=1e-6)


def test_gate_is_float32_for_bfloat16_input():
    gate = randomise(lambda: Gate(64, 3, axis="heads", rngs=nnx.Rngs(0)))
    x = jnp.asarray(normal((2, 5, 64)), jnp.bfloat16)
    exact = np.asarray(x, np.float64) @ np.asarray(gate.kernel[...], np.float64) + np.asarray(gate.bias[...])
    assert gate(x).dtype == jnp.float32
    np.testing.assert_allclose(gate(x), exact, rtol=1e-5, atol=1e-5)


def test_kernel_has_the_stated_variance():
    values = np.asarray(kernel(nnx.Rngs(0), (16, 25, 400), ("heads", "head_dim", "embed"), fan_in=400, scale=0.5)[...])
    np.testing.assert_allclose(values.std(), 0.5 / np.sqrt(400), rtol=0.01)
    assert np.abs(values).max() < 2.3 * values.std()


def test_shift_starts_as_a_mean_of_two():
    shift = KVShift(5, rngs=nnx.Rngs(0))
    for current, previous in [
        (shift.current_key, shift.previous_key),
        (shift.current_value, shift.previous_value),
    ]:
        np.testing.assert_allclose(current[...] + previous[...], 1.0, rtol=1e-6)
        assert np.all((current[...] >= 0) & (current[...] <= 1)) and len(set(np.asarray(current[...]).tolist())) == 5
    assert not np.array_equal(shift.current_key[...], shift.current_value[...])


def test_shift_keeps_the_last_raw_token():
    shift = randomise(lambda: KVShift(2, rngs=nnx.Rngs(0)))
    key, value = (jnp.asarray(normal((1, 4, 2, 3), seed), jnp.float32) for seed in (0, 1))
    zeros = jnp.zeros((1, 2, 3))
    whole_key, whole_value, tail = shift(key, value, tail=ShiftTail(zeros, zeros))
    np.testing.assert_array_equal(tail.key, key[:, -1])
    np.testing.assert_array_equal(tail.value, value[:, -1])
    _, _, tail = shift(key[:, :2], value[:, :2], tail=ShiftTail(zeros, zeros))
    late_key, late_value, _ = shift(key[:, 2:], value[:, 2:], tail=tail)
    np.testing.assert_array_equal(late_key, whole_key[:, 2:])
    np.testing.assert_array_equal(late_value, whole_value[:, 2:])


def test_a_wide_shift_starts_as_a_mean_too():
    """Window 2 draws the same numbers as ever, whichever part is shifted; a wider one draws more."""
    two = KVShift(5, rngs=nnx.Rngs(0))
    for window in (3, 4):
        shift = KVShift(5, window=window, rngs=nnx.Rngs(0))
        for current, previous, older in (
            (shift.current_key, shift.previous_key, shift.older_key),
            (shift.current_value, shift.previous_value, shift.older_value),
        ):
            assert older.shape == (window - 2, 5)
            np.testing.assert_allclose(current[...] + previous[...] + older[...].sum(0), 1.0, rtol=0, atol=1e-6)
            assert np.all((previous[...] >= 0) & (previous[...] < 1) & np.all(older[:-1] >= 0, axis=0))
    value = KVShift(5, parts="value", rngs=nnx.Rngs(0))
    assert (value.current_key, value.previous_key, value.older_key, value.older_value) == (None,) * 4
    np.testing.assert_array_equal(value.current_value[...], two.current_value[...])
    np.testing.assert_array_equal(value.previous_value[...], two.previous_value[...])


def test_a_window_of_two_is_the_wider_one_without_more_tokens():
    """A wider window whose further scalars are 0, in one call and after another; and what a part leaves alone."""
    key, value = (jnp.asarray(normal((1, 5, 2, 3), seed), jnp.float32) for seed in (0, 1))
    two = KVShift(2, parts="key", rngs=nnx.Rngs(0))
    wide = KVShift(2, window=4, parts="key", rngs=nnx.Rngs(0))
    wide.current_key[...], wide.previous_key[...] = two.current_key[...], two.previous_key[...]
    wide.older_key[...] = jnp.zeros((2, 2))
    for shift in (two, wide):
        tail, outputs = shift.empty_tail(1, 3, jnp.float32), []
        for part in (slice(0, 1), slice(1, 5)):
            *mixed, tail = shift(key[:, part], value[:, part], tail=tail)
            outputs.append(mixed)
        whole = two(key, value)[:2]
        for got, expected in zip(zip(*outputs), whole):
            np.testing.assert_allclose(jnp.concatenate(got, axis=1), expected, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(whole[1], value)


def test_last_real_token():
    x = jnp.arange(8.0).reshape(2, 4, 1)
    before = jnp.array([[-1.0], [-2.0]])
    np.testing.assert_array_equal(last_real_token(x, None, before), [[3], [7]])
    ids = jnp.array([[0, 1, 1, 0], [0, 0, 0, 0]])
    np.testing.assert_array_equal(last_real_token(x, ids, before), [[2], [-2]])


@pytest.mark.parametrize("tied", [True, False])
def test_embedding(tied):
    embedding = Embedding(5, 16, tied=tied, rngs=nnx.Rngs(0))
    tokens = jnp.array([[0, 4, 2]])
    table = np.asarray(embedding.table[...])
    assert table.shape == (128, 16)
    np.testing.assert_allclose(embedding(tokens), 4 * table[np.asarray(tokens)], rtol=1e-6)
    x = jnp.asarray(normal((1, 3, 16)), jnp.float32)
    head = table.T if tied else np.asarray(embedding.head[...])
    np.testing.assert_allclose(embedding.logits(x), np.asarray(x) @ head[:, :5], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_a_normalised_head(tied):
    """Logits by the definition, whatever the lengths of its vectors, made ready or not; zeros do no harm."""
    embedding = Embedding(5, 16, tied=tied, normalised=True, rngs=nnx.Rngs(0))
    lengths = jnp.asarray(np.random.default_rng(0).uniform(0.5, 20, 128), jnp.float32).at[5:].set(0.0)
    x = jnp.asarray(normal((1, 3, 16)), jnp.float32)
    head = np.asarray(embedding.table[...].T if tied else embedding.head[...])
    expected = np.asarray(x) @ (head / np.linalg.norm(head, axis=0))[:, :5]
    np.testing.assert_allclose(embedding.logits(x), expected, rtol=1e-5, atol=1e-5)
    if tied:
        embedding.table[...] = embedding.table[...] * lengths[:, None]
    else:
        embedding.head[...] = embedding.head[...] * lengths
    np.testing.assert_allclose(embedding.logits(x), expected, rtol=1e-5, atol=1e-5)
    ready = embedding.with_ready_head()
    np.testing.assert_array_equal(ready.logits(x), embedding.logits(x))
    tokens = jnp.array([[0, 4, 2]])
    np.testing.assert_array_equal(ready(tokens), embedding(tokens))
    gradient = jax.grad(lambda e: jnp.sum(e.with_ready_head().logits(x) ** 2))(embedding)
    again = jax.grad(lambda e: jnp.sum(e.logits(x) ** 2))(embedding)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), gradient, again)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_embedding_shows_a_token_that_is_none():
    embedding = Embedding(5, 4, tied=True, rngs=nnx.Rngs(0))
    vectors = embedding(jnp.array([[4, 5, -1, 200, -1]]), jnp.array([[1, 1, 1, 1, 0]]))
    np.testing.assert_array_equal(np.isnan(vectors).all(-1), [[False, True, True, True, False]])


@pytest.mark.parametrize("op", [ops.delta_attention, ops.causal_attention])
def test_padding_that_is_zero_need_not_be_cleared(op):
    """Values and gradients are the same bits, with NaN in the cotangent at padding."""
    ids = jnp.asarray([[0, 1, 1, 1, 2, 2, 0]])
    real = (ids != 0)[..., None, None]
    arrays = [jnp.where(real, jax.random.normal(jax.random.key(i), (1, 7, 2, 4)), 0) for i in range(3)]
    cotangent = jnp.where(real, jax.random.normal(jax.random.key(3), (1, 7, 2, 4)), jnp.nan)

    def both(**said):
        out, pull = jax.vjp(lambda *x: op(*x, segment_ids=ids, **said), *arrays)
        return out, pull(cotangent)

    cleared, promised = both(), both(padding_is_zero=True)
    jax.tree.map(np.testing.assert_array_equal, cleared, promised)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(promised))


@pytest.mark.parametrize("mixer, name, options", CASES, ids=CASE_IDS)
def test_what_a_mixer_gives_its_op_is_0_at_padding(mixer, name, options, monkeypatch):
    """The mixers promise it with `padding_is_zero`. The padding holds NaN, on both sides of two documents."""
    given = {}

    def op(query, key, value, *, padding_is_zero, write_query=None, **rest):
        assert padding_is_zero
        written = {} if write_query is None or isinstance(write_query, str) else {"write_query": write_query}
        given.update(query=query, key=key, value=value, **written)
        return jnp.zeros((*query.shape[:3], value.shape[3]))

    monkeypatch.setattr(ops, "causal_attention" if mixer is SoftmaxAttention else "delta_attention", op)
    ids = jnp.asarray([[0, 0, 1, 1, 1, 2, 2, 0]])
    x = jnp.where(ids[..., None] == 0, jnp.nan, jax.random.normal(jax.random.key(1), (1, 8, D_MODEL)))
    with jax.disable_jit():
        make_mixer(mixer, options)(x, segment_ids=ids)
    assert len(given) == 4 if options.get("write_query") == "projected" else len(given) >= 3
    for array in given.values():
        at_padding, elsewhere = array[ids == 0], array[ids != 0]
        assert not np.any(at_padding) and np.all(np.isfinite(elsewhere)) and np.any(elsewhere)


def test_slopes_of_alibi():
    """The paper's: 1/2, 1/4, … 1/256 of 8 heads; of 12 those, and every other one of 16."""
    assert alibi_slopes(8) == [2.0**-i for i in range(1, 9)]
    assert alibi_slopes(12) == [2.0**-i for i in range(1, 9)] + [2.0 ** -(i + 0.5) for i in range(4)]
    assert alibi_slopes(1) == [2.0**-8] and len(set(alibi_slopes(6))) == 6
