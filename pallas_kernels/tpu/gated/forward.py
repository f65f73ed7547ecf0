"""The gated ops' forward kernel on a TPU. Grid: (B Hv heads, groups of chunks). A step computes one group of one head;
the state goes from step to step in VMEM.

With the pairs of pairs.py and, for the delta rule, X = (I + diag(β) kk)⁻¹, W = X diag(β) k_reads, U = X diag(β) V, a
chunk that the state S enters computes

    V' = U − W S  (delta rule)  or  V,      O = scale (q_reads S + qk V'),      S ← total ⊙ S + writesᵀ V'

Only V', O and S depend on the previous chunk. The pairs and the WY form are computed for all chunks of the group at
once. The state is stored as Sᵀ [V,K], so that total is a row vector. Source: Yang et al., Gated Delta Networks, arXiv
2412.06464.
"""

from __future__ import annotations

from jax.experimental import pallas as pl

from pallas_kernels.tpu.gated.chunk import Chunk, Plan, advance, written_by, wy_form
from pallas_kernels.tpu.matrix_unit import NT, dot


def forward_kernel(_, refs, *, plan: Plan):
    """Computes one group of chunks of one head. The refs:

    inputs: k, q [1,R,K], v [1,R,V], beta [1,1,R], g [1,1,R] or [1,R,K], local [1,1,R] (the number of resets in the
      chunk up to each token), initial [1,V,K]; beta, g and local may be absent;
    outputs: out [1,R,V], states [1,1,V,K] (the state that enters the group), final [1,V,K];
    scratch: state [V,K].
    """
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
