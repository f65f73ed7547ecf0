"""The mixers with padding, packed documents and caches: the same numbers as each document by itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support.layers_cases import (
    CASE_IDS,
    CASES,
    D_MODEL,
    LENGTH,
    MEMORY_CASES,
    MEMORY_IDS,
    PLAN,
    PLAN_LENGTHS,
    ROWS,
    feed,
    make_mixer,
    normal,
    outputs,
)

from deltaformer_jax.layers.feed_forward import SwiGLU
from deltaformer_jax.layers.mixers.delta_former import DeltaFormer
from deltaformer_jax.layers.mixers.softmax_attention import SoftmaxAttention

SIZES = dict(rtol=1e-9, atol=1e-10)
ALL = CASES + MEMORY_CASES


def case(index):
    """A float64 mixer and its input."""
    mixer, _, options = ALL[index]
    if index < len(CASES):
        options = options | {"implementation": "parallel"}
    module = make_mixer(mixer, options, dtype=jnp.float64)
    return module, jnp.asarray(normal((ROWS, LENGTH, D_MODEL)))


def loss(module, x, weight, ids):
    y = module(x, segment_ids=ids)[0]
    return jnp.sum(weight * y), y


gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))


@pytest.mark.parametrize("index", range(len(ALL)), ids=CASE_IDS + MEMORY_IDS)
def test_prefill_and_decode(index):
    with jax.enable_x64(True):
        module, x = case(index)
        expected = outputs(module, x)
        call = jax.jit(lambda block, ids, cache: module(block, segment_ids=ids, cache=cache))
        parts, cache = feed(call, module.init_cache(ROWS, LENGTH), np.asarray(x), PLAN, padding=np.nan)
        np.testing.assert_array_equal(cache.length, PLAN_LENGTHS)
        for row, length in enumerate(PLAN_LENGTHS):
            np.testing.assert_allclose(parts[row], expected[row, :length], **SIZES)


# Mixers of which another case has all that concerns padding: on demand.
LIKE_OTHERS = {
    *(f"DeltaFormer-{name}" for name in ("relu", "exp", "long keys", "gated")),
    *(f"{mixer}-plain" for mixer in ("SoftmaxAttention", "GatedLinearAttention", "DeltaNet")),
    *(f"{mixer}-plain" for mixer in ("GatedDeltaNet", "KimiDeltaAttention")),
    "SoftmaxAttention-alibi",
}
PACKED = [
    pytest.param(index, id=name, marks=pytest.mark.rare if name in LIKE_OTHERS else ())
    for index, name in enumerate(CASE_IDS + MEMORY_IDS)
]


@pytest.mark.parametrize("index", PACKED)
def test_packed_documents_and_padding(index):
    """Two documents in a row, padding that holds NaN before, between and after: outputs and gradients of each alone."""
    with jax.enable_x64(True):
        module, x = case(index)
        weight = jnp.asarray(normal(x.shape, 5))
        places = [(0, slice(1, 6)), (0, slice(7, 12)), (1, slice(4, 9))]
        (_, packed), packed_gradient = gradient(
            module, *_place(x, weight, places, [(0, 0, 5), (1, 0, 5), (0, 5, 10)], np.nan)
        )
        total = None
        for (row, place), source in zip(places, [(0, 0, 5), (1, 0, 5), (0, 5, 10)]):
            alone = [(0, slice(0, 5))]
            (_, single), single_gradient = gradient(module, *_place(x, weight, alone, [source], 0.0))
            np.testing.assert_allclose(packed[row, place], single[0, :5], **SIZES)
            total = single_gradient if total is None else jax.tree.map(jnp.add, total, single_gradient)
        np.testing.assert_array_equal(packed[0, [0, 6]], 0)
        np.testing.assert_array_equal(packed[1, [0, 1, 2, 3, 9, 10, 11]], 0)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **SIZES), packed_gradient, total)


def _place(x, weight, places, sources, padding):
    """Rows of x's shape with x[source row, start:stop] at each place, the loss's weights alike, and segment ids."""
    rows, weights = np.full(x.shape, padding), np.zeros(x.shape)
    ids = np.zeros(x.shape[:2], np.int32)
    for number, ((row, place), (source, start, stop)) in enumerate(zip(places, sources)):
        rows[row, place], weights[row, place] = x[source, start:stop], weight[source, start:stop]
        ids[row, place] = number + 3
    return jnp.asarray(rows), jnp.asarray(weights), jnp.asarray(ids)


def test_given_positions_are_used():
    module = make_mixer(SoftmaxAttention, dict(implementation="parallel"))
    x = jnp.asarray(normal((ROWS, LENGTH, D_MODEL)), jnp.float32)
    steps = jnp.broadcast_to(jnp.arange(LENGTH), (ROWS, LENGTH))
    placed = jax.jit(lambda positions: module(x, positions=positions)[0])
    y = outputs(module, x)
    np.testing.assert_allclose(placed(steps), y, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(placed(steps + 10), y, rtol=1e-3, atol=1e-5)  # only differences count
    assert np.abs(placed(3 * steps) - y).max() > 1e-3


def test_window_needs_no_more_slots_than_itself():
    cache = make_mixer(SoftmaxAttention, dict(window=3)).init_cache(2, 100)
    assert cache.memory.key.shape[1] == 3


def test_cache_holds_keys_and_u_only():
    """As large as a KV cache when w = k: v itself is not kept."""
    cache = make_mixer(DeltaFormer, {}).init_cache(2, 10)
    assert {leaf.shape for leaf in jax.tree.leaves(cache)} == {(2, 2, 10, 6), (2,)}  # [B, heads, N, width]


@pytest.mark.parametrize("mixer", [SoftmaxAttention, DeltaFormer])
def test_bfloat16_is_near_float32(mixer):
    """Four roundings of relative size 2^-8 lie on the way (x, the kernels, q k v, o); each is at most a fraction of the
    output's norm, and they add up. β = sigmoid of small numbers keeps ‖(I + βA)⁻¹‖ ≤ 1 / (1 − max β) small."""
    low, high = make_mixer(mixer, {}, dtype=jnp.bfloat16), make_mixer(mixer, {})
    leaves = [leaf.astype(jnp.float32) for leaf in jax.tree.leaves(low)]
    high = jax.tree.unflatten(jax.tree.structure(high), leaves)  # the same, rounded, parameters
    x = jnp.asarray(normal((ROWS, LENGTH, D_MODEL)), jnp.bfloat16)
    exact, near = outputs(high, x.astype(jnp.float32)), outputs(low, x)
    assert near.dtype == jnp.bfloat16
    error = np.linalg.norm(exact - near.astype(jnp.float32)) / np.linalg.norm(exact)
    assert 1e-5 < error < 8 * 2.0**-8


@pytest.mark.parametrize("mixer", [SoftmaxAttention, DeltaFormer])
@pytest.mark.parametrize(
    "options, message",
    [
        (dict(num_heads=3, num_kv_heads=2), "num_heads=3 must be a multiple of num_kv_heads=2"),
        (dict(head_dim=5), "head_dim=5 must be even"),
        (dict(num_kv_heads=0), "num_kv_heads=0 must be at least 1"),
        (dict(rope_base=0.5), "rope_base=0.5 must be greater than 1"),
    ],
)
def test_sizes_that_do_not_fit(mixer, options, message):
    with pytest.raises(ValueError, match=message):
        make_mixer(mixer, {}, **options)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(write_query="keys"), "write_query='keys' must be one of 'key', 'query', 'projected'"),
        (dict(write_similarity="sofmax"), "write_similarity='sofmax'.*; did you mean softmax"),
        (dict(alpha="on"), "alpha='on' must be one of 'off', 'sigmoid'"),
        (dict(beta="off"), "beta='off' must be one of 'sigmoid', 'raw', 'one'"),
        (dict(write_key_norm="yes"), "write_key_norm='yes' must be one of 'auto', 'on', 'off'"),
    ],
)
def test_unknown_names(options, message):
    with pytest.raises(ValueError, match=message):
        make_mixer(DeltaFormer, options)


def test_wrong_inputs():
    module = make_mixer(DeltaFormer, {})
    with pytest.raises(ValueError, match=r"x must be \[batch, length, d_model\]"):
        module(jnp.zeros((3, D_MODEL)))
    with pytest.raises(ValueError, match="segment_ids must be"):
        module(jnp.zeros((2, 3, D_MODEL)), segment_ids=jnp.ones((2, 4), jnp.int32))
    with pytest.raises(ValueError, match="window=0 must be at least 1"):
        make_mixer(SoftmaxAttention, dict(window=0))
    with pytest.raises(ValueError, match="mlp_dim=0 must be at least 1"):
        SwiGLU(4, 0, rngs=nnx.Rngs(0))
