"""All gradients of a chunk, from the state S that enters it, the cotangent dS of the state that leaves it, V' and
Y = Xᵀ dV'. All chunks are independent.

The equations are those of heads/reads.py and heads/systems.py; without the delta rule Y is dV'. As D_ij = G_i − G_j for
the sums of gates G, dG_i = Σ_j dD_ij − Σ_j dD_ji, and the gradient of a gate is the sum of dG from it on.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from pallas_kernels.triton.gated.places import chunk_of
from pallas_kernels.triton.gated.walk.chunk import (
    decays_of,
    gates_of,
    load_keys,
    load_part,
    load_values,
    store_values,
    tokens_of,
)
from pallas_kernels.triton.memory import head_of, store_rows


class Values(NamedTuple):
    """Pointers to the head's columns of arrays [B,T,heads,V]."""

    v: tl.tensor
    dout: tl.tensor
    written: tl.tensor
    y: tl.tensor
    dv: tl.tensor


class Sums(NamedTuple):
    """dKᵀ [BLOCK_K, C], and the gradients of beta, the sums of gates, enter and leave [C], as far as they are known."""

    dkeys: tl.tensor
    dbetas: tl.tensor
    dsums: tl.tensor
    dentering: tl.tensor
    dleaving: tl.tensor


@triton.jit
def rows_less_columns(dbetween):
    return tl.sum(dbetween, 1) - tl.sum(dbetween, 0)


@triton.jit
def through_reads(
    values,
    states,
    dstates,
    dtotal,
    gates,
    start,
    block,
    T,
    scale,
    queries,
    keys,
    tokens,
    FORM: tl.constexpr,
    C: tl.constexpr,
    VALUES: tl.constexpr,
):
    """(dP in the keys' dtype, the Sums of the chunk's reads and of what it adds to the state). Stores dtotal."""
    KEYS: tl.constexpr = FORM.keys
    BLOCK_K: tl.constexpr = KEYS.block
    V: tl.constexpr = FORM.value_width
    dkeys = tl.zeros([BLOCK_K, C], tl.float32)
    dpairs = tl.zeros([C, C], tl.float32)
    numbers = tl.zeros([C], tl.float32)
    dsums = numbers
    kept = tl.full([], 0.0, tl.float32)
    for column in tl.static_range(0, V, VALUES):
        dstate = load_part(dstates, block, column, FORM, VALUES)
        if FORM.has_gates:
            state = load_part(states, block, column, FORM, VALUES)
            kept += tl.sum(state.to(tl.float32) * dstate.to(tl.float32))
        written = load_values(values.written, start, T, column, FORM, C, VALUES)
        dkeys = tl.dot(tl.trans(dstate), written, dkeys, input_precision=FORM.precision)
        grads = load_values(values.dout, start, T, column, FORM, C, VALUES)
        dpairs = tl.dot(tl.trans(grads), written, dpairs, input_precision=FORM.precision)
    dleaving = numbers
    if FORM.has_gates:
        tl.store(dtotal + block, kept)
        dleaving += tl.sum(dkeys * tl.trans(keys).to(tl.float32), 0)
        dkeys *= tokens.leaving[None, :]
    dpairs *= decays_of(gates, start, FORM, C) * scale
    narrow = dpairs.to(keys.dtype)
    dkeys = tl.dot(tl.trans(queries), narrow, dkeys, input_precision=FORM.precision)
    if FORM.has_decay:
        dsums += rows_less_columns(dpairs * tl.dot(queries, tl.trans(keys), input_precision=FORM.precision))
    return narrow, Sums(dkeys, numbers, dsums, numbers, dleaving)


@triton.jit
def through_system(
    values,
    states,
    gates,
    start,
    block,
    T,
    keys,
    tokens,
    totals,
    FORM: tl.constexpr,
    C: tl.constexpr,
    VALUES: tl.constexpr,
):
    """The Sums with those of the triangular system added. Stores dV = diag(β) Y."""
    dkeys, dbetas, dsums, dentering, dleaving = totals
    V: tl.constexpr = FORM.value_width
    dsystem = tl.zeros([C, C], tl.float32)
    for column in tl.static_range(0, V, VALUES):
        state = load_part(states, block, column, FORM, VALUES)
        solved = load_values(values.y, start, T, column, FORM, C, VALUES)
        written = load_values(values.written, start, T, column, FORM, C, VALUES)
        dsystem -= tl.dot(tl.trans(solved), written, input_precision=FORM.precision)
        part = tl.dot(tl.trans(state), solved, input_precision=FORM.precision)
        # Y·(K S), as a sum over K instead of V.
        back = tl.sum(part * tl.trans(keys).to(tl.float32), 0)
        dkeys -= part * (tokens.beta * tokens.entering)[None, :]
        dentering -= tokens.beta * back
        solved = solved.to(tl.float32)
        v = load_values(values.v, start, T, column, FORM, C, VALUES).to(tl.float32)
        dbetas += tl.sum(solved * v, 0) - tokens.entering * back
        store_values(values.dv, start, T, column, solved * tokens.beta[None, :], FORM, C, VALUES)
    index = tl.arange(0, C)
    dsystem = tl.where(index[:, None] > index[None, :], dsystem * decays_of(gates, start, FORM, C), 0.0)
    narrow = (dsystem * tokens.beta[:, None]).to(keys.dtype)
    # Strictly lower triangular: this sum is the matrix and its transpose side by side, without rounding.
    dkeys = tl.dot(tl.trans(keys), narrow + tl.trans(narrow), dkeys, input_precision=FORM.precision)
    dsystem *= tl.dot(keys, tl.trans(keys), input_precision=FORM.precision)
    dbetas += tl.sum(dsystem, 1)
    if FORM.has_decay:
        dsums += rows_less_columns(dsystem * tokens.beta[:, None])
    return Sums(dkeys, dbetas, dsums, dentering, dleaving)


@triton.jit
def gated_walk_gradients(
    q,
    k,
    v,
    dout,
    written,
    y,
    states,
    dstates,
    sums,
    segments,
    beta,
    enter,
    leave,
    T,
    scale,
    dq,
    dk,
    dv,
    dtokens,
    dtotal,
    FORM: tl.constexpr,
    C: tl.constexpr,
    VALUES: tl.constexpr,
):
    """The gradients of one chunk of one value head. Grid: B × heads × n programs.

    Reads q, k [B,T,key_heads,K], dout, written (V'), y and, if delta, v [B,T,heads,V], states, dstates
    [B,heads,n,V,K], sums (of gates) [B,heads,n,2,C], beta, enter, leave [B,heads,n C], segments [B,n C]. Writes dq, dk
    [B,T,heads,K]; dtokens [B,heads,n,4,C], the gradients of beta, of the gates through D, of enter and of leave; dtotal
    [B,heads,n]; if delta, dv [B,T,heads,V].
    """
    KEYS: tl.constexpr = FORM.keys
    LAYOUT: tl.constexpr = FORM.values
    WIDE: tl.constexpr = FORM.key_gradients
    V: tl.constexpr = FORM.value_width
    BLOCK_K: tl.constexpr = KEYS.block
    batch, head, start, block = chunk_of(tl.program_id(0), T, FORM.heads, C)
    n = batch * FORM.heads + head
    # The kernel reads neither totals nor inverses.
    gates = gates_of(n, sums, segments, beta, enter, leave, dtotal, dtotal, T, FORM, C)
    tokens = tokens_of(gates, start, FORM, C)
    values = Values(
        head_of(v, n, T, FORM.heads, LAYOUT),
        head_of(dout, n, T, FORM.heads, LAYOUT),
        head_of(written, n, T, FORM.heads, LAYOUT),
        head_of(y, n, T, FORM.heads, LAYOUT),
        head_of(dv, n, T, FORM.heads, LAYOUT),
    )
    keys = load_keys(head_of(k, n, T, FORM.heads, KEYS), start, T, FORM, C)
    queries = load_keys(head_of(q, n, T, FORM.heads, KEYS), start, T, FORM, C)
    # One gradient after the other, each from arrays that it loads by itself: all at a time need too many registers.
    dpairs, totals = through_reads(
        values, states, dstates, dtotal, gates, start, block, T, scale, queries, keys, tokens, FORM, C, VALUES
    )
    if FORM.delta:
        totals = through_system(values, states, gates, start, block, T, keys, tokens, totals, FORM, C, VALUES)
    dkeys, dbetas, dsums, dentering, dleaving = totals
    store_rows(head_of(dk, n, T, FORM.heads, WIDE), start, T, tl.trans(dkeys), WIDE, C)
    dqueries = tl.zeros([BLOCK_K, C], tl.float32)
    for column in tl.static_range(0, V, VALUES):
        state = load_part(states, block, column, FORM, VALUES)
        grads = load_values(values.dout, start, T, column, FORM, C, VALUES)
        dqueries = tl.dot(tl.trans(state), grads, dqueries, input_precision=FORM.precision)
    dtokens += block * 4 * C + tl.arange(0, C)
    if FORM.has_gates:
        dentering += tl.sum(dqueries * tl.trans(queries).to(tl.float32), 0) * scale
        tl.store(dtokens + C, tl.cumsum(dsums, 0, reverse=True))
        tl.store(dtokens + 2 * C, dentering)
        tl.store(dtokens + 3 * C, dleaving)
    if FORM.delta:
        tl.store(dtokens, dbetas)
    dqueries *= (tokens.entering * scale)[None, :]
    dqueries = tl.dot(tl.trans(keys), tl.trans(dpairs), dqueries, input_precision=FORM.precision)
    store_rows(head_of(dq, n, T, FORM.heads, WIDE), start, T, tl.trans(dqueries), WIDE, C)
