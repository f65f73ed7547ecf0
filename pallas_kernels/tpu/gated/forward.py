"""The gated ops forward, one group of chunks of one head at a time; the state goes from group to group in VMEM.

With the pairs of pairs.py and, for the delta rule, X = (I + diag(β) kk)⁻¹, W = X diag(β) k_reads,
U = X diag(β) V, a chunk that the state S enters does

    V' = U − W S  (delta rule)  or  V,      O = scale (q_reads S + qk V'),      S ← total ⊙ S + writesᵀ V'

Only V' and S wait for the chunk before; all else of a group is made at once. The state is kept as Sᵀ [V,K], so that
total is a row. Source: Yang et al., Gated Delta Networks, arXiv 2412.06464.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.tpu.gated.inverse import inverses
from pallas_kernels.tpu.gated.pairs import channel_pairs, head_pairs
from pallas_kernels.tpu.gated.differentiable import dot_exact
from pallas_kernels.tpu.matrix_unit import NT, TN, dot


class Plan(NamedTuple):
    """What is known while tracing: the read's scale, the delta rule or not, a decay for each channel or not, rows of a
    chunk, chunks of a group, what products round their operands to. Systems are solved in float32."""

    scale: float
    delta: bool
    channels: bool
    chunk: int
    chunks: int
    operand: jnp.dtype


class Chunk:
    """Chunk i of the group in `refs`: its arrays in float32, and what needs no state."""

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


def solve(group, pairs, operand):
    """(X, W, U) of the delta rule, of each chunk."""
    found = inverses([chunk.times_beta(p.kk) for chunk, p in zip(group, pairs)], operand)
    w = [dot_exact(x, chunk.times_beta(p.k_reads), operand) for x, chunk, p in zip(found, group, pairs)]
    u = [dot_exact(x, chunk.times_beta(chunk.v), operand) for x, chunk in zip(found, group)]
    return list(zip(found, w, u))


def advance(pairs, written, state, operand):
    """The state [V,K] that leaves the chunk."""
    kept = state if pairs.total is None else pairs.total * state
    return kept + dot(written, pairs.writes, operand, TN)


def forward_kernel(_, refs, *, plan: Plan):
    """refs: k, q [1,R,K], v [1,R,V], beta [1,1,R], g [1,1,R] or [1,R,K], local [1,1,R] (segments begun in the chunk),
    initial [1,V,K]; out: out [1,R,V], states [1,1,V,K] (what enters the group), final [1,V,K]; scratch: state [V,K]."""
    step = pl.program_id(1)

    @pl.when(step == 0)
    def _():
        refs["state"][...] = refs["initial"][0]

    state = refs["state"][...]
    refs["states"][0, 0] = state
    group = [Chunk(refs, plan, i) for i in range(plan.chunks)]
    pairs = [chunk.pairs_of(chunk.k, chunk.q, chunk.g) for chunk in group]
    solved = solve(group, pairs, plan.operand) if plan.delta else None
    for i, (chunk, p) in enumerate(zip(group, pairs)):
        written = chunk.v
        if plan.delta:
            _, w, u = solved[i]
            written = u - dot(w, state, plan.operand, NT)
        out = dot(p.q_reads, state, plan.operand, NT) + dot(p.qk, written, plan.operand)
        refs["out"][0, chunk.rows, :] = (out * plan.scale).astype(refs["out"].dtype)
        state = advance(p, written, state, plan.operand)
    refs["state"][...] = state

    @pl.when(step == pl.num_programs(1) - 1)
    def _():
        refs["final"][0] = state
