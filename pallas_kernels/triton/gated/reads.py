"""What is read in a chunk, all chunks at once: with P_ij = e^{D_ij} q_i·k_j for j ≤ i,

O = scale (enter ⊙ (Q S) + P V'),      and backward, of that alone,      dV' = scale Pᵀ dO
"""

import triton
import triton.language as tl

from pallas_kernels.triton.gated.decay import decays, row_or_one
from pallas_kernels.triton.gated.places import chunk_of, segments_of
from pallas_kernels.triton.memory import head_base, load_columns, load_tile, store_columns


@triton.jit
def gated_read(
    q, k, written, g, segments, enter, states, T, scale, out,
    HEADS: tl.constexpr, K_HEADS: tl.constexpr, K: tl.constexpr, V: tl.constexpr, HAS_DECAY: tl.constexpr,
    HAS_SEGMENTS: tl.constexpr, HAS_GATES: tl.constexpr, PRECISION: tl.constexpr, C: tl.constexpr,
    BLOCK_K: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """q, k [B,T,K_HEADS,K], written [B,T,HEADS,V], g, enter [B,HEADS,n C], segments [B,n C],
    states [B,HEADS,n,K,V] -> out [B,T,HEADS,V]."""
    batch, head, start, block = chunk_of(tl.program_id(0), T, HEADS, C)
    segments = segments_of(segments, batch, start, T, C)
    q = head_base(q, batch, head // (HEADS // K_HEADS), T, K_HEADS, K)
    k = head_base(k, batch, head // (HEADS // K_HEADS), T, K_HEADS, K)
    written = head_base(written, batch, head, T, HEADS, V)
    out = head_base(out, batch, head, T, HEADS, V)
    queries = load_tile(q, start, T, K_HEADS * K, K, C, BLOCK_K, False)
    keys = load_tile(k, start, T, K_HEADS * K, K, C, BLOCK_K, False)
    pairs = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
    pairs = (pairs * decays(g + block * C, segments, C, HAS_DECAY, HAS_SEGMENTS)).to(keys.dtype)
    left = row_or_one(enter + block * C, C, HAS_GATES)
    for column in tl.range(0, V, VALUES):
        state = load_columns(states + block * K * V, 0, K, column, V, V, BLOCK_K, VALUES)
        read = tl.dot(queries, state, input_precision=PRECISION) * left[:, None]
        values = load_columns(written, start, T, column, HEADS * V, V, C, VALUES)
        read = tl.dot(pairs, values, read, input_precision=PRECISION) * scale
        store_columns(out, start, T, column, read, HEADS * V, V, C, VALUES)


@triton.jit
def gated_read_values(
    q, k, dout, g, segments, T, scale, dwritten,
    HEADS: tl.constexpr, K_HEADS: tl.constexpr, K: tl.constexpr, V: tl.constexpr, HAS_DECAY: tl.constexpr,
    HAS_SEGMENTS: tl.constexpr, PRECISION: tl.constexpr, C: tl.constexpr, BLOCK_K: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """As `gated_read`, dout [B,T,HEADS,V] -> dwritten [B,T,HEADS,V]."""
    batch, head, start, block = chunk_of(tl.program_id(0), T, HEADS, C)
    segments = segments_of(segments, batch, start, T, C)
    q = head_base(q, batch, head // (HEADS // K_HEADS), T, K_HEADS, K)
    k = head_base(k, batch, head // (HEADS // K_HEADS), T, K_HEADS, K)
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
