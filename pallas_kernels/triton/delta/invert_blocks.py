"""(I + diag(β) A)⁻¹ of blocks of rows on the diagonal.

Similarities that nothing normalises know their weights beforehand: between bfloat16 arrays their triangular systems are
inverted in a launch of their own, all at once, and the kernels in which one block waits for another only multiply by
them. Softmax's wait for its sums, and are inverted there, as are float32's.
"""

import triton
import triton.language as tl

from pallas_kernels.triton.delta.solve import invert
from pallas_kernels.triton.delta.weights import weights_again
from pallas_kernels.triton.memory import head_base, load_row, load_tile, padded, store_tile
from pallas_kernels.triton.products import parts


@triton.jit
def own_inverse(
    n, start, w, k, beta, lse, segments, T, score_scale, HAS_BETA: tl.constexpr, HAS_SEGMENTS: tl.constexpr,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, K: tl.constexpr, HALF: tl.constexpr, BLOCK_K: tl.constexpr,
    SIMILARITY: tl.constexpr, POWER: tl.constexpr, SCORE_PRECISION: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(I + diag(β) A)⁻¹ of HALF rows and as many columns from `start`."""
    batch, head = n // HEADS, n % HEADS
    w = head_base(w, batch, head, T, HEADS, K)
    k = head_base(k, batch, head // (HEADS // KV_HEADS), T, KV_HEADS, K)
    rows = load_tile(w, start, T, HEADS * K, K, HALF, BLOCK_K, False)
    keys = load_tile(k, start, T, KV_HEADS * K, K, HALF, BLOCK_K, False)
    scores = tl.dot(rows, tl.trans(keys), input_precision=SCORE_PRECISION) * score_scale
    visible = tl.arange(0, HALF)[:, None] > tl.arange(0, HALF)[None, :]
    if HAS_SEGMENTS:
        segments += tl.cast(batch, tl.int64) * T
        visible &= load_row(segments, start, T, HALF)[:, None] == load_row(segments, start, T, HALF)[None, :]
    log_total = scores
    if SIMILARITY == "softmax":
        log_total = load_row(lse + padded(n, T), start, T, HALF)[:, None]
    weights = weights_again(scores, visible, log_total, SIMILARITY, POWER, True)
    if HAS_BETA:
        weights *= load_row(beta + tl.cast(n, tl.int64) * T, start, T, HALF)[:, None]
    return invert(weights, HALF, PRECISION)


@triton.jit
def inverse_base(inverse, n, T, ROWS: tl.constexpr):
    """Where the inverses of head n begin in an array [heads, T padded to a multiple of 2 ROWS, ROWS]: a block may be
    two such, and the second is read wherever the first is."""
    return inverse + tl.cast(n, tl.int64) * (tl.cdiv(T, 2 * ROWS) * 2 * ROWS * ROWS)


@triton.jit
def load_inverse(inverse, n, start, T, ROWS: tl.constexpr):
    """One part of the inverse of the rows at `start`."""
    return load_tile(inverse_base(inverse, n, T, ROWS), start, T, ROWS, ROWS, ROWS, ROWS, True)


@triton.jit
def invert_blocks(
    w, k, beta, segments, T, scale, high, low,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, K: tl.constexpr, HAS_BETA: tl.constexpr, HAS_SEGMENTS: tl.constexpr,
    SIMILARITY: tl.constexpr, POWER: tl.constexpr, SCORE_PRECISION: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """w [B,T,HEADS,K], k [B,T,KV_HEADS,K], beta [B,HEADS,T], segments [B,T] -> high, low [B,HEADS,padded T,ROWS]: the
    two parts (products.py) of the inverses, T padded to a multiple of 2 ROWS."""
    blocks = tl.cdiv(T, 2 * ROWS) * 2
    n = tl.program_id(0) // blocks
    start = tl.program_id(0) % blocks * ROWS
    # No log-sum-exp: it is softmax's.
    inverse = own_inverse(
        n, start, w, k, beta, beta, segments, T, scale, HAS_BETA, HAS_SEGMENTS, HEADS, KV_HEADS, K, ROWS, BLOCK_K,
        SIMILARITY, POWER, SCORE_PRECISION, PRECISION,
    )  # fmt: skip
    inverse_high, inverse_low = parts(inverse)
    end = blocks * ROWS
    store_tile(inverse_base(high, n, T, ROWS), start, end, inverse_high, ROWS, ROWS, ROWS, ROWS)
    store_tile(inverse_base(low, n, T, ROWS), start, end, inverse_low, ROWS, ROWS, ROWS, ROWS)
