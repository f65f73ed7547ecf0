"""One chunk of the gated ops inside a kernel: its arrays, the delta rule's WY form, and the update of the state.

Source of the WY form: Yang et al., arXiv 2406.06484, 2412.06464.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.tpu.gated.differentiable import dot_exact
from pallas_kernels.tpu.gated.inverse import inverses
from pallas_kernels.tpu.gated.pairs import channel_pairs, head_pairs
from pallas_kernels.tpu.matrix_unit import NT, TN, dot


class Plan(NamedTuple):
    """The static arguments of the kernels.

    scale: of the read. delta: the gated delta rule or gated linear attention. channels: a decay per channel or not.
    chunk: rows of a chunk. chunks: chunks of a group. operand: the dtype of the operands of products, but for those
    that solve triangular systems (`dot_exact`).
    """

    scale: float
    delta: bool
    channels: bool
    chunk: int
    chunks: int
    operand: jnp.dtype


class Chunk:
    """Chunk i of the group in `refs`: its arrays in float32, and `pairs_of`, which computes its Pairs."""

    def __init__(self, refs, plan: Plan, i: int):
        self.rows = pl.ds(i * plan.chunk, plan.chunk)
        self.k, self.q, self.v = (refs[name][0, self.rows, :].astype(jnp.float32) for name in ("k", "q", "v"))
        self.beta = refs["beta"][0, 0, self.rows][:, None] if "beta" in refs else None
        self.g = None
        if "g" in refs:
            self.g = refs["g"][0, self.rows, :] if plan.channels else refs["g"][0, :, self.rows]
        local = refs["local"][0, :, self.rows] if "local" in refs else None
        form = channel_pairs if plan.channels else head_pairs
        self.pairs_of = lambda k, q, g: form(k, q, g, local, plan.operand, plan.delta)

    def times_beta(self, x):
        return x if self.beta is None else self.beta * x


def wy_form(group, pairs, operand):
    """(X, W, U) of each chunk: X = (I + diag(β) kk)⁻¹, W = X diag(β) k_reads, U = X diag(β) V."""
    found = inverses([chunk.times_beta(p.kk) for chunk, p in zip(group, pairs)], operand)
    w = [dot_exact(x, chunk.times_beta(p.k_reads), operand) for x, chunk, p in zip(found, group, pairs)]
    u = [dot_exact(x, chunk.times_beta(chunk.v), operand) for x, chunk in zip(found, group)]
    return list(zip(found, w, u))


def written_by(chunk, wy, state, operand):
    """V' [C,V]: U − W S with the delta rule; V if `wy` is None. state [V,K]."""
    if wy is None:
        return chunk.v
    _, w, u = wy
    return u - dot(w, state, operand, NT)


def advance(pairs, written, state, operand):
    """The state [V,K] that leaves the chunk."""
    kept = state if pairs.total is None else pairs.total * state
    return kept + dot(written, pairs.writes, operand, TN)
