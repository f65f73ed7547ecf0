"""The state's way through the chunks, one after another; heads and columns of V go side by side.

    forward      V' = U − W S  (delta rule)  or  V,      S ← total S + (leave ⊙ K)ᵀ V'
    backward     dV' = dV'(own chunk's outputs) + leave ⊙ (K dS),
                 dS ← total dS + scale (enter ⊙ Q)ᵀ dO − Wᵀ dV'

enter, leave, total: what is left of the entering state at each token, of each token's write at the chunk's end, and of
the state there. The state is float32 here, and rounded to the inputs' type for products and for whoever reads it.

DECAY says which there are: "none"; "head", numbers for each head; or "channel", where `enter ⊙ Q` and `leave ⊙ K` are
what K and Q hold already (channels/pairs.py), one for each head of values, and total is a row, one for each of K."""

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
    """k [B,T,K_HEADS,K], v [B,T,HEADS,V] (DELTA: U), w [B,T,HEADS,K], leave [B,HEADS,n C], total [B,HEADS,n] or
    [B,HEADS,n,K], initial [B,HEADS,K,V] -> states [B,HEADS,n,K,V], which enter the chunks; DELTA: written
    [B,T,HEADS,V]; final."""
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
    """values + x, which is stored to `total`; x, total of a head of [B,T,HEADS,V]."""
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
    """As `gated_advance`, with q [B,T,K_HEADS,K], dout, dwritten_here [B,T,HEADS,V], enter [B,HEADS,n C] ->
    dstates [B,HEADS,n,K,V], of the states that leave the chunks; dwritten [B,T,HEADS,V]; dinitial [B,HEADS,K,V]."""
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
        # With a decay of each channel what is added comes first, else the grads: the other way round takes registers.
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
