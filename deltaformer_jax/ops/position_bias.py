"""Biases of attention scores by position, with trained numbers: ALiBi, Kerple, FIRE and DAPE.

    s_ij = scale · q_i·k_j + b(i, j),      j ≤ i tokens of one segment

    Alibi     b_h = −m_h (i − j)
    Kerple    b_h = −p_h log(1 + a_h (i − j))
    Fire      b_h = f_h( ψ(i − j) / ψ(max(L, i)) ),        ψ(x) = log(1 + c x),  f(x) = W₂ relu(w₁ x + c₁)
    Dape      b = B + f(A, B),                             f = W₂ leaky_relu(W_A A + W_B B + c₁)

In DeltaFormer's write, s_ti = scale · w_t·k_i + b(t, i) for i < t, with the heads of the write query w.

i and j are positions in the segment, from 0. In Dape, A_h = scale · q_i·k_j are the scores of all heads of one pair
(i, j), and B is one of the other biases. The last layers have no constants: a constant of a head changes no softmax.

A bias of your own is a pytree of float arrays with a method `__call__`, see `PositionBias`.

Sources: ALiBi: Press et al., arXiv 2108.12409. Kerple, its logarithmic form: Chi et al., arXiv 2205.09921, eq. 7. FIRE:
Li et al., arXiv 2310.04418, eq. 4 and 5. DAPE: Zheng et al., arXiv 2405.14722, eq. 2.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

from deltaformer_jax.ops.common.checks import check_float
from deltaformer_jax.ops.common.tiles import accumulation_dtype

LEAKY_SLOPE = 0.01
BIASES = ("position_bias", "write_bias", "read_bias")  # the arguments of ops that are a PositionBias
BIASED_CHUNK = 128  # most rows of a chunk: a bias may compute tens of numbers for each pair of tokens of a tile


class PositionBias(Protocol):
    """What is added to scores of H heads: a pytree of float arrays, each [H, …] or, shared by all heads, [1, …].

    The ops call it on parts of the score matrix and differentiate it with `jax.vjp`: it must treat each pair (i, j) by
    itself. It must be finite with finite derivatives for every distance ≥ 0.
    """

    def __call__(self, scores: jax.Array, distance: jax.Array, position: jax.Array) -> jax.Array:
        """scores [B, H, R, C] of R rows and C columns, distance int32 [1 or B, R, C] and position int32 [1 or B, R] of
        the rows -> the bias [1 or B, H, R, C]. A distance is 0 where a row does not see the column."""
        ...


class Biases(NamedTuple):
    """Those of the scores of DeltaFormer's write, of its Hu write heads, and of its read; each may be None."""

    write: PositionBias | None = None
    read: PositionBias | None = None

    @property
    def given(self) -> bool:
        """Whether there is one."""
        return any(bias is not None for bias in self)


def mixes_heads(bias: PositionBias) -> bool:
    """Whether a head's bias depends on the scores of other heads: its attribute `mixes_heads`, False by default."""
    return getattr(bias, "mixes_heads", False)


def as_position_bias(
    bias, heads: int, like: jax.Array, argument: str = "position_bias", whose: str = "query heads"
) -> PositionBias:
    """`bias` with its arrays in the accumulation dtype of `like`. Raises, naming the argument, if it is no
    `PositionBias` for that many heads; `whose` says in the message what heads they are."""
    if not callable(bias):
        raise TypeError(f"{argument} must be a PositionBias, such as ops.Kerple(p, a), not {type(bias).__name__}")

    def fitting(path, x):
        name = f"{argument}{jax.tree_util.keystr(path)}"
        if not hasattr(x, "dtype") or not hasattr(x, "ndim"):
            raise TypeError(f"{name} must be an array, not {type(x).__name__}: a PositionBias is a pytree of arrays")
        check_float(name, x.dtype)
        if x.ndim == 0 or x.shape[0] not in (1, heads):
            raise ValueError(f"{name} has shape {x.shape}: its first axis must be the {heads} {whose}, or 1")
        return jnp.asarray(x, accumulation_dtype(like.dtype))

    return jax.tree.map_with_path(fitting, bias)


def _by_head(numbers):
    """[H] -> [1, H, 1, 1]."""
    return numbers.reshape(1, -1, 1, 1)


def _float(distance, like):
    return distance.astype(like.dtype)[:, None]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Alibi:
    """−m_h d, with slope [H] = m. The same as `log_decay` = −m, which the kernels of more platforms may support."""

    slope: jax.Array

    def __call__(self, scores, distance, position):
        return -_by_head(self.slope) * _float(distance, scores)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Kerple:
    """−p_h log(1 + a_h d), with p and a [H], both positive."""

    p: jax.Array
    a: jax.Array

    def __call__(self, scores, distance, position):
        return -_by_head(self.p) * jnp.log1p(_by_head(self.a) * _float(distance, scores))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Fire:
    """f_h(ψ(d) / ψ(max(L, i))), ψ(x) = log(1 + c x): c and length = L [1], positive; weight_in = w₁ and bias_in [1, D];
    weight_out = W₂ [H, D].

    Up to position L it depends on the distance alone. Behind it, distances are seen relative to i, so that f's argument
    lies in [0, 1] at every length.
    """

    c: jax.Array
    length: jax.Array
    weight_in: jax.Array
    bias_in: jax.Array
    weight_out: jax.Array

    def __call__(self, scores, distance, position):
        grown = lambda x: jnp.log1p(self.c[0] * x)
        furthest = jnp.maximum(self.length[0], position.astype(scores.dtype))
        x = grown(distance.astype(scores.dtype)) / grown(furthest)[..., None]
        weight, bias = (x.reshape(1, -1, 1, 1) for x in (self.weight_in, self.bias_in))
        hidden = jax.nn.relu(x[:, None] * weight + bias)
        return _contract(self.weight_out, hidden)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dape:
    """B + f(A, B), with static = B; scores_in = W_A and static_in = W_B [H, D]; bias_in [1, D]; weight_out = W₂ [H, D].
    With weight_out 0 it is B.

    f takes 6 H D floating-point operations for each pair (i, j), and its gradient twice as many.
    """

    static: PositionBias
    scores_in: jax.Array
    static_in: jax.Array
    bias_in: jax.Array
    weight_out: jax.Array

    mixes_heads = True

    def __call__(self, scores, distance, position):
        static = self.static(scores, distance, position)
        from_scores, from_static = _contract(self.scores_in.T, scores), _contract(self.static_in.T, static)
        hidden = jax.nn.leaky_relu(from_scores + from_static + _by_head(self.bias_in[0]), LEAKY_SLOPE)
        return static + _contract(self.weight_out, hidden)


def _contract(matrix, x):
    """matrix [M, N], x [B, N, R, C] -> [B, M, R, C], as one product of matrices for each batch row."""
    b, n, rows, columns = x.shape
    flat = jnp.matmul(matrix[None], x.reshape(b, n, rows * columns), precision="highest")
    return flat.reshape(b, -1, rows, columns)
