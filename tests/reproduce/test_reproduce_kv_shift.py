"""KV shifting's theorems in float64, against sums written out token by token."""

import jax
import numpy as np
import pytest

from deltaformer_jax.reproduce.kv_shift import kv_shift_theory as theory


@pytest.mark.parametrize("sigma, slope", [(0.5, 0.1), (2.0, 0.0)])
def test_one_layer_is_the_induction_head(sigma, slope):
    """As written in the docstring, a token at a time; and the library's attention of shifted keys and values."""
    x = np.random.default_rng(0).standard_normal((3, 9, 4))
    expected = []
    for row in x:
        weights = [np.exp(row[-1] @ row[s - 1] / sigma - slope * (8 - s)) for s in range(1, 8)]
        expected.append(sum(weight * row[s] for weight, s in zip(weights, range(1, 8))) / sum(weights))
    with jax.enable_x64(True):
        one = theory.one_layer(x, sigma, slope)
    # Weights of at most 1 and a sum of seven: a few dozen roundings of numbers below 4.
    np.testing.assert_allclose(theory.induction_head(x, sigma, slope), expected, rtol=0, atol=1e-14)
    np.testing.assert_allclose(one, expected, rtol=0, atol=1e-14)


def by_hand(alpha, beta, words, i):
    """The logits [T] of x_1 … x_T, x_i with orthonormal embeddings, by explicit keys, values and weights."""
    embedding = np.eye(words)
    row = [*range(words), i - 1]
    key = lambda s: alpha[0] * embedding[row[s]] + (alpha[1] * embedding[row[s - 1]] if s else 0)
    value = lambda s: beta[0] * embedding[row[s]] + (beta[1] * embedding[row[s - 1]] if s else 0)
    weights = np.array([np.exp(embedding[row[-1]] @ key(s)) for s in range(words + 1)])
    return sum(weight * value(s) for s, weight in enumerate(weights / weights.sum()))


@pytest.mark.parametrize("words, i", [(4, 2), (5, 3), (12, 2), (12, 10)])
def test_theorem3s_loss_is_the_attentions(words, i):
    rng = np.random.default_rng(words)
    for _ in range(4):
        alpha, beta = rng.uniform(-1, 2, (2, 2))
        expected = by_hand(alpha, beta, words, i)
        with jax.enable_x64(True):
            answer, own, beside, other = map(float, theory.logits(alpha, beta, words))
            value, printed = (float(theory.loss(alpha, beta, words, printed)) for printed in (False, True))
            attended = theory.attention_logits(alpha, beta, words, i)
        named = {i + 1: answer, i: own, i - 1: beside, words: beside}
        formula = [named.get(t, other) for t in range(1, words + 1)]
        # Numbers below 8, about words + 20 roundings each.
        np.testing.assert_allclose(formula, expected, rtol=0, atol=1e-13)
        np.testing.assert_allclose(attended, expected, rtol=0, atol=1e-13)
        nats = np.log(np.exp(expected).sum()) - expected[i]
        assert abs(value - nats) < 1e-13 < abs(printed - nats)  # the paper's printed formula is another


def test_descent_goes_to_the_induction_heads_side():
    small = dict(widths=(), others=(10,), grid=5, points=1, steps=2000, length=8, rows=1)
    for cell in theory.cells(True, small):
        result = theory.run(cell, None, None, None)
        (alpha, beta), losses = result["end"], np.array(result["losses"])
        assert alpha < 0 and beta > 1 and result["path"][0] == [0.5, 0.5]
        axis = np.linspace(*result["axis"])
        assert axis[[1, 3]].tolist() == [0, 1]
        assert losses[3, 1] < losses[2, 2] < losses[1, 3]  # losses[β₁, α₁]: (0, 1), the middle, (1, 0)
