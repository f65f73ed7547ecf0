"""The triangular systems of the gated delta rule with a decay per channel. All chunks are independent. kk and k_reads
already contain the decay (pairs.py).

    X = (I + diag(β) kk)⁻¹,      W = X diag(β) k_reads,      U = X diag(β) V

The gradients, with V' = X diag(β) (V − k_reads S) and its cotangent dV':

    Y = Xᵀ dV',      dV = diag(β) Y,      dkk = −dV V'ᵀ,      dk_reads = −dV Sᵀ,
    dβ = Y·(V − k_reads S) − Σ_j kk ⊙ Y V'ᵀ
"""

import triton
import triton.language as tl

from pallas_kernels.triton.gated.places import chunk_of, row_or_one, square
from pallas_kernels.triton.gated.wy_form import inverse_of, store_wy_form, wy_gradients
from pallas_kernels.triton.memory import head_base, load_tile, store_tile


@triton.jit
def gated_channel_solve(
    kk,
    k_reads,
    v,
    beta,
    T,
    w,
    u,
    inverse,
    HEADS: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    HAS_BETA: tl.constexpr,
    STORE_INVERSE: tl.constexpr,
    PRECISION: tl.constexpr,
    SOLVE_PRECISION: tl.constexpr,
    C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    VALUES: tl.constexpr,
):
    """Inverts the system of one chunk of one value head. Grid: B × HEADS × n programs.

    Reads kk [B,HEADS,n,C,C] float32, k_reads [B,T,HEADS,K], v [B,T,HEADS,V], beta [B,HEADS,n C]. Writes w
    [B,T,HEADS,K], u [B,T,HEADS,V] and, if STORE_INVERSE, inverse (X) [B,HEADS,n,C,C], all in v's dtype.
    """
    batch, head, start, block = chunk_of(tl.program_id(0), T, HEADS, C)
    b = row_or_one(beta + block * C, C, HAS_BETA)
    pairs = tl.load(kk + square(block, C))
    solution = inverse_of(pairs, b, inverse, block, STORE_INVERSE, SOLVE_PRECISION, C, w.dtype.element_ty)
    reads = load_tile(head_base(k_reads, batch, head, T, HEADS, K), start, T, HEADS * K, K, C, BLOCK_K, False)
    reads = (reads.to(tl.float32) * b[:, None]).to(reads.dtype)
    store_wy_form(solution, reads, b, v, w, u, batch, head, start, T, HEADS, K, V, PRECISION, C, BLOCK_K, VALUES)


@triton.jit
def gated_channel_solve_gradients(
    kk,
    k_reads,
    v,
    written,
    dwritten,
    inverse,
    states,
    beta,
    T,
    dkk,
    dk_reads,
    dv,
    dbeta,
    HEADS: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    HAS_BETA: tl.constexpr,
    PRECISION: tl.constexpr,
    C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    VALUES: tl.constexpr,
):
    """The gradients of one chunk's system. Grid: B × HEADS × n programs.

    Reads the inputs of `gated_channel_solve`, its inverse, written (V'), dwritten [B,T,HEADS,V], states
    [B,HEADS,n,K,V]. Writes dkk [B,HEADS,n,C,C], of which only the part below the diagonal, within segments, is valid;
    dk_reads [B,T,HEADS,K]; dv [B,T,HEADS,V]; dbeta [B,HEADS,n C].
    """
    batch, head, start, block = chunk_of(tl.program_id(0), T, HEADS, C)
    b = row_or_one(beta + block * C, C, HAS_BETA)
    reads = load_tile(head_base(k_reads, batch, head, T, HEADS, K), start, T, HEADS * K, K, C, BLOCK_K, False)
    dreads, _, dsystem, dbetas = wy_gradients(
        reads,
        tl.full([C], 1.0, tl.float32),
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
        False,
        PRECISION,
        C,
        BLOCK_K,
        VALUES,
    )
    # kk is 0 for pairs that do not see each other, so that dsystem needs no mask.
    dbetas += tl.sum(dsystem * tl.load(kk + square(block, C)), 1)
    tl.store(dbeta + block * C + tl.arange(0, C), dbetas)
    tl.store(dkk + square(block, C), (dsystem * b[:, None]).to(dkk.dtype.element_ty))
    store_tile(head_base(dk_reads, batch, head, T, HEADS, K), start, T, dreads, HEADS * K, K, C, BLOCK_K)
