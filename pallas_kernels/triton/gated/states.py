"""The state's way through the chunks, one after another; heads and columns of V go side by side.

    forward      V' = U − W S  (delta rule)  or  V,      S ← total S + (leave ⊙ K)ᵀ V'
    backward     dV' = dV'(own chunk's outputs) + leave ⊙ (K dS),
                 dS ← total dS + scale (enter ⊙ Q)ᵀ dO − Wᵀ dV'

enter, leave, total: what is left of the entering state at each token, of each token's write at the chunk's end, and of
the state there. The state is float32 here, and rounded to the inputs' type for products and for whoever reads it."""

import triton
import triton.language as tl

from pallas_kernels.triton.gated.decay import row_or_one
from pallas_kernels.triton.gated.places import columns_of
from pallas_kernels.triton.memory import head_base, load_columns, load_tile, store_columns


@triton.jit
def gated_advance(
    k, v, w, leave, total, initial, T, states, written, final,
    HEADS: tl.constexpr, K_HEADS: tl.constexpr, K: tl.constexpr, V: tl.constexpr, HAS_GATES: tl.constexpr,
    DELTA: tl.constexpr, PRECISION: tl.constexpr, C: tl.constexpr, BLOCK_K: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """k [B,T,K_HEADS,K], v [B,T,HEADS,V] (DELTA: U), w [B,T,HEADS,K], leave [B,HEADS,n C], total [B,HEADS,n],
    initial [B,HEADS,K,V] -> states [B,HEADS,n,K,V], which enter the chunks; DELTA: written [B,T,HEADS,V]; final."""
    chunks = tl.cdiv(T, C)
    n, column = columns_of(tl.program_id(0), V, VALUES)
    batch, head = n // HEADS, n % HEADS
    k = head_base(k, batch, head // (HEADS // K_HEADS), T, K_HEADS, K)
    v = head_base(v, batch, head, T, HEADS, V)
    w = head_base(w, batch, head, T, HEADS, K)
    written = head_base(written, batch, head, T, HEADS, V)
    first = tl.cast(n, tl.int64) * chunks
    state = load_columns(initial + tl.cast(n, tl.int64) * K * V, 0, K, column, V, V, BLOCK_K, VALUES).to(tl.float32)
    for chunk in tl.range(0, chunks):
        start = chunk * C
        store_columns(states + (first + chunk) * K * V, 0, K, column, state, V, V, BLOCK_K, VALUES)
        keys = load_tile(k, start, T, K_HEADS * K, K, C, BLOCK_K, False)
        values = load_columns(v, start, T, column, HEADS * V, V, C, VALUES).to(tl.float32)
        if DELTA:
            reads = load_tile(w, start, T, HEADS * K, K, C, BLOCK_K, False)
            values -= tl.dot(reads, state.to(keys.dtype), input_precision=PRECISION)
            store_columns(written, start, T, column, values, HEADS * V, V, C, VALUES)
        if HAS_GATES:
            values *= row_or_one(leave + (first + chunk) * C, C, True)[:, None]
            state *= tl.load(total + first + chunk)
        state = tl.dot(tl.trans(keys), values.to(keys.dtype), state, input_precision=PRECISION)
    store_columns(final + tl.cast(n, tl.int64) * K * V, 0, K, column, state, V, V, BLOCK_K, VALUES)


@triton.jit
def gated_retreat(
    q, k, w, dout, dwritten_here, enter, leave, total, dfinal, T, scale, dstates, dwritten, dinitial,
    HEADS: tl.constexpr, K_HEADS: tl.constexpr, K: tl.constexpr, V: tl.constexpr, HAS_GATES: tl.constexpr,
    DELTA: tl.constexpr, PRECISION: tl.constexpr, C: tl.constexpr, BLOCK_K: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """As `gated_advance`, with q, dout [B,T,HEADS,V], dwritten_here [B,T,HEADS,V] ->
    dstates [B,HEADS,n,K,V], of the states that leave the chunks; dwritten [B,T,HEADS,V]; dinitial [B,HEADS,K,V]."""
    chunks = tl.cdiv(T, C)
    n, column = columns_of(tl.program_id(0), V, VALUES)
    batch, head = n // HEADS, n % HEADS
    q = head_base(q, batch, head // (HEADS // K_HEADS), T, K_HEADS, K)
    k = head_base(k, batch, head // (HEADS // K_HEADS), T, K_HEADS, K)
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
        keys = load_tile(k, start, T, K_HEADS * K, K, C, BLOCK_K, False)
        back = tl.dot(keys, dstate.to(keys.dtype), input_precision=PRECISION)
        grads = load_columns(dout, start, T, column, HEADS * V, V, C, VALUES).to(tl.float32) * scale
        if HAS_GATES:
            back *= row_or_one(leave + (first + chunk) * C, C, True)[:, None]
            grads *= row_or_one(enter + (first + chunk) * C, C, True)[:, None]
            dstate *= tl.load(total + first + chunk)
        back += load_columns(dwritten_here, start, T, column, HEADS * V, V, C, VALUES).to(tl.float32)
        store_columns(dwritten, start, T, column, back, HEADS * V, V, C, VALUES)
        queries = load_tile(q, start, T, K_HEADS * K, K, C, BLOCK_K, False)
        dstate = tl.dot(tl.trans(queries), grads.to(keys.dtype), dstate, input_precision=PRECISION)
        if DELTA:
            reads = load_tile(w, start, T, HEADS * K, K, C, BLOCK_K, False)
            dstate -= tl.dot(tl.trans(reads), back.to(keys.dtype), input_precision=PRECISION)
    store_columns(dinitial + tl.cast(n, tl.int64) * K * V, 0, K, column, dstate, V, V, BLOCK_K, VALUES)
