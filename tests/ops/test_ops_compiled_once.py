"""Called again with the same shapes, outside jit, nothing is traced or compiled."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.compiled import counted

from deltaformer_jax import (
    KUCache,
    KVCache,
    causal_attention,
    compress_cache,
    delta_attention,
    delta_values,
    gated_delta_rule,
    gated_linear_attention,
    shift_mix,
)

B, T, H, K = 2, 20, 2, 4
RNG = np.random.default_rng(0)
Q, KEY, V = (jnp.asarray(RNG.standard_normal((B, T, H, K)), jnp.float32) for _ in range(3))
BETA = jnp.full((B, T, H), 0.5)
IDS = jnp.asarray([[1] * 15 + [0] * 5, [0] * 4 + [1] * 16])


def cached():
    cache = KUCache.empty(B, 40, H, H, K, K)
    _, cache = delta_attention(Q, KEY, V, beta=BETA, segment_ids=IDS, cache=cache)
    out, cache = delta_attention(Q[:, :1], KEY[:, :1], V[:, :1], cache=cache)
    return out, compress_cache(cache, KEY[:, :6])


def attention_cached():
    cache = KVCache.empty(B, 7, H, K, K, decay_heads=H)
    _, cache = causal_attention(Q, KEY, V, log_decay=-BETA, window=7, cache=cache)
    return causal_attention(Q[:, :1], KEY[:, :1], V[:, :1], log_decay=-BETA[:, :1], window=7, cache=cache)


CALLS = {
    "delta_attention": lambda: delta_attention(Q, KEY, V, beta=BETA, segment_ids=IDS, return_cache=True),
    "recurrent": lambda: delta_attention(Q, KEY, V, alpha=0.5, implementation="recurrent"),
    "parallel": lambda: delta_attention(Q, KEY, V, write_query="query", implementation="parallel"),
    "its gradient": lambda: jax.grad(lambda q: delta_attention(q, KEY, V, beta=BETA).sum())(Q),
    "delta_values": lambda: delta_values(KEY, V, beta=BETA),
    "caches": cached,
    "causal_attention": lambda: causal_attention(Q, KEY, V, window=5, sinks=jnp.zeros(H), return_cache=True),
    "its caches": attention_cached,
    "gated_delta_rule": lambda: gated_delta_rule(Q, KEY / 4, V, beta=BETA, log_decay=-BETA, segment_ids=IDS),
    "gated recurrent": lambda: gated_delta_rule(Q, KEY / 4, V, implementation="recurrent"),
    "gated_linear_attention": lambda: gated_linear_attention(Q, KEY, V, log_decay=-1.0),
    "shift_mix": lambda: shift_mix(KEY, jnp.ones(H), jnp.ones(H), segment_ids=IDS),
    "own similarity": lambda: delta_attention(Q, KEY, V, write_similarity=jnp.tanh),
}


@pytest.mark.parametrize("name", CALLS)
def test_the_second_call_traces_and_compiles_nothing(name):
    with counted() as first:
        CALLS[name]()
    assert first
    with counted() as second:
        jax.block_until_ready(CALLS[name]())
    assert not second


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tempered:
    """κ = tanh(s / temperature), the temperature an array."""

    temperature: jax.Array

    def weight(self, scores):
        return jnp.tanh(scores / self.temperature)


def tempered(similarity, implementation=None, dtype=jnp.float32):
    arrays = (x.astype(dtype) for x in (Q, KEY, V))
    how = dict(write_similarity=similarity, read_similarity=similarity, implementation=implementation)
    return delta_attention(*arrays, **how)


def test_a_similarity_with_arrays_is_an_argument():
    """Other arrays are other values and no other program; a Partial does as a dataclass does."""
    tempered(Tempered(jnp.float32(2)))
    with counted() as again:
        found = tempered(Tempered(jnp.float32(3)))
    assert not again
    np.testing.assert_array_equal(found, tempered(lambda s: jnp.tanh(s / jnp.float32(3))))
    partial = jax.tree_util.Partial(lambda temperature, s: jnp.tanh(s / temperature), jnp.float32(3))
    np.testing.assert_array_equal(found, tempered(partial))
    _, cache = delta_attention(Q, KEY, V, write_similarity=partial, return_cache=True)
    np.testing.assert_array_equal(
        compress_cache(cache, KEY[:, :3], read_similarity=partial).value,
        compress_cache(cache, KEY[:, :3], read_similarity=Tempered(jnp.float32(3))).value,
    )


def test_gradients_of_a_similaritys_arrays(x64):
    """ "parallel" and "recurrent" have them, as differences do; "chunked" says so and gives those of the others."""
    total = lambda temperature, form: tempered(Tempered(temperature), form, jnp.float64).sum()
    temperature, step = jnp.float64(2), 1e-5
    by_difference = total(temperature + step, "parallel") - total(temperature - step, "parallel")
    for implementation in ("parallel", "recurrent"):
        gradient = jax.grad(total)(temperature, implementation)
        np.testing.assert_allclose(gradient, by_difference / (2 * step), rtol=1e-4)
    for transformed in (jax.grad(total), jax.jit(jax.grad(total), static_argnums=1)):
        with pytest.raises(NotImplementedError, match="'chunked' has no gradient for the arrays that a similarity"):
            transformed(temperature, None)

    def of_queries(implementation):
        how = dict(write_similarity=Tempered(jnp.float32(2)), implementation=implementation)
        return jax.grad(lambda q: delta_attention(q, KEY, V, **how).sum())(Q)

    np.testing.assert_allclose(of_queries(None), of_queries("parallel"), atol=1e-5)


@pytest.mark.parametrize(
    ("op", "instead"),
    [
        (lambda x: delta_attention(x, x, x), "'recurrent' or 'parallel'"),
        (lambda x: delta_values(x, x), "'recurrent' or 'parallel'"),
        (lambda x: causal_attention(x, x, x), "'recurrent' or 'parallel'"),
        (lambda x: gated_delta_rule(x, x, x)[0], "'recurrent'"),
    ],
    ids=["delta_attention", "delta_values", "causal_attention", "gated_delta_rule"],
)
def test_forward_mode_is_refused_with_what_has_it(op, instead):
    with pytest.raises(NotImplementedError, match=rf"no forward-mode derivative .*: use implementation={instead}"):
        jax.jvp(op, (KEY / 4,), (V,))
