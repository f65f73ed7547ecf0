"""The gated ops backward: from the last group of chunks to the first, with the state's cotangent dS in VMEM.

A group's states are made again from the one that entered it. Then, chunk by chunk from the last, dS the cotangent of
the state that leaves,

    dV' = scale qkᵀ dO + writes dS,      dS ← total ⊙ dS + scale q_readsᵀ dO − Wᵀ dV'

and with those, for all chunks of the group at once, Y = Xᵀ dV' (delta rule),

    dV = diag(β) Y,      dkk = −diag(β) Y V'ᵀ,      dk_reads = −dV Sᵀ,      dβ = Y·(V − k_reads S) − Σ_j kk ⊙ Y V'ᵀ
    dqk = scale dO V'ᵀ,      dq_reads = scale dO Sᵀ,      dwrites = V' dSᵀ,      dtotal = S ⊙ dS

(dV = dV' without the delta rule), and what those cotangents of the pairs are of keys, queries and decays, by `jax.vjp`
inside the kernel. Source: derived for this project.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.tpu.gated.forward import Chunk, Plan, advance, solve
from pallas_kernels.tpu.gated.pairs import Pairs
from pallas_kernels.tpu.gated.differentiable import dot_exact
from pallas_kernels.tpu.matrix_unit import NN, NT, TN, dot


def backward_kernel(_, refs, *, plan: Plan):
    """refs: as of `forward_kernel` without initial, with dout [1,R,V], states [1,1,V,K], dfinal [1,V,K]; out: dq, dk
    [1,R,K], dv [1,R,V], dbeta [1,1,R], dg as g, dinitial [1,V,K]; scratch: dstate [V,K]."""
    step = pl.program_id(1)
    operand = plan.operand

    @pl.when(step == 0)
    def _():
        refs["dstate"][...] = refs["dfinal"][0]

    group = [Chunk(refs, plan, i) for i in range(plan.chunks)]
    pairs, pulls = zip(*(jax.vjp(chunk.pairs_of, chunk.k, chunk.q, chunk.g) for chunk in group))
    solved = solve(group, pairs, operand) if plan.delta else None

    state, states, all_written = refs["states"][0, 0], [], []
    for i, (chunk, p) in enumerate(zip(group, pairs)):
        written = solved[i][2] - dot(solved[i][1], state, operand, NT) if plan.delta else chunk.v
        states.append(state)
        all_written.append(written)
        if i + 1 < plan.chunks:
            state = advance(p, written, state, operand)

    dstate = refs["dstate"][...]
    for i in reversed(range(plan.chunks)):
        chunk, p, state, written = group[i], pairs[i], states[i], all_written[i]
        dout = refs["dout"][0, chunk.rows, :].astype(jnp.float32)
        dwritten = plan.scale * dot(p.qk, dout, operand, TN) + dot(p.writes, dstate, operand, NT)
        dwrites = dot(written, dstate, operand)
        dtotal = None
        if p.total is not None:
            dtotal = jnp.sum(state * dstate, axis=0, keepdims=True)
            if not plan.channels:
                dtotal = jnp.sum(dtotal, axis=1, keepdims=True)
            dstate = p.total * dstate
        dstate = dstate + plan.scale * dot(dout, p.q_reads, operand, TN)
        dv, dkk, dk_reads = dwritten, None, None
        if plan.delta:
            inverse, w, _ = solved[i]
            dstate = dstate - dot(dwritten, w, operand, TN)
            y = dot_exact(inverse, dwritten, operand, TN)
            dv = chunk.times_beta(y)
            dkk = -dot(y, written, operand, NT)
            if "dbeta" in refs:
                rest = chunk.v - dot(p.k_reads, state, operand, NT)
                dbeta = jnp.sum(y * rest, axis=1) + jnp.sum(dkk * p.kk, axis=1)
                refs["dbeta"][0, 0, chunk.rows] = dbeta
            dkk, dk_reads = chunk.times_beta(dkk), -dot(dv, state, operand, NN)
        refs["dv"][0, chunk.rows, :] = dv.astype(refs["dv"].dtype)
        dqk = plan.scale * dot(dout, written, operand, NT)
        dq_reads = plan.scale * dot(dout, state, operand, NN)
        dk, dq, dg = pulls[i](Pairs(dkk, dqk, dk_reads, dq_reads, dwrites, dtotal))
        refs["dk"][0, chunk.rows, :] = dk.astype(refs["dk"].dtype)
        refs["dq"][0, chunk.rows, :] = dq.astype(refs["dq"].dtype)
        if plan.channels:
            refs["dg"][0, chunk.rows, :] = dg
        elif "dg" in refs:
            refs["dg"][0, :, chunk.rows] = dg
    refs["dstate"][...] = dstate

    @pl.when(step == pl.num_programs(1) - 1)
    def _():
        refs["dinitial"][0] = dstate
