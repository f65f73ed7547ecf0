"""KV shifting's theorems in float64, against sums written out token by token; and its runs in a smallest form."""

import jax
import numpy as np
import pytest
from etils import epath

from deltaformer_jax.reproduce.kv_shift import induction, kv_shift_rates, kv_shift_tasks
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


class NeverStop:
    requested = False


def done(module, sizes, folder):
    """The records of the cells of an experiment, run one after another."""
    cells = module.cells(True, sizes)
    run = module.EXPERIMENT.run
    return [
        {"settings": cell, "result": run(cell, epath.Path(folder / str(i)), print, NeverStop), "seconds": 1.0}
        for i, cell in enumerate(cells)
    ]


@pytest.mark.long
def test_one_layer_with_the_shift_learns_induction(tmp_path):
    strict = dict(vocabulary=16, words=8, length=16, steps=150, models=("softmax, 1 layer", induction.SHIFTED))
    sizes = dict(induction.QUICK, strict=strict, width=16, by_width=(), rates={16: 1e-2})
    vanilla, shifted = done(induction, sizes, tmp_path)
    assert shifted["result"]["accuracy"] >= 0.99 and vanilla["result"]["accuracy"] <= 0.5
    assert [line["0.995 at step"] == "–" for line in induction.rows([vanilla, shifted])] == [True, False]


@pytest.mark.long
def test_tasks_and_rates_in_three_steps(tmp_path):
    size = dict(width=16, heads=1, layers=1, length=12, steps=3, rate=1e-2)
    sizes = {"3-grams": dict(size, contexts=8), "hops": dict(size, most=2), "models": ("softmax",), "eval_rows": 8}
    records = done(kv_shift_tasks, sizes, tmp_path / "tasks")
    assert [list(record["result"]["tests"]) for record in records] == [[], ["1 hops", "2 hops"]]
    assert [line["task"] for line in kv_shift_tasks.rows(records)] == ["3-grams", "hops"]
    sizes = dict(models=("softmax, KV shifting",), rates=(1e-3,), seeds=1, steps=3, eval_batches=1)
    (record,) = done(kv_shift_rates, sizes, tmp_path / "rates")
    assert sum(record["result"]["signs"].values()) == 4 * 2 and record["result"]["eval_bits_per_byte"] < 9
    (line,) = kv_shift_rates.rows([record])
    assert sum(line[sign] for sign in kv_shift_rates.SIGNS) == 8
