"""The closed forms of cost, against counts that know nothing of them."""

import functools
import math
import unittest.mock

import jax
import jax.numpy as jnp
import pytest
from jax.scipy.linalg import solve_triangular
from support.layers_cases import CASE_IDS, CASES, D_MODEL, HEAD_DIM, HEADS, make_mixer

from deltaformer_jax.layers.mixers.delta_former import DeltaFormer
from deltaformer_jax.layers.mixers.softmax_attention import SoftmaxAttention
from deltaformer_jax.ops.deltaformer import definition as delta_parallel


def operations(jaxpr):
    """(FLOPs of every dot_general, of every triangular solve) in a jaxpr; a scan's body counts as often as it runs."""
    dots = solves = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            dots += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[i] for i in contracted)
        if equation.primitive.name == "triangular_solve":
            # n rows of (row number) multiply-adds for each right-hand side: half of a square.
            solves += math.prod(equation.invars[1].aval.shape) * equation.invars[0].aval.shape[-1]
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_jaxpr):
            if _is_jaxpr(value):
                inner = operations(getattr(value, "jaxpr", value))
                dots, solves = dots + times * inner[0], solves + times * inner[1]
    return dots, solves


def _is_jaxpr(value):
    return hasattr(value, "eqns") or hasattr(value, "jaxpr")


def counted_per_token(trace, length):
    """FLOPs per token, `trace(n)` being the jaxpr of n tokens in the T×T form: products whose number grows with the
    length's square, of which the causal mask leaves half, count half."""
    # A triangular system counts as what substitution costs, not as the products that stand for it.
    substitution = functools.partial(solve_triangular, lower=True, unit_diagonal=True)
    with unittest.mock.patch.object(delta_parallel, "solve_by_halves", substitution):
        dots, solves = operations(trace(length))
        twice, _ = operations(trace(2 * length))
    square = (twice - 2 * dots) / 2  # dots = a n + b n²
    return (dots - square / 2 + solves) / length


def convolution_flops(module):
    """Of one token: short convolutions are sums of shifted arrays, not products that a jaxpr names."""
    leaves = jax.tree_util.tree_leaves_with_path(module)
    return sum(2 * leaf.size for path, leaf in leaves if "convolution" in jax.tree_util.keystr(path))


@pytest.mark.parametrize("mixer, name, options", CASES, ids=CASE_IDS)
def test_at_length_zero_kernels_are_what_is_left(mixer, name, options):
    """Every parameter of rank 2 or more is multiplied once with each token, but for KV shifting's scalars and those of
    a position bias, which are multiplied with each pair of tokens."""
    module = make_mixer(mixer, options)
    leaves = jax.tree_util.tree_leaves_with_path(module)
    others = lambda path: any(
        name in jax.tree_util.keystr(path) for name in ("shift", "position_bias", "read_bias", "write_bias")
    )
    kernels = sum(leaf.size for path, leaf in leaves if leaf.ndim > 1 and not others(path))
    assert module.flops_per_token(0) == 2 * kernels


@pytest.mark.parametrize("mixer, name, options", CASES, ids=CASE_IDS)
def test_as_many_as_the_parallel_form_does(mixer, name, options):
    full = {name: value for name, value in options.items() if name not in ("window", "initial_tokens")}
    module = make_mixer(mixer, full | dict(implementation="parallel"))

    def trace(length):
        return jax.make_jaxpr(lambda x: module(x)[0])(jnp.zeros((1, length, D_MODEL))).jaxpr

    counted = counted_per_token(trace, 10)
    if getattr(module, "tied", False):
        counted -= 2 * HEADS * HEAD_DIM * 10  # the parallel form makes two passes of what can be one
    counted += convolution_flops(module)

    assert module.flops_per_token(10) == pytest.approx(counted, rel=1e-12)


def test_tied_costs_one_attention():
    tied = make_mixer(DeltaFormer, dict(write_query="query", beta="one"))
    attention = make_mixer(SoftmaxAttention, {})
    assert tied.tied and tied.flops_per_token(100) == attention.flops_per_token(100)
    assert not make_mixer(DeltaFormer, dict(write_query="query", write_scale=0.1)).tied
    assert not make_mixer(DeltaFormer, dict(write_query="query", write_key_norm="on", write_scale=1.0)).tied
    for place in ("read", "write"):
        options = dict(write_query="query", position_bias="kerple", position_bias_in=place)
        assert not make_mixer(DeltaFormer, options).tied


@pytest.mark.parametrize("length, window", [(8, 3), (8, 8), (8, 20), (5, 1)])
def test_window_counts_its_band(length, window):
    """Visible pairs, less half of the diagonal's in the rows that the window doesn't cut: the band's area."""
    module = make_mixer(SoftmaxAttention, dict(window=window))
    pairs = sum(1 for i in range(length) for j in range(i + 1) if i - j < window) - min(length, window) / 2
    attention = module.flops_per_token(length) - module.flops_per_token(0)
    assert attention == pytest.approx(4 * HEADS * HEAD_DIM * pairs / length)
