"""The gated ops' backward kernel on a TPU. Grid: (B Hv heads, groups of chunks), from the last group to the first. The
state's cotangent dS goes from step to step in VMEM.

A step recomputes the states of its group from the state that entered the group. Then it takes the chunks from the last
to the first. With dS the cotangent of the state that leaves a chunk,

    dV' = scale qkᵀ dO + writes dS,      dS ← total ⊙ dS + scale q_readsᵀ dO − Wᵀ dV'

With Y = Xᵀ dV' (delta rule), the other cotangents are

    dV = diag(β) Y,      dkk = −diag(β) Y V'ᵀ,      dk_reads = −dV Sᵀ,      dβ = Y·(V − k_reads S) − Σ_j kk ⊙ Y V'ᵀ
    dqk = scale dO V'ᵀ,      dq_reads = scale dO Sᵀ,      dwrites = V' dSᵀ,      dtotal = S ⊙ dS

Without the delta rule, dV = dV'. From the cotangents of the pairs, `jax.vjp` inside the kernel computes those of keys,
queries and decays. Source: derived for this project.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.tpu.gated.chunk import Chunk, Plan, advance, written_by, wy_form
from pallas_kernels.tpu.gated.differentiable import dot_exact
from pallas_kernels.tpu.gated.pairs import Pairs
from pallas_kernels.tpu.matrix_unit import NN, NT, TN, dot


def backward_kernel(_, refs, *, plan: Plan):
    """Computes the gradients of one group of chunks of one head. The refs:

    inputs: those of `forward_kernel` without initial; dout [1,R,V], states [1,1,V,K], dfinal [1,V,K];
    outputs: dq, dk [1,R,K], dv [1,R,V], dbeta [1,1,R], dg in g's shape, dinitial [1,V,K];
    scratch: dstate [V,K].
    """
    step = pl.program_id(1)

    @pl.when(step == 0)
    def _():
        refs["dstate"][...] = refs["dfinal"][0]

    group = [Chunk(refs, plan, i) for i in range(plan.chunks)]
    pairs, pulls = zip(*(jax.vjp(chunk.pairs_of, chunk.k, chunk.q, chunk.g) for chunk in group))
    wy_forms = wy_form(group, pairs, plan.operand) if plan.delta else [None] * plan.chunks
    states, all_written = _states_again(refs["states"][0, 0], group, pairs, wy_forms, plan)
    dstate = refs["dstate"][...]
    for i in reversed(range(plan.chunks)):
        chunk, p, wy, state, written = group[i], pairs[i], wy_forms[i], states[i], all_written[i]
        dout = refs["dout"][0, chunk.rows, :].astype(jnp.float32)
        dwritten = plan.scale * dot(p.qk, dout, plan.operand, TN) + dot(p.writes, dstate, plan.operand, NT)
        dv, dkk, dk_reads = _system_gradients(refs, plan, chunk, p, wy, state, written, dwritten)
        refs["dv"][0, chunk.rows, :] = dv.astype(refs["dv"].dtype)
        dpairs = Pairs(
            kk=dkk,
            qk=plan.scale * dot(dout, written, plan.operand, NT),
            k_reads=dk_reads,
            q_reads=plan.scale * dot(dout, state, plan.operand, NN),
            writes=dot(written, dstate, plan.operand),
            total=_total_gradient(p.total, state, dstate, plan.channels),
        )
        dk, dq, dg = pulls[i](dpairs)
        refs["dk"][0, chunk.rows, :] = dk.astype(refs["dk"].dtype)
        refs["dq"][0, chunk.rows, :] = dq.astype(refs["dq"].dtype)
        if plan.channels:
            refs["dg"][0, chunk.rows, :] = dg
        elif "dg" in refs:
            refs["dg"][0, :, chunk.rows] = dg
        dstate = _retreat(p, wy, dout, dwritten, dstate, plan)
    refs["dstate"][...] = dstate

    @pl.when(step == pl.num_programs(1) - 1)
    def _():
        refs["dinitial"][0] = dstate


def _states_again(state, group, pairs, wy_forms, plan):
    """(state that enters each chunk, V' of each chunk), recomputed from the state that enters the group."""
    states, all_written = [], []
    for i, (chunk, p, wy) in enumerate(zip(group, pairs, wy_forms)):
        written = written_by(chunk, wy, state, plan.operand)
        states.append(state)
        all_written.append(written)
        if i + 1 < plan.chunks:
            state = advance(p, written, state, plan.operand)
    return states, all_written


def _system_gradients(refs, plan, chunk, p, wy, state, written, dwritten):
    """(dV, dkk, dk_reads); the last two are None without the delta rule. Stores dβ in its ref."""
    if wy is None:
        return dwritten, None, None
    y = dot_exact(wy[0], dwritten, plan.operand, TN)
    dv = chunk.times_beta(y)
    dkk = -dot(y, written, plan.operand, NT)
    if "dbeta" in refs:
        rest = chunk.v - dot(p.k_reads, state, plan.operand, NT)
        dbeta = jnp.sum(y * rest, axis=1) + jnp.sum(dkk * p.kk, axis=1)
        refs["dbeta"][0, 0, chunk.rows] = dbeta
    return dv, chunk.times_beta(dkk), -dot(dv, state, plan.operand, NN)


def _total_gradient(total, state, dstate, channels):
    """dtotal, [1,K] with a decay per channel, else [1,1]; None if `total` is None."""
    if total is None:
        return None
    dtotal = jnp.sum(state * dstate, axis=0, keepdims=True)
    return dtotal if channels else jnp.sum(dtotal, axis=1, keepdims=True)


def _retreat(p, wy, dout, dwritten, dstate, plan):
    """The cotangent [V,K] of the state that enters the chunk, from that of the state that leaves it, `dstate`."""
    if p.total is not None:
        dstate = p.total * dstate
    dstate = dstate + plan.scale * dot(dout, p.q_reads, plan.operand, TN)
    if wy is not None:
        dstate = dstate - dot(dwritten, wy[1], plan.operand, TN)
    return dstate
