"""The read's gradients, one block of columns a program:

    dU = Pᵀ dO,    dS_ij = κ'(s_ij) (dO_i·u_j − D_i),    dQ = scale · dS K,    dK = scale · dSᵀ Q

D_i = dO_i·o_i for softmax, 0 otherwise. Five products per pair of tiles; dQ is added to memory tile by tile, by several
programs at once, so that its last bits differ from run to run. Everything here is transposed, columns first.
"""

import triton
import triton.language as tl

from pallas_kernels.triton.delta.weights import times_slope, weights_again
from pallas_kernels.triton.memory import head_base, load_row, load_tile, store_tile
from pallas_kernels.triton.products import add_product_with_given, product_of_given, product_of_parts_with_given


@triton.jit
def weights_seen(
    scores, lse, segments, column_segments, column, start, T,
    HAS_SEGMENTS: tl.constexpr, CAUSAL: tl.constexpr, DIAGONAL: tl.constexpr, ROWS: tl.constexpr,
    SIMILARITY: tl.constexpr, POWER: tl.constexpr,
):  # fmt: skip
    """κ, and what is visible, [columns, rows]. CAUSAL: the rows may lie before some columns; DIAGONAL: a row sees its
    own column."""
    visible = column
    if CAUSAL:
        row = start + tl.arange(0, ROWS)
        if DIAGONAL:
            visible = column[:, None] <= row[None, :]
        else:
            visible = column[:, None] < row[None, :]
        if HAS_SEGMENTS:
            visible &= column_segments[:, None] == load_row(segments, start, T, ROWS)[None, :]
    else:
        if HAS_SEGMENTS:
            visible = column_segments[:, None] == load_row(segments, start, T, ROWS)[None, :]
    weights = weights_again(scores, visible, lse[None, :], SIMILARITY, POWER, CAUSAL or HAS_SEGMENTS)
    return weights, visible


@triton.jit
def score_gradient(dots, scores, weights, visible, MASKED: tl.constexpr, SIMILARITY: tl.constexpr):
    """κ' · dots where visible."""
    gradient = times_slope(dots, scores, weights, SIMILARITY)
    if MASKED:
        gradient = tl.where(visible, gradient, 0.0)
    return gradient


@triton.jit
def add_transposed(
    base, start, T, tile, STRIDE: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """Adds a tile [BLOCK, ROWS] of the transposed rows to an array that other programs add to as well."""
    base += tl.cast(start, tl.int64) * STRIDE
    row = tl.arange(0, ROWS)[None, :]
    column = tl.arange(0, BLOCK)[:, None]
    tl.atomic_add(base + row * STRIDE + column, tile, mask=(start + row < T) & (column < WIDTH), sem="relaxed")


@triton.jit
def read_rows(
    keys, values, low, dkeys, dvalues, q, dout, lse, row_dot, dq, segments, column_segments, column, begin, end, T,
    scale, score_scale,
    HAS_SEGMENTS: tl.constexpr, CAUSAL: tl.constexpr, HEADS: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    SIMILARITY: tl.constexpr, POWER: tl.constexpr, PAIR: tl.constexpr, SCORE_PRECISION: tl.constexpr,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dkeys and dvalues after the rows begin … end of one query head, whose dq is added to."""
    for start in tl.range(begin, end, ROWS, num_stages=STAGES):
        rows = load_tile(q, start, T, HEADS * K, K, ROWS, BLOCK_K, False)
        grads = load_tile(dout, start, T, HEADS * V, V, ROWS, BLOCK_V, False)
        scores = tl.dot(keys, tl.trans(rows), input_precision=SCORE_PRECISION) * score_scale
        log_total = start + tl.arange(0, ROWS)
        if SIMILARITY == "softmax":
            log_total = load_row(lse, start, T, ROWS)
        weights, visible = weights_seen(
            scores, log_total, segments, column_segments, column, start, T,
            HAS_SEGMENTS, CAUSAL, True, ROWS, SIMILARITY, POWER,
        )  # fmt: skip
        dvalues = add_product_with_given(weights, grads, dvalues, PAIR, PRECISION)
        dots = product_of_parts_with_given(values, low, tl.trans(grads), PAIR, PRECISION)
        if SIMILARITY == "softmax":
            dots -= load_row(row_dot, start, T, ROWS)[None, :]
        dscores = score_gradient(dots, scores, weights, visible, CAUSAL or HAS_SEGMENTS, SIMILARITY)
        dkeys = add_product_with_given(dscores, rows, dkeys, PAIR, PRECISION)
        drows = product_of_given(tl.trans(keys), dscores, PAIR, PRECISION) * scale
        add_transposed(dq, start, T, drows, HEADS * K, K, ROWS, BLOCK_K)
    return dkeys, dvalues


@triton.jit
def read_backward(
    q, k, u, residue, dout, lse, row_dot, segments, last, T, scale, score_scale, dq, dk, du,
    HEADS: tl.constexpr, U_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    HAS_SEGMENTS: tl.constexpr, SIMILARITY: tl.constexpr, POWER: tl.constexpr, PAIR: tl.constexpr,
    SCORE_PRECISION: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """As `read_forward`, with dout [B,T,HEADS,V], lse, row_dot [B,HEADS,T], last [B,blocks]: the row after the last one
    that sees a block's last column -> dq [B,T,HEADS,K], dk [B,T,U_HEADS,K], du [B,T,U_HEADS,V], all float32, dq zeroed.
    `score_scale` has log2(e) in it for softmax, `scale` has not."""
    blocks = tl.cdiv(T, COLUMNS)
    n = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    batch, u_head = n // U_HEADS, n % U_HEADS
    begin = block * COLUMNS
    column = begin + tl.arange(0, COLUMNS)
    k = head_base(k, batch, u_head // (U_HEADS // KV_HEADS), T, KV_HEADS, K)
    keys = load_tile(k, begin, T, KV_HEADS * K, K, COLUMNS, BLOCK_K, False)
    u = head_base(u, batch, u_head, T, U_HEADS, V)
    values = load_tile(u, begin, T, U_HEADS * V, V, COLUMNS, BLOCK_V, False)
    low = values
    if PAIR:
        residue = head_base(residue, batch, u_head, T, U_HEADS, V)
        low = load_tile(residue, begin, T, U_HEADS * V, V, COLUMNS, BLOCK_V, False)
    end = T
    column_segments = begin
    if HAS_SEGMENTS:
        segments += tl.cast(batch, tl.int64) * T
        column_segments = load_row(segments, begin, T, COLUMNS)
        end = tl.load(last + batch * blocks + block)
    dkeys = tl.zeros([COLUMNS, BLOCK_K], tl.float32)
    dvalues = tl.zeros([COLUMNS, BLOCK_V], tl.float32)
    for member in range(0, HEADS // U_HEADS):
        head = u_head * (HEADS // U_HEADS) + member
        row = tl.cast(batch * HEADS + head, tl.int64) * T
        head_q = head_base(q, batch, head, T, HEADS, K)
        head_dout = head_base(dout, batch, head, T, HEADS, V)
        head_dq = head_base(dq, batch, head, T, HEADS, K)
        dkeys, dvalues = read_rows(
            keys, values, low, dkeys, dvalues, head_q, head_dout, lse + row, row_dot + row, head_dq, segments,
            column_segments, column, begin, tl.minimum(begin + COLUMNS, T), T, scale, score_scale,
            HAS_SEGMENTS, True, HEADS, K, V, SIMILARITY, POWER, PAIR, SCORE_PRECISION, PRECISION, ROWS, BLOCK_K,
            BLOCK_V, 1,
        )  # fmt: skip
        dkeys, dvalues = read_rows(
            keys, values, low, dkeys, dvalues, head_q, head_dout, lse + row, row_dot + row, head_dq, segments,
            column_segments, column, begin + COLUMNS, end, T, scale, score_scale,
            HAS_SEGMENTS, False, HEADS, K, V, SIMILARITY, POWER, PAIR, SCORE_PRECISION, PRECISION, ROWS, BLOCK_K,
            BLOCK_V, STAGES,
        )  # fmt: skip
    store_tile(head_base(dk, batch, u_head, T, U_HEADS, K), begin, T, dkeys * scale, U_HEADS * K, K, COLUMNS, BLOCK_K)
    store_tile(head_base(du, batch, u_head, T, U_HEADS, V), begin, T, dvalues, U_HEADS * V, V, COLUMNS, BLOCK_V)
