"""The gradients of what is read and of what the chunk adds to the state, all chunks at once, given the state S that
enters a chunk and the cotangent dS of the one that leaves it. With P_ij = e^{D_ij} q_i·k_j for j ≤ i,

    dP_ij = scale e^{D_ij} dO_i·V'_j,      dQ = dP K + scale enter ⊙ (dO Sᵀ),      dK = dPᵀ Q + leave ⊙ (V' dSᵀ)

and dD_ij = dP_ij q_i·k_j; of enter, leave and total what multiplies them."""

import triton
import triton.language as tl

from pallas_kernels.triton.gated.decay import decays, gate_gradient, row_or_one
from pallas_kernels.triton.gated.places import chunk_of, segments_of
from pallas_kernels.triton.memory import head_base, load_columns, load_tile, store_tile


@triton.jit
def gated_read_gradients(
    q, k, written, dout, states, dstates, g, segments, enter, leave, T, scale,
    dq, dk, dg, denter, dleave, dtotal,
    HEADS: tl.constexpr, K_HEADS: tl.constexpr, K: tl.constexpr, V: tl.constexpr, HAS_DECAY: tl.constexpr,
    HAS_SEGMENTS: tl.constexpr, HAS_GATES: tl.constexpr, PRECISION: tl.constexpr, C: tl.constexpr,
    BLOCK_K: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """q, k [B,T,K_HEADS,K], written, dout [B,T,HEADS,V], states, dstates [B,HEADS,n,K,V], g, enter, leave
    [B,HEADS,n C], segments [B,n C] -> dq, dk [B,T,HEADS,K], dg (by D alone), denter, dleave [B,HEADS,n C], dtotal
    [B,HEADS,n]."""
    batch, head, start, block = chunk_of(tl.program_id(0), T, HEADS, C)
    index = tl.arange(0, C)
    segments = segments_of(segments, batch, start, T, C)
    q = head_base(q, batch, head // (HEADS // K_HEADS), T, K_HEADS, K)
    k = head_base(k, batch, head // (HEADS // K_HEADS), T, K_HEADS, K)
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
        state = load_columns(states + block * K * V, 0, K, column, V, V, BLOCK_K, VALUES)
        dstate = load_columns(dstates + block * K * V, 0, K, column, V, V, BLOCK_K, VALUES)
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
