"""The triangular systems of the gated delta rule, without decay or with one decay per head. All chunks are independent.

With A_ij = e^{D_ij} k_i·k_j below the diagonal,

    X = (I + diag(β) A)⁻¹,      W = X diag(β e^{D_i,start}) K,      U = X diag(β) V

The gradients, with V' = X diag(β) (V − enter ⊙ (K S)) and its cotangent dV':

    Y = Xᵀ dV',      dV = diag(β) Y,      B_ij = −e^{D_ij} Y_i·V'_j  (j < i),
    dβ = Y·(V − enter ⊙ (K S)) + Σ_j B ⊙ K Kᵀ,
    dK = diag(β) B K + (diag(β) B)ᵀ K − enter ⊙ (dV Sᵀ),      dD_ij = β_i B_ij k_i·k_j
"""

import triton
import triton.language as tl

from pallas_kernels.triton.gated.heads.decay import decays, gate_gradient
from pallas_kernels.triton.gated.places import chunk_of, key_base, row_or_one, segments_of
from pallas_kernels.triton.gated.wy_form import inverse_of, store_wy_form, wy_gradients
from pallas_kernels.triton.memory import head_base, load_tile, store_tile


@triton.jit
def gated_solve(
    k,
    v,
    g,
    segments,
    beta,
    enter,
    T,
    w,
    u,
    inverse,
    HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    HAS_DECAY: tl.constexpr,
    HAS_SEGMENTS: tl.constexpr,
    HAS_BETA: tl.constexpr,
    STORE_INVERSE: tl.constexpr,
    PRECISION: tl.constexpr,
    SOLVE_PRECISION: tl.constexpr,
    C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    VALUES: tl.constexpr,
):
    """Inverts the system of one chunk of one value head. Grid: B × HEADS × n programs.

    Reads k [B,T,K_HEADS,K], v [B,T,HEADS,V], g, beta, enter [B,HEADS,n C], segments [B,n C]. Writes w [B,T,HEADS,K], u
    [B,T,HEADS,V] and, if STORE_INVERSE, inverse (X) [B,HEADS,n,C,C], all in v's dtype.
    """
    HAS_GATES: tl.constexpr = HAS_DECAY or HAS_SEGMENTS
    batch, head, start, block = chunk_of(tl.program_id(0), T, HEADS, C)
    row = block * C
    segments = segments_of(segments, batch, start, T, C)
    k = key_base(k, batch, head, T, HEADS, K_HEADS, K)
    keys = load_tile(k, start, T, K_HEADS * K, K, C, BLOCK_K, False)
    b = row_or_one(beta + row, C, HAS_BETA)
    pairs = tl.dot(keys, tl.trans(keys), input_precision=PRECISION)
    pairs *= decays(g + row, segments, C, HAS_DECAY, HAS_SEGMENTS)
    solution = inverse_of(pairs, b, inverse, block, STORE_INVERSE, SOLVE_PRECISION, C, keys.dtype)
    reads = (keys.to(tl.float32) * (b * row_or_one(enter + row, C, HAS_GATES))[:, None]).to(keys.dtype)
    store_wy_form(solution, reads, b, v, w, u, batch, head, start, T, HEADS, K, V, PRECISION, C, BLOCK_K, VALUES)


@triton.jit
def gated_solve_gradients(
    k,
    v,
    written,
    dwritten,
    inverse,
    states,
    g,
    segments,
    beta,
    enter,
    T,
    dk,
    dv,
    dbeta,
    dg,
    denter,
    HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    HAS_DECAY: tl.constexpr,
    HAS_SEGMENTS: tl.constexpr,
    HAS_BETA: tl.constexpr,
    PRECISION: tl.constexpr,
    C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    VALUES: tl.constexpr,
):
    """The gradients of one chunk's system. Grid: B × HEADS × n programs.

    Reads k [B,T,K_HEADS,K], v, written (V'), dwritten [B,T,HEADS,V], inverse [B,HEADS,n,C,C], states [B,HEADS,n,K,V],
    g, beta, enter [B,HEADS,n C], segments [B,n C]. Writes dk [B,T,HEADS,K], dv [B,T,HEADS,V], and dbeta, dg (the part
    through D), denter [B,HEADS,n C].
    """
    HAS_GATES: tl.constexpr = HAS_DECAY or HAS_SEGMENTS
    batch, head, start, block = chunk_of(tl.program_id(0), T, HEADS, C)
    index = tl.arange(0, C)
    segments = segments_of(segments, batch, start, T, C)
    k = key_base(k, batch, head, T, HEADS, K_HEADS, K)
    keys = load_tile(k, start, T, K_HEADS * K, K, C, BLOCK_K, False)
    entering = row_or_one(enter + block * C, C, HAS_GATES)
    b = row_or_one(beta + block * C, C, HAS_BETA)
    dkeys, dentering, dsystem, dbetas = wy_gradients(
        keys,
        entering,
        b,
        v,
        written,
        dwritten,
        inverse,
        states,
        dv,
        batch,
        head,
        start,
        block,
        T,
        HEADS,
        K,
        V,
        HAS_GATES,
        PRECISION,
        C,
        BLOCK_K,
        VALUES,
    )
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
