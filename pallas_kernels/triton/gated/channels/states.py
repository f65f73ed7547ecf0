"""As ../states.py, with a decay of each channel: q_reads, writes and W hold it already (pairs.py), and
each row of the state has its own total.

    forward      V' = U − W S  (delta rule)  or  V,      S ← total ⊙ S + writesᵀ V'
    backward     dV' = dV'(own chunk's outputs) + writes dS,      dS ← total ⊙ dS + scale q_readsᵀ dO − Wᵀ dV'
"""

import triton
import triton.language as tl

from pallas_kernels.triton.gated.places import columns_of
from pallas_kernels.triton.memory import head_base, load_columns, load_row, load_tile, store_columns


@triton.jit
def gated_channel_advance(
    writes, v, w, total, initial, T, states, written, final,
    HEADS: tl.constexpr, K: tl.constexpr, V: tl.constexpr, DELTA: tl.constexpr, PRECISION: tl.constexpr,
    C: tl.constexpr, BLOCK_K: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """writes, w [B,T,HEADS,K], v [B,T,HEADS,V] (DELTA: U), total [B,HEADS,n,K], initial [B,HEADS,K,V] ->
    states [B,HEADS,n,K,V], which enter the chunks; DELTA: written [B,T,HEADS,V]; final."""
    chunks = tl.cdiv(T, C)
    n, column = columns_of(tl.program_id(0), V, VALUES)
    batch, head = n // HEADS, n % HEADS
    writes = head_base(writes, batch, head, T, HEADS, K)
    v = head_base(v, batch, head, T, HEADS, V)
    w = head_base(w, batch, head, T, HEADS, K)
    written = head_base(written, batch, head, T, HEADS, V)
    first = tl.cast(n, tl.int64) * chunks
    state = load_columns(initial + tl.cast(n, tl.int64) * K * V, 0, K, column, V, V, BLOCK_K, VALUES).to(tl.float32)
    for chunk in tl.range(0, chunks):
        start = chunk * C
        store_columns(states + (first + chunk) * K * V, 0, K, column, state, V, V, BLOCK_K, VALUES)
        keys = load_tile(writes, start, T, HEADS * K, K, C, BLOCK_K, False)
        values = load_columns(v, start, T, column, HEADS * V, V, C, VALUES)
        if DELTA:
            reads = load_tile(w, start, T, HEADS * K, K, C, BLOCK_K, False)
            new = values.to(tl.float32) - tl.dot(reads, state.to(keys.dtype), input_precision=PRECISION)
            store_columns(written, start, T, column, new, HEADS * V, V, C, VALUES)
            values = new.to(keys.dtype)
        state *= load_row(total + (first + chunk) * K, 0, K, BLOCK_K)[:, None]
        state = tl.dot(tl.trans(keys), values, state, input_precision=PRECISION)
    store_columns(final + tl.cast(n, tl.int64) * K * V, 0, K, column, state, V, V, BLOCK_K, VALUES)


@triton.jit
def gated_channel_retreat(
    q_reads, writes, w, dout, dwritten_here, total, dfinal, T, scale, dstates, dwritten, dinitial,
    HEADS: tl.constexpr, K: tl.constexpr, V: tl.constexpr, DELTA: tl.constexpr, PRECISION: tl.constexpr,
    C: tl.constexpr, BLOCK_K: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """As `gated_channel_advance`, with q_reads [B,T,HEADS,K], dout, dwritten_here [B,T,HEADS,V] ->
    dstates [B,HEADS,n,K,V], of the states that leave the chunks; dwritten [B,T,HEADS,V]; dinitial [B,HEADS,K,V]."""
    chunks = tl.cdiv(T, C)
    n, column = columns_of(tl.program_id(0), V, VALUES)
    batch, head = n // HEADS, n % HEADS
    q_reads = head_base(q_reads, batch, head, T, HEADS, K)
    writes = head_base(writes, batch, head, T, HEADS, K)
    w = head_base(w, batch, head, T, HEADS, K)
    dout = head_base(dout, batch, head, T, HEADS, V)
    dwritten_here = head_base(dwritten_here, batch, head, T, HEADS, V)
    dwritten = head_base(dwritten, batch, head, T, HEADS, V)
    first = tl.cast(n, tl.int64) * chunks
    dstate = load_columns(dfinal + tl.cast(n, tl.int64) * K * V, 0, K, column, V, V, BLOCK_K, VALUES).to(tl.float32)
    for step in tl.range(0, chunks):
        chunk = chunks - 1 - step
        start = chunk * C
        store_columns(dstates + (first + chunk) * K * V, 0, K, column, dstate, V, V, BLOCK_K, VALUES)
        keys = load_tile(writes, start, T, HEADS * K, K, C, BLOCK_K, False)
        back = tl.dot(keys, dstate.to(keys.dtype), input_precision=PRECISION)
        back += load_columns(dwritten_here, start, T, column, HEADS * V, V, C, VALUES).to(tl.float32)
        store_columns(dwritten, start, T, column, back, HEADS * V, V, C, VALUES)
        dstate *= load_row(total + (first + chunk) * K, 0, K, BLOCK_K)[:, None]
        grads = load_columns(dout, start, T, column, HEADS * V, V, C, VALUES).to(tl.float32) * scale
        queries = load_tile(q_reads, start, T, HEADS * K, K, C, BLOCK_K, False)
        dstate = tl.dot(tl.trans(queries), grads.to(keys.dtype), dstate, input_precision=PRECISION)
        if DELTA:
            reads = load_tile(w, start, T, HEADS * K, K, C, BLOCK_K, False)
            dstate -= tl.dot(tl.trans(reads), back.to(keys.dtype), input_precision=PRECISION)
    store_columns(dinitial + tl.cast(n, tl.int64) * K * V, 0, K, column, dstate, V, V, BLOCK_K, VALUES)
