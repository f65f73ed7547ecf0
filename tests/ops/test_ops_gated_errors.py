"""Bad input to the gated ops: one error, raised while tracing, that names the argument and the fix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deltaformer_jax import gated_delta_rule, gated_linear_attention


def zeros(*shape, dtype=jnp.float32):
    return jnp.zeros(shape, dtype)


GOOD = dict(query=zeros(2, 6, 2, 8), key=zeros(2, 6, 2, 8), value=zeros(2, 6, 4, 5))

BAD = [
    (dict(query=zeros(6, 2, 8)), ValueError, r"query must have shape \[batch, time, heads, width\]"),
    (dict(query=zeros(2, 6, 4, 8)), ValueError, "query has 4 heads but key has 2: they must have the same number"),
    (dict(query=zeros(2, 6, 2, 7)), ValueError, "query has width 7 but key has 8"),
    (dict(query=zeros(2, 6, 2, 8, dtype=jnp.bfloat16)), TypeError, "query is bfloat16 but key is float32"),
    (dict(key=[1.0]), TypeError, "key must be an array, not list"),
    (dict(key=np.zeros((2, 6, 2, 8), np.int32)), TypeError, "key has dtype int32: cast it"),
    (dict(value=zeros(2, 6, 3, 5)), ValueError, "value has 3 heads: it must be a multiple of key's 2 heads"),
    (dict(value=zeros(2, 5, 4, 5)), ValueError, r"value has \[batch, time\] \(2, 5\) but key has \(2, 6\)"),
    (dict(value=zeros(2, 6, 4)), ValueError, "value must have shape"),
    (dict(value=zeros(2, 6, 4, 0)), ValueError, "heads and width must be at least 1"),
    (dict(value=zeros(2, 6, 4, 5, dtype=jnp.bfloat16)), TypeError, "value is bfloat16 but key is float32"),
    (dict(value=None), TypeError, "value must be an array, not NoneType"),
    (
        dict(log_decay=zeros(2, 6, 2)),
        ValueError,
        r"log_decay must have shape .* = \(2, 6, 4\) or, .* \(2, 6, 4, 8\)",
    ),
    (dict(log_decay=zeros(2, 6, 4, 5)), ValueError, r"it has \(2, 6, 4, 5\)"),
    (dict(log_decay=[-0.5]), ValueError, "log_decay must have shape .* or be one number; it has list"),
    (dict(log_decay=np.zeros((2, 6, 4), np.int32)), TypeError, "log_decay has dtype int32"),
    (dict(log_decay=zeros(2, 6, 4).at[0, 3, 1].set(0.25)), ValueError, "log_decay holds 0.25: .* at most 0"),
    (
        dict(log_decay=zeros(2, 6, 4).at[1, 2, 3].set(-jnp.inf)),
        ValueError,
        "log_decay holds -inf, inf or NaN.* pass -1000",
    ),
    (dict(scale=float("inf")), ValueError, "scale=inf: it must be a finite"),
    (dict(initial_state=zeros(2, 2, 8, 5)), ValueError, r"initial_state must have shape .* = \(2, 4, 8, 5\); it has"),
    (dict(initial_state=np.zeros((2, 4, 8, 5), np.int32)), TypeError, "initial_state has dtype int32"),
    (dict(segment_ids=np.ones((2, 5), np.int32)), ValueError, r"segment_ids must have shape .* = \(2, 6\)"),
    (dict(segment_ids=np.ones((2, 6), np.float32)), TypeError, "segment_ids has dtype float32"),
    (dict(segment_ids=np.asarray([[1, 1, 2, 2, 1, 1]] * 2)), ValueError, "an id occurs in two separate runs"),
    (dict(chunk_size=0), ValueError, "chunk_size=0: it must be a positive integer"),
    (dict(chunk_size=2.0), ValueError, "chunk_size=2.0"),
    (dict(implementation="chunk"), ValueError, "implementation='chunk' is unknown.*; did you mean chunked"),
    (dict(implementation="parallel"), ValueError, "implementation='parallel' is unknown"),
    (dict(implementation="pallas_tpu"), NotImplementedError, "implementation='pallas_tpu' runs on tpu only"),
    (dict(implementation="triton"), NotImplementedError, "implementation='triton'"),
]

BAD_BETA = [
    (zeros(2, 6, 2), ValueError, r"beta must have shape .* = \(2, 6, 4\) .*; it has \(2, 6, 2\)"),
    ([0.5], ValueError, "beta must have shape .* or be one number; it has list"),
    (np.zeros((2, 6, 4), np.int32), TypeError, "beta has dtype int32"),
]


@pytest.mark.parametrize("op", [gated_delta_rule, gated_linear_attention])
@pytest.mark.parametrize("bad, error, message", BAD)
def test_bad_input(op, bad, error, message):
    with pytest.raises(error, match=message):
        op(**{**GOOD, **bad})


@pytest.mark.parametrize("beta, error, message", BAD_BETA)
def test_bad_beta(beta, error, message):
    with pytest.raises(error, match=message):
        gated_delta_rule(**GOOD, beta=beta)


def test_errors_come_while_tracing():
    with pytest.raises(ValueError, match="initial_state must have shape"):
        jax.eval_shape(lambda x: gated_delta_rule(**GOOD, initial_state=x), zeros(2, 4, 5, 8))


def test_a_positive_decay_at_padding_is_no_error():
    log_decay = zeros(2, 6, 4).at[:, 0].set(1.0)
    segment_ids = np.ones((2, 6), np.int32)
    segment_ids[:, 0] = 0
    out, _ = gated_delta_rule(**GOOD, log_decay=log_decay, segment_ids=segment_ids)
    assert out.shape == (2, 6, 4, 5)


def test_ids_are_not_checked_under_jit():
    """They are undefined there, and no error: values are unknown while tracing."""
    ids = jnp.asarray([[1, 1, 2, 2, 1, 1]] * 2)
    out, _ = jax.jit(lambda ids: gated_delta_rule(**GOOD, segment_ids=ids))(ids)
    assert out.shape == (2, 6, 4, 5)
