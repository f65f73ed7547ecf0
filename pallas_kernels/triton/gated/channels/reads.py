"""The reads of the gated ops with a decay per channel. All chunks are independent. qk, q_reads and writes already
contain the decay (pairs.py).

The output of a chunk and the cotangent of V' through it are

    O = scale (q_reads S + qk V'),      dV' = scale qkᵀ dO

With dS the cotangent of the state that leaves the chunk, the other gradients are

    dqk = scale dO V'ᵀ,      dq_reads = scale dO Sᵀ,      dwrites = V' dSᵀ,      dtotal = Σ_v S ⊙ dS
"""

import triton
import triton.language as tl

from pallas_kernels.triton.gated.places import chunk_of, load_state, square
from pallas_kernels.triton.memory import head_base, load_columns, load_tile, store_columns, store_tile


@triton.jit
def gated_channel_read(
    qk,
    q_reads,
    written,
    states,
    T,
    scale,
    out,
    HEADS: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    PRECISION: tl.constexpr,
    C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    VALUES: tl.constexpr,
):
    """The output O of one chunk of one value head. Grid: B × HEADS × n programs.

    Reads qk [B,HEADS,n,C,C], q_reads [B,T,HEADS,K], written (V') [B,T,HEADS,V], states [B,HEADS,n,K,V]. Writes out
    [B,T,HEADS,V].
    """
    batch, head, start, block = chunk_of(tl.program_id(0), T, HEADS, C)
    written = head_base(written, batch, head, T, HEADS, V)
    out = head_base(out, batch, head, T, HEADS, V)
    queries = load_tile(head_base(q_reads, batch, head, T, HEADS, K), start, T, HEADS * K, K, C, BLOCK_K, False)
    pairs = tl.load(qk + square(block, C))
    for column in tl.range(0, V, VALUES):
        state = load_state(states, block, column, K, V, BLOCK_K, VALUES)
        read = tl.dot(queries, state, input_precision=PRECISION)
        values = load_columns(written, start, T, column, HEADS * V, V, C, VALUES)
        read = tl.dot(pairs, values, read, input_precision=PRECISION) * scale
        store_columns(out, start, T, column, read, HEADS * V, V, C, VALUES)


@triton.jit
def gated_channel_read_values(
    qk,
    dout,
    T,
    scale,
    dwritten,
    HEADS: tl.constexpr,
    V: tl.constexpr,
    PRECISION: tl.constexpr,
    C: tl.constexpr,
    VALUES: tl.constexpr,
):
    """dV' of one chunk through its own output. Grid and arrays as `gated_channel_read`; reads dout [B,T,HEADS,V],
    writes dwritten [B,T,HEADS,V]."""
    batch, head, start, block = chunk_of(tl.program_id(0), T, HEADS, C)
    dout = head_base(dout, batch, head, T, HEADS, V)
    dwritten = head_base(dwritten, batch, head, T, HEADS, V)
    pairs = tl.trans(tl.load(qk + square(block, C)))
    for column in tl.range(0, V, VALUES):
        grads = load_columns(dout, start, T, column, HEADS * V, V, C, VALUES)
        dvalues = tl.dot(pairs, grads, input_precision=PRECISION) * scale
        store_columns(dwritten, start, T, column, dvalues, HEADS * V, V, C, VALUES)


@triton.jit
def gated_channel_read_gradients(
    written,
    dout,
    states,
    dstates,
    T,
    scale,
    dqk,
    dq_reads,
    dwrites,
    dtotal,
    HEADS: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    PRECISION: tl.constexpr,
    C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    VALUES: tl.constexpr,
):
    """The gradients of one chunk's output and of its addition to the state. Grid: B × HEADS × n programs.

    Reads written, dout [B,T,HEADS,V], states, dstates [B,HEADS,n,K,V]. Writes dqk [B,HEADS,n,C,C], of which only the
    lower triangle with the diagonal, within segments, is valid; dq_reads, dwrites [B,T,HEADS,K]; dtotal [B,HEADS,n,K].
    """
    batch, head, start, block = chunk_of(tl.program_id(0), T, HEADS, C)
    written = head_base(written, batch, head, T, HEADS, V)
    dout = head_base(dout, batch, head, T, HEADS, V)
    dqueries = tl.zeros([C, BLOCK_K], tl.float32)
    dkeys = tl.zeros([C, BLOCK_K], tl.float32)
    dpairs = tl.zeros([C, C], tl.float32)
    kept = tl.zeros([BLOCK_K], tl.float32)
    for column in tl.range(0, V, VALUES, num_stages=1):
        state = load_state(states, block, column, K, V, BLOCK_K, VALUES)
        dstate = load_state(dstates, block, column, K, V, BLOCK_K, VALUES)
        values = load_columns(written, start, T, column, HEADS * V, V, C, VALUES)
        grads = load_columns(dout, start, T, column, HEADS * V, V, C, VALUES)
        dpairs = tl.dot(grads, tl.trans(values), dpairs, input_precision=PRECISION)
        dqueries = tl.dot(grads, tl.trans(state), dqueries, input_precision=PRECISION)
        dkeys = tl.dot(values, tl.trans(dstate), dkeys, input_precision=PRECISION)
        kept += tl.sum(state.to(tl.float32) * dstate.to(tl.float32), 1)
    tl.store(dqk + square(block, C), (dpairs * scale).to(dqk.dtype.element_ty))
    store_tile(head_base(dq_reads, batch, head, T, HEADS, K), start, T, dqueries * scale, HEADS * K, K, C, BLOCK_K)
    store_tile(head_base(dwrites, batch, head, T, HEADS, K), start, T, dkeys, HEADS * K, K, C, BLOCK_K)
    channel = tl.arange(0, BLOCK_K)
    tl.store(dtotal + block * K + channel, kept, mask=channel < K)
