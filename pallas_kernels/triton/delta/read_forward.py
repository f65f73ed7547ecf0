"""The read, o_t = Σ_{i≤t} κ(q_t, k_i) u_i: flash attention (Dao et al., arXiv 2205.14135) with any similarity."""

import triton
import triton.language as tl

from pallas_kernels.triton.delta.weights import LOWEST, inverse_or_zero, log_sum
from pallas_kernels.triton.delta.write_forward import score_tile, stream
from pallas_kernels.triton.memory import head_base, load_row, load_tile, store_row, store_tile
from pallas_kernels.triton.products import add_product


@triton.jit
def read_forward(
    q, k, u, residue, segments, first, T, scale, out, lse,
    HEADS: tl.constexpr, U_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    HAS_SEGMENTS: tl.constexpr, SIMILARITY: tl.constexpr, POWER: tl.constexpr, PAIR: tl.constexpr,
    SCORE_PRECISION: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """q [B,T,HEADS,K], k [B,T,KV_HEADS,K], u [B,T,U_HEADS,V] (PAIR: its high part, and residue the low one),
    segments [B,T], first [B,blocks] -> out [B,T,HEADS,V], lse [B,HEADS,T] in base 2. `scale` has log2(e) in it for
    softmax."""
    blocks = tl.cdiv(T, ROWS)
    n = tl.program_id(0) // blocks
    # The longest first; neighbours share keys and u in the cache.
    block = blocks - 1 - tl.program_id(0) % blocks
    batch, head = n // HEADS, n % HEADS
    k = head_base(k, batch, head // (HEADS // KV_HEADS), T, KV_HEADS, K)
    u = head_base(u, batch, head // (HEADS // U_HEADS), T, U_HEADS, V)
    if PAIR:
        residue = head_base(residue, batch, head // (HEADS // U_HEADS), T, U_HEADS, V)
    start = block * ROWS
    rows = load_tile(head_base(q, batch, head, T, HEADS, K), start, T, HEADS * K, K, ROWS, BLOCK_K, False)
    earliest = 0
    row_segments = start
    if HAS_SEGMENTS:
        segments += tl.cast(batch, tl.int64) * T
        row_segments = load_row(segments, start, T, ROWS)
        earliest = tl.load(first + batch * blocks + block) // COLUMNS * COLUMNS
    highest = tl.full([ROWS], LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    weighted = tl.zeros([ROWS, BLOCK_V], tl.float32)
    highest, total, weighted = stream(
        rows, k, u, residue, earliest, start, row_segments, segments, T, scale, highest, total, weighted,
        HAS_SEGMENTS, KV_HEADS * K, K, U_HEADS * V, V, COLUMNS, BLOCK_K, BLOCK_V, SIMILARITY, POWER, PAIR,
        SCORE_PRECISION, PRECISION,
    )  # fmt: skip
    for columns in tl.range(start, start + ROWS, COLUMNS, num_stages=1):
        causal = (start + tl.arange(0, ROWS))[:, None] >= (columns + tl.arange(0, COLUMNS))[None, :]
        weights, highest, total, shrink = score_tile(
            rows, k, columns, row_segments, segments, T, scale, highest, total, causal,
            HAS_SEGMENTS, True, False, KV_HEADS * K, K, COLUMNS, BLOCK_K, SIMILARITY, POWER, SCORE_PRECISION,
        )  # fmt: skip
        values = load_tile(u, columns, T, U_HEADS * V, V, COLUMNS, BLOCK_V, False)
        low = values
        if PAIR:
            low = load_tile(residue, columns, T, U_HEADS * V, V, COLUMNS, BLOCK_V, False)
        weighted = add_product(weights, values, low, weighted * shrink[:, None], PAIR, PRECISION)
    if SIMILARITY == "softmax":
        weighted *= inverse_or_zero(total)[:, None]
        store_row(lse + tl.cast(n, tl.int64) * T, start, T, log_sum(highest, total), ROWS)
    store_tile(head_base(out, batch, head, T, HEADS, V), start, T, weighted, HEADS * V, V, ROWS, BLOCK_V)
