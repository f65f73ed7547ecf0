"""The gated delta rule's triangular system, all chunks at once: with A_ij = e^{D_ij} k_i·k_j below the diagonal,

    X = (I + diag(β) A)⁻¹,      W = X diag(β e^{D_i,start}) K,      U = X diag(β) V

so that what a chunk writes is V' = U − W S for the state S that enters it (the WY form: Yang et al., arXiv 2406.06484,
2412.06464)."""

import triton
import triton.language as tl

from pallas_kernels.triton.gated.decay import decays, row_or_one
from pallas_kernels.triton.gated.places import chunk_of, segments_of
from pallas_kernels.triton.memory import head_base, load_columns, load_tile, store_columns, store_tile
from pallas_kernels.triton.triangular import invert


@triton.jit
def gated_solve(
    k, v, g, segments, beta, enter, T, w, u, inverse,
    HEADS: tl.constexpr, K_HEADS: tl.constexpr, K: tl.constexpr, V: tl.constexpr, HAS_DECAY: tl.constexpr,
    HAS_SEGMENTS: tl.constexpr, HAS_GATES: tl.constexpr, HAS_BETA: tl.constexpr, STORE_INVERSE: tl.constexpr,
    PRECISION: tl.constexpr, SOLVE_PRECISION: tl.constexpr, C: tl.constexpr, BLOCK_K: tl.constexpr,
    VALUES: tl.constexpr,
):  # fmt: skip
    """k [B,T,K_HEADS,K], v [B,T,HEADS,V], g, beta, enter [B,HEADS,n C], segments [B,n C] ->
    w [B,T,HEADS,K], u [B,T,HEADS,V], inverse [B,HEADS,n,C,C], all of v's type."""
    batch, head, start, block = chunk_of(tl.program_id(0), T, HEADS, C)
    row = block * C
    segments = segments_of(segments, batch, start, T, C)
    k = head_base(k, batch, head // (HEADS // K_HEADS), T, K_HEADS, K)
    keys = load_tile(k, start, T, K_HEADS * K, K, C, BLOCK_K, False)
    b = row_or_one(beta + row, C, HAS_BETA)
    pairs = tl.dot(keys, tl.trans(keys), input_precision=PRECISION)
    pairs *= decays(g + row, segments, C, HAS_DECAY, HAS_SEGMENTS)
    solution = invert(pairs * b[:, None], C, SOLVE_PRECISION).to(keys.dtype)
    if STORE_INVERSE:
        index = tl.arange(0, C)
        tl.store(inverse + row * C + index[:, None] * C + index[None, :], solution)
    reads = (keys.to(tl.float32) * (b * row_or_one(enter + row, C, HAS_GATES))[:, None]).to(keys.dtype)
    w = head_base(w, batch, head, T, HEADS, K)
    store_tile(w, start, T, tl.dot(solution, reads, input_precision=PRECISION), HEADS * K, K, C, BLOCK_K)
    v = head_base(v, batch, head, T, HEADS, V)
    u = head_base(u, batch, head, T, HEADS, V)
    for column in tl.range(0, V, VALUES):
        values = load_columns(v, start, T, column, HEADS * V, V, C, VALUES)
        values = (values.to(tl.float32) * b[:, None]).to(keys.dtype)
        store_columns(u, start, T, column, tl.dot(solution, values, input_precision=PRECISION), HEADS * V, V, C, VALUES)
