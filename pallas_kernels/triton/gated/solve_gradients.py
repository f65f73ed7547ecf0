"""The gradients that come from the delta rule's system, all chunks at once: with X = (I + diag(β) A)⁻¹,
A_ij = e^{D_ij} k_i·k_j for j < i, V' = X diag(β) (V − enter ⊙ (K S)) and its cotangent dV',

    Y = Xᵀ dV',      dV = diag(β) Y,      B_ij = −e^{D_ij} Y_i·V'_j  (j < i),
    dβ = Y·(V − enter ⊙ (K S)) + Σ_j B ⊙ K Kᵀ,
    dK = diag(β) B K + (diag(β) B)ᵀ K − enter ⊙ (dV Sᵀ),      dD_ij = β_i B_ij k_i·k_j

Derived for this project."""

import triton
import triton.language as tl

from pallas_kernels.triton.gated.decay import decays, gate_gradient, row_or_one
from pallas_kernels.triton.gated.places import chunk_of, segments_of
from pallas_kernels.triton.memory import head_base, load_columns, load_tile, store_columns, store_tile


@triton.jit
def gated_solve_gradients(
    k, v, written, dwritten, inverse, states, g, segments, beta, enter, T,
    dk, dv, dbeta, dg, denter,
    HEADS: tl.constexpr, K_HEADS: tl.constexpr, K: tl.constexpr, V: tl.constexpr, HAS_DECAY: tl.constexpr,
    HAS_SEGMENTS: tl.constexpr, HAS_GATES: tl.constexpr, HAS_BETA: tl.constexpr, PRECISION: tl.constexpr,
    C: tl.constexpr, BLOCK_K: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """k [B,T,K_HEADS,K], v, written, dwritten [B,T,HEADS,V], inverse [B,HEADS,n,C,C], states [B,HEADS,n,K,V],
    g, beta, enter [B,HEADS,n C], segments [B,n C] -> dk [B,T,HEADS,K], dv [B,T,HEADS,V], dbeta, dg (by D alone),
    denter [B,HEADS,n C]."""
    batch, head, start, block = chunk_of(tl.program_id(0), T, HEADS, C)
    index = tl.arange(0, C)
    segments = segments_of(segments, batch, start, T, C)
    k = head_base(k, batch, head // (HEADS // K_HEADS), T, K_HEADS, K)
    v = head_base(v, batch, head, T, HEADS, V)
    dv = head_base(dv, batch, head, T, HEADS, V)
    written = head_base(written, batch, head, T, HEADS, V)
    dwritten = head_base(dwritten, batch, head, T, HEADS, V)
    keys = load_tile(k, start, T, K_HEADS * K, K, C, BLOCK_K, False)
    entering = row_or_one(enter + block * C, C, HAS_GATES)
    dkeys = tl.zeros([C, BLOCK_K], tl.float32)
    dentering = tl.zeros([C], tl.float32)
    b = row_or_one(beta + block * C, C, HAS_BETA)
    dsystem = tl.zeros([C, C], tl.float32)
    dbetas = tl.zeros([C], tl.float32)
    solution = tl.trans(tl.load(inverse + block * C * C + index[:, None] * C + index[None, :]))
    for column in tl.range(0, V, VALUES, num_stages=1):
        state = load_columns(states + block * K * V, 0, K, column, V, V, BLOCK_K, VALUES)
        values = load_columns(written, start, T, column, HEADS * V, V, C, VALUES)
        dvalues = load_columns(dwritten, start, T, column, HEADS * V, V, C, VALUES)
        solved = tl.dot(solution, dvalues, input_precision=PRECISION)
        read = tl.dot(keys, state, input_precision=PRECISION) * entering[:, None]
        rest = load_columns(v, start, T, column, HEADS * V, V, C, VALUES).to(tl.float32) - read
        dbetas += tl.sum(solved * rest, 1)
        dsystem -= tl.dot(solved.to(keys.dtype), tl.trans(values), input_precision=PRECISION)
        solved *= b[:, None]
        store_columns(dv, start, T, column, solved, HEADS * V, V, C, VALUES)
        # The state is read with e^D k: its gradient, times k.
        part = tl.dot(solved.to(keys.dtype), tl.trans(state), input_precision=PRECISION)
        if HAS_GATES:
            dentering -= tl.sum(part * keys.to(tl.float32), 1)
        dkeys -= part * entering[:, None]
    between = decays(g + block * C, segments, C, HAS_DECAY, HAS_SEGMENTS)
    dsystem = tl.where(index[:, None] > index[None, :], dsystem * between, 0.0)
    system = tl.dot(keys, tl.trans(keys), input_precision=PRECISION) * dsystem
    dbetas += tl.sum(system, 1)
    if HAS_DECAY:
        dgates = gate_gradient(system * b[:, None], C)
    narrow = (dsystem * b[:, None]).to(keys.dtype)
    dkeys = tl.dot(narrow, keys, dkeys, input_precision=PRECISION)
    dkeys = tl.dot(tl.trans(narrow), keys, dkeys, input_precision=PRECISION)
    tl.store(dbeta + block * C + index, dbetas)
    if HAS_DECAY:
        tl.store(dg + block * C + index, dgates)
    if HAS_GATES:
        tl.store(denter + block * C + index, dentering)
    store_tile(head_base(dk, batch, head, T, HEADS, K), start, T, dkeys, HEADS * K, K, C, BLOCK_K)
