"""The reads of the gated ops, without decay or with one decay per head. All chunks are independent.

With P_ij = e^{D_ij} q_i·k_j for j ≤ i, the output of a chunk and the cotangent of V' through it are

    O = scale (enter ⊙ (Q S) + P V'),      dV' = scale Pᵀ dO

With S the state that enters the chunk and dS the cotangent of the state that leaves it, the gradients of the output and
of what the chunk adds to the state are

    dP_ij = scale e^{D_ij} dO_i·V'_j,      dQ = dP K + scale enter ⊙ (dO Sᵀ),      dK = dPᵀ Q + leave ⊙ (V' dSᵀ)

    dD_ij = dP_ij q_i·k_j,      denter = scale Σ_k (dO Sᵀ) ⊙ Q,      dleave = Σ_k (V' dSᵀ) ⊙ K,      dtotal = Σ S ⊙ dS
"""

import triton
import triton.language as tl

from pallas_kernels.triton.gated.heads.decay import decays, gate_gradient
from pallas_kernels.triton.gated.places import chunk_of, key_base, load_state, row_or_one, segments_of
from pallas_kernels.triton.memory import head_base, load_columns, load_tile, store_columns, store_tile


@triton.jit
def gated_read(
    q,
    k,
    written,
    g,
    segments,
    enter,
    states,
    T,
    scale,
    out,
    HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    HAS_DECAY: tl.constexpr,
    HAS_SEGMENTS: tl.constexpr,
    PRECISION: tl.constexpr,
    C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    VALUES: tl.constexpr,
):
    """The output O of one chunk of one value head. Grid: B × HEADS × n programs.

    Reads q, k [B,T,K_HEADS,K], written (V') [B,T,HEADS,V], g, enter [B,HEADS,n C], segments [B,n C], states
    [B,HEADS,n,K,V]. Writes out [B,T,HEADS,V].
    """
    HAS_GATES: tl.constexpr = HAS_DECAY or HAS_SEGMENTS
    batch, head, start, block = chunk_of(tl.program_id(0), T, HEADS, C)
    segments = segments_of(segments, batch, start, T, C)
    q = key_base(q, batch, head, T, HEADS, K_HEADS, K)
    k = key_base(k, batch, head, T, HEADS, K_HEADS, K)
    written = head_base(written, batch, head, T, HEADS, V)
    out = head_base(out, batch, head, T, HEADS, V)
    queries = load_tile(q, start, T, K_HEADS * K, K, C, BLOCK_K, False)
    keys = load_tile(k, start, T, K_HEADS * K, K, C, BLOCK_K, False)
    pairs = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
    pairs = (pairs * decays(g + block * C, segments, C, HAS_DECAY, HAS_SEGMENTS)).to(keys.dtype)
    left = row_or_one(enter + block * C, C, HAS_GATES)
    for column in tl.range(0, V, VALUES):
        state = load_state(states, block, column, K, V, BLOCK_K, VALUES)
        read = tl.dot(queries, state, input_precision=PRECISION) * left[:, None]
        values = load_columns(written, start, T, column, HEADS * V, V, C, VALUES)
        read = tl.dot(pairs, values, read, input_precision=PRECISION) * scale
        store_columns(out, start, T, column, read, HEADS * V, V, C, VALUES)


@triton.jit
def gated_read_values(
    q,
    k,
    dout,
    g,
    segments,
    T,
    scale,
    dwritten,
    HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    HAS_DECAY: tl.constexpr,
    HAS_SEGMENTS: tl.constexpr,
    PRECISION: tl.constexpr,
    C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    VALUES: tl.constexpr,
):
    """dV' of one chunk through its own output. Grid and arrays as `gated_read`; reads dout [B,T,HEADS,V], writes
    dwritten [B,T,HEADS,V]."""
    batch, head, start, block = chunk_of(tl.program_id(0), T, HEADS, C)
    segments = segments_of(segments, batch, start, T, C)
    q = key_base(q, batch, head, T, HEADS, K_HEADS, K)
    k = key_base(k, batch, head, T, HEADS, K_HEADS, K)
    dout = head_base(dout, batch, head, T, HEADS, V)
    dwritten = head_base(dwritten, batch, head, T, HEADS, V)
    queries = load_tile(q, start, T, K_HEADS * K, K, C, BLOCK_K, False)
    keys = load_tile(k, start, T, K_HEADS * K, K, C, BLOCK_K, False)
    pairs = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale
    pairs = tl.trans((pairs * decays(g + block * C, segments, C, HAS_DECAY, HAS_SEGMENTS)).to(keys.dtype))
    for column in tl.range(0, V, VALUES):
        grads = load_columns(dout, start, T, column, HEADS * V, V, C, VALUES)
        dvalues = tl.dot(pairs, grads, input_precision=PRECISION)
        store_columns(dwritten, start, T, column, dvalues, HEADS * V, V, C, VALUES)


@triton.jit
def gated_read_gradients(
    q,
    k,
    written,
    dout,
    states,
    dstates,
    g,
    segments,
    enter,
    leave,
    T,
    scale,
    dq,
    dk,
    dg,
    denter,
    dleave,
    dtotal,
    HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    HAS_DECAY: tl.constexpr,
    HAS_SEGMENTS: tl.constexpr,
    PRECISION: tl.constexpr,
    C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    VALUES: tl.constexpr,
):
    """The gradients of one chunk's output and of its addition to the state. Grid: B × HEADS × n programs.

    Reads q, k [B,T,K_HEADS,K], written, dout [B,T,HEADS,V], states, dstates [B,HEADS,n,K,V], g, enter, leave
    [B,HEADS,n C], segments [B,n C]. Writes dq, dk [B,T,HEADS,K], dg (the part through D), denter, dleave
    [B,HEADS,n C], dtotal [B,HEADS,n].
    """
    HAS_GATES: tl.constexpr = HAS_DECAY or HAS_SEGMENTS
    batch, head, start, block = chunk_of(tl.program_id(0), T, HEADS, C)
    index = tl.arange(0, C)
    segments = segments_of(segments, batch, start, T, C)
    q = key_base(q, batch, head, T, HEADS, K_HEADS, K)
    k = key_base(k, batch, head, T, HEADS, K_HEADS, K)
    written = head_base(written, batch, head, T, HEADS, V)
    dout = head_base(dout, batch, head, T, HEADS, V)
    keys = load_tile(k, start, T, K_HEADS * K, K, C, BLOCK_K, False)
    queries = load_tile(q, start, T, K_HEADS * K, K, C, BLOCK_K, False)
    entering = row_or_one(enter + block * C, C, HAS_GATES)
    leaving = row_or_one(leave + block * C, C, HAS_GATES)
    dqueries = tl.zeros([C, BLOCK_K], tl.float32)
    dkeys = tl.zeros([C, BLOCK_K], tl.float32)
    dpairs = tl.zeros([C, C], tl.float32)
    dentering = tl.zeros([C], tl.float32)
    dleaving = tl.zeros([C], tl.float32)
    kept = 0.0
    for column in tl.range(0, V, VALUES, num_stages=1):
        state = load_state(states, block, column, K, V, BLOCK_K, VALUES)
        dstate = load_state(dstates, block, column, K, V, BLOCK_K, VALUES)
        values = load_columns(written, start, T, column, HEADS * V, V, C, VALUES)
        grads = load_columns(dout, start, T, column, HEADS * V, V, C, VALUES)
        dpairs = tl.dot(grads, tl.trans(values), dpairs, input_precision=PRECISION)
        part = tl.dot(grads, tl.trans(state), input_precision=PRECISION)
        if HAS_GATES:
            dentering += tl.sum(part * queries.to(tl.float32), 1) * scale
            kept += tl.sum(state.to(tl.float32) * dstate.to(tl.float32))
        dqueries += part * (entering * scale)[:, None]
        part = tl.dot(values, tl.trans(dstate), input_precision=PRECISION)
        if HAS_GATES:
            dleaving += tl.sum(part * keys.to(tl.float32), 1)
        dkeys += part * leaving[:, None]
    between = decays(g + block * C, segments, C, HAS_DECAY, HAS_SEGMENTS)
    dpairs *= between * scale
    if HAS_DECAY:
        dgates = gate_gradient(dpairs * tl.dot(queries, tl.trans(keys), input_precision=PRECISION), C)
    narrow = dpairs.to(keys.dtype)
    dqueries = tl.dot(narrow, keys, dqueries, input_precision=PRECISION)
    store_tile(head_base(dq, batch, head, T, HEADS, K), start, T, dqueries, HEADS * K, K, C, BLOCK_K)
    dkeys = tl.dot(tl.trans(narrow), queries, dkeys, input_precision=PRECISION)
    if HAS_DECAY:
        tl.store(dg + block * C + index, dgates)
    if HAS_GATES:
        tl.store(denter + block * C + index, dentering)
        tl.store(dleave + block * C + index, dleaving)
        tl.store(dtotal + block, kept)
    store_tile(head_base(dk, batch, head, T, HEADS, K), start, T, dkeys, HEADS * K, K, C, BLOCK_K)
