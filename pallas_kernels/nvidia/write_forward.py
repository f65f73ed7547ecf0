"""The write, u_t = α_t v_t − β_t Σ_{i<t} κ(w_t, k_i) u_i: one kernel for all blocks of rows of all heads.

A block streams the earlier columns as flash attention does, following its head's earlier blocks as they get ready
(order.py). While the last of them is still at work it goes through that block's and its own scores, which need no u:
the softmax sums are complete, and its own triangular system is inverted. What then remains between one block and the
next is two products and a substitution.

TIED: one softmax writes and reads (w = q). With the write's sums over i < t the same pass gives

    s_t = Σ_{i<t} P_ti u_i,    o_t = (1 − π_t) s_t + π_t u_t,    π_t = e^{s_tt} / (e^{s_tt} + Σ_{i<t} e^{s_ti})

where π and 1 − π are two sigmoids, each computed by itself: neither cancels, whatever dominates the row.
"""

import triton
import triton.language as tl

from pallas_kernels.nvidia.memory import head_base, load_row, load_tile, padded, store_row, store_tile
from pallas_kernels.nvidia.order import done_blocks, draw, publish, wait_for
from pallas_kernels.nvidia.solve import halves, invert, joined_rows, row_halves
from pallas_kernels.nvidia.weights import LOWEST, absorb, inverse_or_zero, log_sum, weights_again


@triton.jit
def score_tile(
    rows, k, columns, row_segments, segments, T, scale, highest, total, strict,
    HAS_SEGMENTS: tl.constexpr, STRICT: tl.constexpr, WHOLE: tl.constexpr, STRIDE: tl.constexpr, K: tl.constexpr,
    COLUMNS: tl.constexpr, BLOCK_K: tl.constexpr, SIMILARITY: tl.constexpr, POWER: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """`absorb` of one tile of columns."""
    keys = load_tile(k, columns, T, STRIDE, K, COLUMNS, BLOCK_K, WHOLE)
    scores = tl.dot(rows, tl.trans(keys), input_precision=PRECISION) * scale
    visible = strict
    if HAS_SEGMENTS:
        same = row_segments[:, None] == load_row(segments, columns, T, COLUMNS)[None, :]
        if STRICT:
            visible = strict & same
        else:
            visible = same
    return absorb(scores, visible, highest, total, SIMILARITY, POWER, HAS_SEGMENTS or STRICT)


@triton.jit
def stream(
    rows, k, u, start, stop, row_segments, segments, T, scale, highest, total, weighted,
    HAS_SEGMENTS: tl.constexpr, K_STRIDE: tl.constexpr, K: tl.constexpr, U_STRIDE: tl.constexpr, V: tl.constexpr,
    COLUMNS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, SIMILARITY: tl.constexpr,
    POWER: tl.constexpr, SCORE_PRECISION: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The running sums Σ κ u over columns start … stop, all of them before T and before the rows."""
    for columns in tl.range(start, stop, COLUMNS):
        weights, highest, total, shrink = score_tile(
            rows, k, columns, row_segments, segments, T, scale, highest, total, 0,
            HAS_SEGMENTS, False, True, K_STRIDE, K, COLUMNS, BLOCK_K, SIMILARITY, POWER, SCORE_PRECISION,
        )  # fmt: skip
        values = load_tile(u, columns, T, U_STRIDE, V, COLUMNS, BLOCK_V, True)
        if SIMILARITY == "softmax":
            weighted *= shrink[:, None]
        weighted = tl.dot(weights.to(values.dtype), values, weighted, input_precision=PRECISION)
    return highest, total, weighted


@triton.jit
def own_tile(
    w, k, start, columns, segments, T, scale, highest, total, strict,
    HAS_SEGMENTS: tl.constexpr, STRICT: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, K: tl.constexpr,
    HALF: tl.constexpr, BLOCK_K: tl.constexpr, SIMILARITY: tl.constexpr, POWER: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """`score_tile` of half a block of rows and half a block of its own columns."""
    rows = load_tile(w, start, T, HEADS * K, K, HALF, BLOCK_K, False)
    row_segments = start
    if HAS_SEGMENTS:
        row_segments = load_row(segments, start, T, HALF)
    return score_tile(
        rows, k, columns, row_segments, segments, T, scale, highest, total, strict,
        HAS_SEGMENTS, STRICT, False, KV_HEADS * K, K, HALF, BLOCK_K, SIMILARITY, POWER, PRECISION,
    )  # fmt: skip


@triton.jit
def row_factor(beta, start, T, total, HAS_BETA: tl.constexpr, SIMILARITY: tl.constexpr, ROWS: tl.constexpr):
    """What multiplies a row's weights: β over the softmax's normaliser."""
    factor = tl.full([ROWS], 1.0, tl.float32)
    if HAS_BETA:
        factor = load_row(beta, start, T, ROWS)
    if SIMILARITY == "softmax":
        factor *= inverse_or_zero(total)
    return factor


@triton.jit
def load_target(
    v, alpha, start, T,
    HAS_ALPHA: tl.constexpr, KV_HEADS: tl.constexpr, V: tl.constexpr, ROWS: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """α v in float32."""
    target = load_tile(v, start, T, KV_HEADS * V, V, ROWS, BLOCK_V, False).to(tl.float32)
    if HAS_ALPHA:
        target *= load_row(alpha, start, T, ROWS)[:, None]
    return target


@triton.jit
def summarise(
    w, k, u, source, begin, start, past, log_total, seen, segments, T, scale, summary, out, share, rest,
    TIED: tl.constexpr, HAS_SEGMENTS: tl.constexpr, TILES: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, HALF: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    SIMILARITY: tl.constexpr, POWER: tl.constexpr, SCORE_PRECISION: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """s of the HALF rows at `start`, given `past`, their sums over the columns before the block's `begin`; and o, if
    TIED.

    TILES: how many tiles of HALF columns lie between `begin` and the rows' end; u there has just been stored.
    """
    rows = load_tile(w, start, T, HEADS * K, K, HALF, BLOCK_K, False)
    row = start + tl.arange(0, HALF)
    own = tl.zeros([HALF], tl.float32)
    for tile in tl.range(0, TILES, num_stages=1):
        columns = begin + tile * HALF
        column = columns + tl.arange(0, HALF)
        keys = load_tile(k, columns, T, KV_HEADS * K, K, HALF, BLOCK_K, False)
        scores = tl.dot(rows, tl.trans(keys), input_precision=SCORE_PRECISION) * scale
        if TIED:
            own += tl.sum(tl.where(row[:, None] == column[None, :], scores, 0.0), 1)
        visible = row[:, None] > column[None, :]
        if HAS_SEGMENTS:
            same = load_row(segments, start, T, HALF)[:, None] == load_row(segments, columns, T, HALF)[None, :]
            visible = visible & same
        weights = weights_again(scores, visible, log_total[:, None], SIMILARITY, POWER, True)
        values = load_tile(source, columns, T, HEADS * V, V, HALF, BLOCK_V, False)
        past = tl.dot(weights.to(values.dtype), values, past, input_precision=PRECISION)
    store_tile(summary, start, T, past, HEADS * V, V, HALF, BLOCK_V)
    if TIED:
        excess = own - log_total
        # Without a past all of the row's weight is its own.
        own_share = tl.where(seen, 1.0 / (1.0 + tl.exp2(tl.where(seen, -excess, 0.0))), 1.0)
        past_share = tl.where(seen, 1.0 / (1.0 + tl.exp2(tl.where(seen, excess, 0.0))), 0.0)
        store_row(share, start, T, own_share, HALF)
        store_row(rest, start, T, past_share, HALF)
        values = load_tile(u, start, T, HEADS * V, V, HALF, BLOCK_V, False)
        read = past_share[:, None] * past + own_share[:, None] * values
        store_tile(out, start, T, read, HEADS * V, V, HALF, BLOCK_V)


@triton.jit
def write_forward(
    w, k, v, alpha, beta, segments, first, T, scale,
    u, operand, lse, counters, summary, out, share, rest,
    B: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    HAS_ALPHA: tl.constexpr, HAS_BETA: tl.constexpr, HAS_SEGMENTS: tl.constexpr, NARROW: tl.constexpr,
    COPY: tl.constexpr, SUMMARY: tl.constexpr, TIED: tl.constexpr, SIMILARITY: tl.constexpr, POWER: tl.constexpr,
    SCORE_PRECISION: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    HALVES: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """w [B,T,HEADS,K], k [B,T,KV_HEADS,K], v [B,T,KV_HEADS,V], alpha, beta [B,HEADS,T], segments [B,T],
    first [B,blocks]: the first column that a block's first row sees ->
    u [B,T,HEADS,V] float32; operand: u again, narrow (COPY: stored, NARROW: read again here); lse [B,HEADS,padded T],
    base 2, zeroed; SUMMARY: s [B,T,HEADS,V]; TIED: out [B,T,HEADS,V], share, rest [B,HEADS,T]. `scale` has log2(e) in
    it for softmax."""
    blocks = tl.cdiv(T, ROWS)
    n, block = draw(counters, B * HEADS, GROUP, blocks)
    batch, head = n // HEADS, n % HEADS
    row = tl.cast(n, tl.int64) * T
    lse += padded(n, T)
    k = head_base(k, batch, head // (HEADS // KV_HEADS), T, KV_HEADS, K)
    v = head_base(v, batch, head // (HEADS // KV_HEADS), T, KV_HEADS, V)
    u = head_base(u, batch, head, T, HEADS, V)
    if COPY:
        operand = head_base(operand, batch, head, T, HEADS, V)
    if NARROW:
        source = operand
    else:
        source = u
    start = block * ROWS
    rows = load_tile(head_base(w, batch, head, T, HEADS, K), start, T, HEADS * K, K, ROWS, BLOCK_K, False)
    earliest = 0
    row_segments = start
    if HAS_SEGMENTS:
        segments += tl.cast(batch, tl.int64) * T
        row_segments = load_row(segments, start, T, ROWS)
        earliest = tl.load(first + batch * blocks + block) // COLUMNS * COLUMNS
    highest = tl.full([ROWS], LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    weighted = tl.zeros([ROWS, BLOCK_V], tl.float32)

    # All but the last of the earlier blocks, as they get ready.
    last_start = tl.maximum(start - ROWS, earliest)
    columns = earliest
    while columns < last_start:
        ready = tl.minimum(done_blocks(counters + 1 + n) * ROWS, last_start)
        highest, total, weighted = stream(
            rows, k, source, columns, ready, row_segments, segments, T, scale, highest, total, weighted,
            HAS_SEGMENTS, KV_HEADS * K, K, HEADS * V, V, COLUMNS, BLOCK_K, BLOCK_V, SIMILARITY, POWER,
            SCORE_PRECISION, PRECISION,
        )  # fmt: skip
        columns = tl.maximum(columns, ready)

    # The softmax sums need no u: complete them, and invert, before the last block is ready.
    before = highest
    if SIMILARITY == "softmax":
        for columns in tl.range(last_start, start, COLUMNS, num_stages=1):
            weights, highest, total, shrink = score_tile(
                rows, k, columns, row_segments, segments, T, scale, highest, total, 0,
                HAS_SEGMENTS, False, True, KV_HEADS * K, K, COLUMNS, BLOCK_K, SIMILARITY, POWER, SCORE_PRECISION,
            )  # fmt: skip
    HALF: tl.constexpr = ROWS // HALVES
    w = head_base(w, batch, head, T, HEADS, K)
    strict = tl.arange(0, HALF)[:, None] > tl.arange(0, HALF)[None, :]
    if HALVES == 2:
        upper_highest, lower_highest = row_halves(highest, ROWS)
        upper_total, lower_total = row_halves(total, ROWS)
        below, lower_highest, lower_total, shrink = own_tile(
            w, k, start + HALF, start, segments, T, scale, lower_highest, lower_total, strict,
            HAS_SEGMENTS, False, HEADS, KV_HEADS, K, HALF, BLOCK_K, SIMILARITY, POWER, SCORE_PRECISION,
        )  # fmt: skip
        lower, lower_highest, lower_total, shrink = own_tile(
            w, k, start + HALF, start + HALF, segments, T, scale, lower_highest, lower_total, strict,
            HAS_SEGMENTS, True, HEADS, KV_HEADS, K, HALF, BLOCK_K, SIMILARITY, POWER, SCORE_PRECISION,
        )  # fmt: skip
        lower_factor = row_factor(beta + row, start + HALF, T, lower_total, HAS_BETA, SIMILARITY, HALF)
        below *= (shrink * lower_factor)[:, None]
        lower = invert(lower * lower_factor[:, None], HALF, PRECISION)
    else:
        upper_highest, upper_total = highest, total
    upper, upper_highest, upper_total, shrink = own_tile(
        w, k, start, start, segments, T, scale, upper_highest, upper_total, strict,
        HAS_SEGMENTS, True, HEADS, KV_HEADS, K, HALF, BLOCK_K, SIMILARITY, POWER, SCORE_PRECISION,
    )  # fmt: skip
    upper_factor = row_factor(beta + row, start, T, upper_total, HAS_BETA, SIMILARITY, HALF)
    upper = invert(upper * upper_factor[:, None], HALF, PRECISION)
    if SIMILARITY == "softmax":
        if HALVES == 2:
            highest = joined_rows(upper_highest, lower_highest, ROWS)
            store_row(lse, start + HALF, T, log_sum(lower_highest, lower_total), HALF)
        else:
            highest = upper_highest
        store_row(lse, start, T, log_sum(upper_highest, upper_total), HALF)
        weighted *= tl.exp2(before - highest)[:, None]

    wait_for(counters + 1 + n, block)
    for columns in tl.range(last_start, start, COLUMNS, num_stages=1):
        # These columns are in the sums already: of what comes back only the weights are new.
        weights, _same_highest, _twice, _shrink = score_tile(
            rows, k, columns, row_segments, segments, T, scale, highest, total, 0,
            HAS_SEGMENTS, False, True, KV_HEADS * K, K, COLUMNS, BLOCK_K, SIMILARITY, POWER, SCORE_PRECISION,
        )  # fmt: skip
        values = load_tile(source, columns, T, HEADS * V, V, COLUMNS, BLOCK_V, True)
        weighted = tl.dot(weights.to(values.dtype), values, weighted, input_precision=PRECISION)
    if HALVES == 2:
        upper_weighted, lower_weighted = halves(weighted, ROWS, BLOCK_V)
    else:
        upper_weighted = weighted
    target = load_target(v, alpha + row, start, T, HAS_ALPHA, KV_HEADS, V, HALF, BLOCK_V)
    target -= upper_factor[:, None] * upper_weighted
    upper_u = tl.dot(upper, target, input_precision=PRECISION)
    store_tile(u, start, T, upper_u, HEADS * V, V, HALF, BLOCK_V)
    if COPY:
        store_tile(operand, start, T, upper_u, HEADS * V, V, HALF, BLOCK_V)
    if HALVES == 2:
        target = load_target(v, alpha + row, start + HALF, T, HAS_ALPHA, KV_HEADS, V, HALF, BLOCK_V)
        target -= lower_factor[:, None] * lower_weighted + tl.dot(below, upper_u, input_precision=PRECISION)
        lower_u = tl.dot(lower, target, input_precision=PRECISION)
        store_tile(u, start + HALF, T, lower_u, HEADS * V, V, HALF, BLOCK_V)
        if COPY:
            store_tile(operand, start + HALF, T, lower_u, HEADS * V, V, HALF, BLOCK_V)
    publish(counters + 1 + n, block + 1)

    if SUMMARY:
        summary = head_base(summary, batch, head, T, HEADS, V)
        if TIED:
            out = head_base(out, batch, head, T, HEADS, V)
        if SIMILARITY == "softmax":
            upper_weighted *= inverse_or_zero(upper_total)[:, None]
        summarise(
            w, k, u, source, start, start, upper_weighted, log_sum(upper_highest, upper_total), upper_total > 0,
            segments, T, scale, summary, out, share + row, rest + row,
            TIED, HAS_SEGMENTS, 1, HEADS, KV_HEADS, K, V, HALF, BLOCK_K, BLOCK_V, SIMILARITY, POWER, SCORE_PRECISION,
            PRECISION,
        )  # fmt: skip
        if HALVES == 2:
            if SIMILARITY == "softmax":
                lower_weighted *= inverse_or_zero(lower_total)[:, None]
            summarise(
                w, k, u, source, start, start + HALF, lower_weighted, log_sum(lower_highest, lower_total),
                lower_total > 0, segments, T, scale, summary, out, share + row, rest + row,
                TIED, HAS_SEGMENTS, 2, HEADS, KV_HEADS, K, V, HALF, BLOCK_K, BLOCK_V, SIMILARITY, POWER,
                SCORE_PRECISION, PRECISION,
            )  # fmt: skip
