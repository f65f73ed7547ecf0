"""Passes the state through the chunks, forward, and its cotangent, backward. The chunks are sequential.

    forward      V' = U − W S  (delta rule)  or  V,      S ← total S + (leave ⊙ K)ᵀ V'
    backward     dV' = dV'(own chunk's outputs) + leave ⊙ (K dS),
                 dS ← total dS + scale (enter ⊙ Q)ᵀ dO − Wᵀ dV'

One program computes VALUES columns of the state of one head, for all chunks. Grid of both kernels:
B × HEADS × ⌈V / VALUES⌉ programs. The part of the state stays on chip in float32; it is rounded to the inputs' dtype
for products and where it is stored for other kernels.

enter, leave and total are the decays from the chunk's start to each token, from each token to the chunk's end, and over
the whole chunk. DECAY says which form they have:
"none": there are none. "head": numbers per head. "channel": the arrays for Q and K already contain enter ⊙ Q and
leave ⊙ K, with one head per value head (channels/pairs.py), and total has K numbers per chunk."""

import triton
import triton.language as tl

from pallas_kernels.triton.gated.places import columns_of, key_base, load_state, row_or_one, store_state
from pallas_kernels.triton.memory import head_base, load_columns, load_row, load_tile, store_columns


@triton.jit
def gated_advance(
    k,
    v,
    w,
    leave,
    total,
    initial,
    T,
    states,
    written,
    final,
    HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    DECAY: tl.constexpr,
    DELTA: tl.constexpr,
    PRECISION: tl.constexpr,
    C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    VALUES: tl.constexpr,
):
    """The forward kernel.

    Reads k [B,T,K_HEADS,K], v [B,T,HEADS,V] (U if DELTA), w [B,T,HEADS,K], leave [B,HEADS,n C], total [B,HEADS,n] or
    [B,HEADS,n,K], initial [B,HEADS,K,V]. Writes states [B,HEADS,n,K,V], which enter the chunks; if DELTA, written (V')
    [B,T,HEADS,V]; final [B,HEADS,K,V].
    """
    chunks = tl.cdiv(T, C)
    n, column = columns_of(tl.program_id(0), V, VALUES)
    batch, head = n // HEADS, n % HEADS
    k = key_base(k, batch, head, T, HEADS, K_HEADS, K)
    v = head_base(v, batch, head, T, HEADS, V)
    w = head_base(w, batch, head, T, HEADS, K)
    written = head_base(written, batch, head, T, HEADS, V)
    first = tl.cast(n, tl.int64) * chunks
    state = load_state(initial, tl.cast(n, tl.int64), column, K, V, BLOCK_K, VALUES).to(tl.float32)
    for chunk in tl.range(0, chunks):
        start = chunk * C
        store_state(states, first + chunk, column, state, K, V, BLOCK_K, VALUES)
        keys = load_tile(k, start, T, K_HEADS * K, K, C, BLOCK_K, False)
        values = load_columns(v, start, T, column, HEADS * V, V, C, VALUES).to(tl.float32)
        if DELTA:
            reads = load_tile(w, start, T, HEADS * K, K, C, BLOCK_K, False)
            values -= tl.dot(reads, state.to(keys.dtype), input_precision=PRECISION)
            store_columns(written, start, T, column, values, HEADS * V, V, C, VALUES)
        if DECAY == "head":
            values *= row_or_one(leave + (first + chunk) * C, C, True)[:, None]
            state *= tl.load(total + first + chunk)
        elif DECAY == "channel":
            state *= load_row(total + (first + chunk) * K, 0, K, BLOCK_K)[:, None]
        state = tl.dot(tl.trans(keys), values.to(keys.dtype), state, input_precision=PRECISION)
    store_state(final, tl.cast(n, tl.int64), column, state, K, V, BLOCK_K, VALUES)


@triton.jit
def added(
    values,
    x,
    total,
    start,
    T,
    column,
    HEADS: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    VALUES: tl.constexpr,
):
    """values + x, also stored to `total`. x and total point to a head of arrays [B,T,HEADS,V]."""
    values += load_columns(x, start, T, column, HEADS * V, V, C, VALUES).to(tl.float32)
    store_columns(total, start, T, column, values, HEADS * V, V, C, VALUES)
    return values


@triton.jit
def gated_retreat(
    q,
    k,
    w,
    dout,
    dwritten_here,
    enter,
    leave,
    total,
    dfinal,
    T,
    scale,
    dstates,
    dwritten,
    dinitial,
    HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    DECAY: tl.constexpr,
    DELTA: tl.constexpr,
    PRECISION: tl.constexpr,
    C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    VALUES: tl.constexpr,
):
    """The backward kernel, from the last chunk to the first.

    Reads arrays as `gated_advance`, and q [B,T,K_HEADS,K], dout and dwritten_here [B,T,HEADS,V] (the part of dV' from
    the own chunk's outputs), enter [B,HEADS,n C], dfinal [B,HEADS,K,V]. Writes dstates [B,HEADS,n,K,V], the cotangents
    of the states that leave the chunks; dwritten [B,T,HEADS,V]; dinitial [B,HEADS,K,V].
    """
    chunks = tl.cdiv(T, C)
    n, column = columns_of(tl.program_id(0), V, VALUES)
    batch, head = n // HEADS, n % HEADS
    q = key_base(q, batch, head, T, HEADS, K_HEADS, K)
    k = key_base(k, batch, head, T, HEADS, K_HEADS, K)
    w = head_base(w, batch, head, T, HEADS, K)
    dout = head_base(dout, batch, head, T, HEADS, V)
    dwritten_here = head_base(dwritten_here, batch, head, T, HEADS, V)
    dwritten = head_base(dwritten, batch, head, T, HEADS, V)
    first = tl.cast(n, tl.int64) * chunks
    dstate = load_state(dfinal, tl.cast(n, tl.int64), column, K, V, BLOCK_K, VALUES).to(tl.float32)
    for step in tl.range(0, chunks):
        chunk = chunks - 1 - step
        start = chunk * C
        store_state(dstates, first + chunk, column, dstate, K, V, BLOCK_K, VALUES)
        keys = load_tile(k, start, T, K_HEADS * K, K, C, BLOCK_K, False)
        back = tl.dot(keys, dstate.to(keys.dtype), input_precision=PRECISION)
        # The order of loads depends on DECAY, because the other order needs more registers.
        if DECAY == "channel":
            back = added(back, dwritten_here, dwritten, start, T, column, HEADS, V, C, VALUES)
        grads = load_columns(dout, start, T, column, HEADS * V, V, C, VALUES).to(tl.float32) * scale
        if DECAY == "head":
            back *= row_or_one(leave + (first + chunk) * C, C, True)[:, None]
            grads *= row_or_one(enter + (first + chunk) * C, C, True)[:, None]
            dstate *= tl.load(total + first + chunk)
        elif DECAY == "channel":
            dstate *= load_row(total + (first + chunk) * K, 0, K, BLOCK_K)[:, None]
        if DECAY != "channel":
            back = added(back, dwritten_here, dwritten, start, T, column, HEADS, V, C, VALUES)
        queries = load_tile(q, start, T, K_HEADS * K, K, C, BLOCK_K, False)
        dstate = tl.dot(tl.trans(queries), grads.to(keys.dtype), dstate, input_precision=PRECISION)
        if DELTA:
            reads = load_tile(w, start, T, HEADS * K, K, C, BLOCK_K, False)
            dstate -= tl.dot(tl.trans(reads), back.to(keys.dtype), input_precision=PRECISION)
    store_state(dinitial, tl.cast(n, tl.int64), column, dstate, K, V, BLOCK_K, VALUES)
