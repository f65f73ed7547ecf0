"""Every memory of the library is one recurrence: S_t = D_t S_{t−1} A_t + U_t, read as S_t φ(q_t).

    memory                  D        A                           U            φ
    linear attention        1        1                           v kᵀ         k
    retention               γ        1                           v kᵀ         k
    gated linear attention  1        diag(α)                     v kᵀ         k
    DeltaNet                1        1 − β k kᵀ                  β v kᵀ       k
    Gated DeltaNet          γ        1 − β k kᵀ                  β v kᵀ       k
    Kimi Delta Attention    1        diag(α) (1 − β k kᵀ)        β v kᵀ       k
    DeltaProduct            1        Π (1 − β_j k_j k_jᵀ)        Σ v_j β_j k_jᵀ Π_{l>j} (1 − β_l k_l k_lᵀ)    k
    Gated DeltaNet-2        1        diag(α) (1 − (b ⊙ k) kᵀ)    (w ⊙ v) kᵀ   k
    RWKV-7                  1        diag(α) − κ (η ⊙ κ)ᵀ        v kᵀ         k
    softmax attention       1        1                           v φᵀ         e, divided by a second memory of v = 1
    forgetting gate         f        1                           v φᵀ         e, the same
    DeltaFormer             1        1 − β φ φᵀ / (z·φ)          v φᵀ         e, the same; z = Σ φ(k_i), i < t
    DeltaFormer, linear     1        1 − β k kᵀ                  v kᵀ         k

e are the monomials of e^{x·y}: φ(x)_m = x^m / √(m!), here up to degree 14. With ‖x‖ ‖y‖ ≤ 1 what is left out is below
1e-11. Source: the unified update of Zhong et al., arXiv 2505.19488, as others restate it; DeltaFormer's row with its
normaliser, and the table, are this library's.
"""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deltaformer_jax import (
    causal_attention,
    delta_attention,
    gated_delta_rule,
    gated_linear_attention,
    generalized_delta_rule,
)

TOKENS, WIDTH, VALUES, DEGREE = 23, 3, 2, 14
POWERS = np.array([m for m in itertools.product(range(DEGREE + 1), repeat=WIDTH) if sum(m) <= DEGREE])
ROOTS = np.sqrt([math.prod(map(math.factorial, map(int, m))) for m in POWERS])


def exponential(x):
    return np.prod(x[None] ** POWERS, axis=1) / ROOTS


draw = np.random.default_rng(0)
QUERY, KEY = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in draw.normal(size=(2, TOKENS, WIDTH)))
VALUE = draw.normal(size=(TOKENS, VALUES))
BETA, GATE = draw.uniform(0.1, 0.9, (2, TOKENS))
CHANNELS = draw.uniform(0.5, 1.0, (TOKENS, WIDTH))
ERASE, WRITE = draw.uniform(0.1, 0.9, (TOKENS, WIDTH)), draw.uniform(0.1, 0.9, (TOKENS, VALUES))
KAPPA = np.roll(KEY, 1, axis=-1)  # another unit vector
STEP_KEY, STEP_VALUE, STEP_BETA = QUERY, draw.normal(size=(TOKENS, VALUES)), GATE  # of DeltaProduct's first step


def recurrence(write, features, normalised):
    """The reads [T, V] of the recurrence; write(t, k, z) -> (D, A, U), or in place of U the row that v multiplies."""
    count = len(features(KEY[0]))
    state, ones, z, reads = np.zeros((VALUES, count)), np.zeros(count), np.zeros(count), []
    for t in range(TOKENS):
        k = features(KEY[t])
        decay, matrix, row = write(t, k, z)
        state = decay * state @ matrix + (np.outer(VALUE[t], row) if row.ndim == 1 else row)
        ones = decay * ones + k  # the memory of the normaliser is read, never corrected
        z = z + k
        q = features(QUERY[t])
        reads.append(state @ q / (ones @ q if normalised else 1.0))
    return np.array(reads)


def corrected(t, k, scale):
    return np.eye(len(k)) - scale * np.outer(k, k)


def product_step(t, k, z):
    """Two steps: first the step's own key, value and β, then the token's."""
    second = corrected(t, k, BETA[t])
    first = np.outer(STEP_VALUE[t], STEP_BETA[t] * STEP_KEY[t])
    return 1, corrected(t, STEP_KEY[t], STEP_BETA[t]) @ second, first @ second + np.outer(VALUE[t], BETA[t] * k)


def product_op(query, key, value, **more):
    """The delta rule on two steps a token, of which the second is read."""
    turns = lambda *pair: jnp.stack(pair, axis=2).reshape(pair[0].shape[0], -1, *pair[0].shape[2:])
    steps = [jnp.asarray(x)[None, :, None] for x in (STEP_KEY, STEP_VALUE, STEP_BETA, BETA)]
    arrays = turns(query, query), turns(steps[0], key), turns(steps[1], value)
    return gated_delta_rule(*arrays, beta=turns(*steps[2:]), scale=1.0, chunk_size=8)[0][:, 1::2]


same = lambda x: x
eye = lambda k: np.eye(len(k))
# Name -> (its D, A and U; φ; whether the read is divided; the op).
ROWS = {
    "linear attention": (lambda t, k, z: (1, eye(k), k), same, False, "gla", {}),
    "retention": (lambda t, k, z: (0.9, eye(k), k), same, False, "gla", {"log_decay": np.full(TOKENS, math.log(0.9))}),
    "gated linear attention": (
        lambda t, k, z: (1, np.diag(CHANNELS[t]), k),
        same,
        False,
        "gla",
        {"log_decay": np.log(CHANNELS)},
    ),
    "DeltaNet": (lambda t, k, z: (1, corrected(t, k, BETA[t]), BETA[t] * k), same, False, "delta", {"beta": BETA}),
    "Gated DeltaNet": (
        lambda t, k, z: (GATE[t], corrected(t, k, BETA[t]), BETA[t] * k),
        same,
        False,
        "delta",
        {"beta": BETA, "log_decay": np.log(GATE)},
    ),
    "Kimi Delta Attention": (
        lambda t, k, z: (1, np.diag(CHANNELS[t]) @ corrected(t, k, BETA[t]), BETA[t] * k),
        same,
        False,
        "delta",
        {"beta": BETA, "log_decay": np.log(CHANNELS)},
    ),
    "DeltaProduct": (product_step, same, False, "product", {}),
    "Gated DeltaNet-2": (
        lambda t, k, z: (
            1,
            np.diag(CHANNELS[t]) @ (np.eye(WIDTH) - np.outer(ERASE[t] * k, k)),
            np.outer(WRITE[t] * VALUE[t], k),
        ),
        same,
        False,
        "generalized",
        {"erase_key": CHANNELS * ERASE * KEY, "erase_write": KEY, "log_decay": np.log(CHANNELS), "written": WRITE},
    ),
    "RWKV-7": (
        lambda t, k, z: (1, np.diag(CHANNELS[t]) - np.outer(KAPPA[t], ERASE[t] * KAPPA[t]), k),
        same,
        False,
        "generalized",
        {
            "erase_key": KAPPA,
            "erase_write": ERASE * KAPPA,
            "log_decay": np.log(CHANNELS),
            "written": np.ones_like(VALUE),
        },
    ),
    "softmax attention": (lambda t, k, z: (1, eye(k), k), exponential, True, "softmax", {}),
    "forgetting gate": (
        lambda t, k, z: (GATE[t], eye(k), k),
        exponential,
        True,
        "softmax",
        {"log_decay": np.log(GATE)},
    ),
    "DeltaFormer": (
        lambda t, k, z: (1, corrected(t, k, BETA[t] / (z @ k) if t else 0.0), k),
        exponential,
        True,
        "delta former",
        {"beta": BETA},
    ),
    "DeltaFormer, linear": (
        lambda t, k, z: (1, corrected(t, k, BETA[t]), k),
        same,
        False,
        "delta former",
        {"beta": BETA, "write_similarity": "linear", "read_similarity": "linear"},
    ),
}
OPS = {
    "gla": lambda *arrays, **more: gated_linear_attention(*arrays, scale=1.0, chunk_size=8, **more)[0],
    "delta": lambda *arrays, **more: gated_delta_rule(*arrays, scale=1.0, chunk_size=8, **more)[0],
    "product": product_op,
    "generalized": lambda q, k, v, written, **more: generalized_delta_rule(
        q, k, written * v, scale=1.0, chunk_size=8, **more
    )[0],
    "softmax": lambda *arrays, **more: causal_attention(*arrays, scale=1.0, **more),
    "delta former": lambda *arrays, **more: delta_attention(
        *arrays, write_scale=1.0, read_scale=1.0, chunk_size=16, **more
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_the_op_is_its_row(name):
    write, features, normalised, op, more = ROWS[name]
    expected = recurrence(write, features, normalised)
    with jax.enable_x64(True):
        arrays = [jnp.asarray(x)[None, :, None] for x in (QUERY, KEY, VALUE)]
        more = {key: x if isinstance(x, str) else jnp.asarray(x)[None, :, None] for key, x in more.items()}
        found = OPS[op](*arrays, **more)[0, :, 0]
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)
