"""The gated ops forward, one group of chunks of one head at a time; the state goes from group to group in VMEM.

With the pairs of pairs.py and, for the delta rule, X = (I + diag(β) kk)⁻¹, W = X diag(β) k_reads,
U = X diag(β) V, a chunk that the state S enters does

    V' = U − W S  (delta rule)  or  V,      O = scale (q_reads S + qk V'),      S ← total ⊙ S + writesᵀ V'

Only V' and S wait for the chunk before; all else of a group is made at once. The state is kept as Sᵀ [V,K], so that
total is a row. Source: Yang et al., Gated Delta Networks, arXiv 2412.06464.
"""

from __future__ import annotations

from jax.experimental import pallas as pl

from pallas_kernels.tpu.gated.chunk import Chunk, Plan, advance, written_by, wy_form
from pallas_kernels.tpu.matrix_unit import NT, dot


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
    wy_forms = wy_form(group, pairs, plan.operand) if plan.delta else [None] * plan.chunks
    for chunk, p, wy in zip(group, pairs, wy_forms):
        written = written_by(chunk, wy, state, plan.operand)
        out = dot(p.q_reads, state, plan.operand, NT) + dot(p.qk, written, plan.operand)
        refs["out"][0, chunk.rows, :] = (out * plan.scale).astype(refs["out"].dtype)
        state = advance(p, written, state, plan.operand)
    refs["state"][...] = state

    @pl.when(step == pl.num_programs(1) - 1)
    def _():
        refs["final"][0] = state
