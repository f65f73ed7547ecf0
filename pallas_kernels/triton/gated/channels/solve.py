"""As gated_solve.py and gated_solve_gradients.py, with a decay of each channel: kk and k_reads hold it already
(gated_channel_pairs.py). All chunks at once,

    X = (I + diag(β) kk)⁻¹,      W = X diag(β) k_reads,      U = X diag(β) V

and backward, with V' = X diag(β) (V − k_reads S) and its cotangent dV',

    Y = Xᵀ dV',      dV = diag(β) Y,      dkk = −dV V'ᵀ,      dk_reads = −dV Sᵀ,
    dβ = Y·(V − k_reads S) − Σ_j kk ⊙ Y V'ᵀ

Derived for this project."""

import triton
import triton.language as tl

from pallas_kernels.triton.gated.decay import row_or_one
from pallas_kernels.triton.gated.places import chunk_of
from pallas_kernels.triton.memory import head_base, load_columns, load_tile, store_columns, store_tile
from pallas_kernels.triton.triangular import invert


@triton.jit
def gated_channel_solve(
    kk, k_reads, v, beta, T, w, u, inverse,
    HEADS: tl.constexpr, K: tl.constexpr, V: tl.constexpr, HAS_BETA: tl.constexpr, STORE_INVERSE: tl.constexpr,
    PRECISION: tl.constexpr, SOLVE_PRECISION: tl.constexpr, C: tl.constexpr, BLOCK_K: tl.constexpr,
    VALUES: tl.constexpr,
):  # fmt: skip
    """kk [B,HEADS,n,C,C] float32, k_reads [B,T,HEADS,K], v [B,T,HEADS,V], beta [B,HEADS,n C] ->
    w [B,T,HEADS,K], u [B,T,HEADS,V], inverse [B,HEADS,n,C,C], all of v's type."""
    batch, head, start, block = chunk_of(tl.program_id(0), T, HEADS, C)
    row = block * C
    index = tl.arange(0, C)
    square = row * C + index[:, None] * C + index[None, :]
    b = row_or_one(beta + row, C, HAS_BETA)
    v = head_base(v, batch, head, T, HEADS, V)
    solution = invert(tl.load(kk + square) * b[:, None], C, SOLVE_PRECISION).to(w.dtype.element_ty)
    if STORE_INVERSE:
        tl.store(inverse + square, solution)
    reads = load_tile(head_base(k_reads, batch, head, T, HEADS, K), start, T, HEADS * K, K, C, BLOCK_K, False)
    reads = (reads.to(tl.float32) * b[:, None]).to(reads.dtype)
    w = head_base(w, batch, head, T, HEADS, K)
    store_tile(w, start, T, tl.dot(solution, reads, input_precision=PRECISION), HEADS * K, K, C, BLOCK_K)
    u = head_base(u, batch, head, T, HEADS, V)
    for column in tl.range(0, V, VALUES):
        values = load_columns(v, start, T, column, HEADS * V, V, C, VALUES)
        values = (values.to(tl.float32) * b[:, None]).to(reads.dtype)
        store_columns(u, start, T, column, tl.dot(solution, values, input_precision=PRECISION), HEADS * V, V, C, VALUES)


@triton.jit
def gated_channel_solve_gradients(
    kk, k_reads, v, written, dwritten, inverse, states, beta, T, dkk, dk_reads, dv, dbeta,
    HEADS: tl.constexpr, K: tl.constexpr, V: tl.constexpr, HAS_BETA: tl.constexpr, PRECISION: tl.constexpr,
    C: tl.constexpr, BLOCK_K: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """As `gated_channel_solve`, with written, dwritten [B,T,HEADS,V], states [B,HEADS,n,K,V] -> dkk [B,HEADS,n,C,C] (to
    be read below the diagonal and within segments), dk_reads [B,T,HEADS,K], dv [B,T,HEADS,V], dbeta [B,HEADS,n C]."""
    batch, head, start, block = chunk_of(tl.program_id(0), T, HEADS, C)
    index = tl.arange(0, C)
    square = block * C * C + index[:, None] * C + index[None, :]
    v = head_base(v, batch, head, T, HEADS, V)
    dv = head_base(dv, batch, head, T, HEADS, V)
    written = head_base(written, batch, head, T, HEADS, V)
    dwritten = head_base(dwritten, batch, head, T, HEADS, V)
    b = row_or_one(beta + block * C, C, HAS_BETA)
    reads = load_tile(head_base(k_reads, batch, head, T, HEADS, K), start, T, HEADS * K, K, C, BLOCK_K, False)
    dreads = tl.zeros([C, BLOCK_K], tl.float32)
    dsystem = tl.zeros([C, C], tl.float32)
    dbetas = tl.zeros([C], tl.float32)
    solution = tl.trans(tl.load(inverse + square))
    for column in tl.range(0, V, VALUES, num_stages=1):
        state = load_columns(states + block * K * V, 0, K, column, V, V, BLOCK_K, VALUES)
        values = load_columns(written, start, T, column, HEADS * V, V, C, VALUES)
        dvalues = load_columns(dwritten, start, T, column, HEADS * V, V, C, VALUES)
        solved = tl.dot(solution, dvalues, input_precision=PRECISION)
        rest = load_columns(v, start, T, column, HEADS * V, V, C, VALUES).to(tl.float32)
        rest -= tl.dot(reads, state, input_precision=PRECISION)
        dbetas += tl.sum(solved * rest, 1)
        dsystem -= tl.dot(solved.to(reads.dtype), tl.trans(values), input_precision=PRECISION)
        solved *= b[:, None]
        store_columns(dv, start, T, column, solved, HEADS * V, V, C, VALUES)
        dreads -= tl.dot(solved.to(reads.dtype), tl.trans(state), input_precision=PRECISION)
    # kk is 0 where no pair is.
    dbetas += tl.sum(dsystem * tl.load(kk + square), 1)
    tl.store(dbeta + block * C + index, dbetas)
    tl.store(dkk + square, (dsystem * b[:, None]).to(dkk.dtype.element_ty))
    store_tile(head_base(dk_reads, batch, head, T, HEADS, K), start, T, dreads, HEADS * K, K, C, BLOCK_K)
