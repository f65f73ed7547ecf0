"""The write, u_t = α_t v_t − β_t Σ_{i<t} κ(w_t, k_i) u_i: one kernel for all blocks of rows of all heads.

A block streams the earlier columns as flash attention does, following its head's earlier blocks as they get ready
(order.py). While the last of them is still at work it goes through that block's and its own scores, which need no u:
the softmax sums are complete, and its own triangular system is inverted. What then remains between one block and the
next is the last block's share of the sums and a product with the inverse; or two, a half of the block each, to whose
lower half the upper one is one more earlier block. With PAIR (products.py) the inverses come from invert_blocks.py.

TIED: one softmax writes and reads (w = q). With the write's sums over i < t the same pass gives

    s_t = Σ_{i<t} P_ti u_i,    o_t = (1 − π_t) s_t + π_t u_t,    π_t = e^{s_tt} / (e^{s_tt} + Σ_{i<t} e^{s_ti})

where π and 1 − π are two sigmoids, each computed by itself: neither cancels, whatever dominates the row.
"""

import triton
import triton.language as tl

from pallas_kernels.triton.delta.invert_blocks import load_inverse, own_inverse
from pallas_kernels.triton.delta.order import done_blocks, draw, publish, unknown_zero, wait_for
from pallas_kernels.triton.delta.solve import row_halves
from pallas_kernels.triton.delta.weights import LOWEST, absorb, log_sum, weights_again
from pallas_kernels.triton.memory import (
    head_base,
    load_columns,
    load_row,
    load_tile,
    padded,
    store_columns,
    store_row,
    store_tile,
)
from pallas_kernels.triton.products import add_product, parts, product_of_parts


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
    rows, k, u, residue, start, stop, row_segments, segments, T, scale, highest, total, weighted,
    HAS_SEGMENTS: tl.constexpr, K_STRIDE: tl.constexpr, K: tl.constexpr, U_STRIDE: tl.constexpr, V: tl.constexpr,
    COLUMNS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, SIMILARITY: tl.constexpr,
    POWER: tl.constexpr, PAIR: tl.constexpr, SCORE_PRECISION: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The running sums Σ κ u over columns start … stop, all of them before T and before the rows."""
    for columns in tl.range(start, stop, COLUMNS):
        weights, highest, total, shrink = score_tile(
            rows, k, columns, row_segments, segments, T, scale, highest, total, 0,
            HAS_SEGMENTS, False, True, K_STRIDE, K, COLUMNS, BLOCK_K, SIMILARITY, POWER, SCORE_PRECISION,
        )  # fmt: skip
        values = load_tile(u, columns, T, U_STRIDE, V, COLUMNS, BLOCK_V, True)
        low = values
        if PAIR:
            low = load_tile(residue, columns, T, U_STRIDE, V, COLUMNS, BLOCK_V, True)
        if SIMILARITY == "softmax":
            weighted *= shrink[:, None]
        weighted = add_product(weights, values, low, weighted, PAIR, PRECISION)
    return highest, total, weighted


@triton.jit
def known_rows(
    rows, k, u, residue, start, stop, row_segments, segments, T, scale, log_total, past,
    HAS_SEGMENTS: tl.constexpr, K_STRIDE: tl.constexpr, K: tl.constexpr, U_STRIDE: tl.constexpr, V: tl.constexpr,
    COLUMNS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, SIMILARITY: tl.constexpr,
    POWER: tl.constexpr, PAIR: tl.constexpr, SCORE_PRECISION: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`stream` where the rows' sums are known: `past` with Σ P u over columns start … stop."""
    for columns in tl.range(start, stop, COLUMNS, num_stages=1):
        keys = load_tile(k, columns, T, K_STRIDE, K, COLUMNS, BLOCK_K, False)
        scores = tl.dot(rows, tl.trans(keys), input_precision=SCORE_PRECISION) * scale
        visible = columns
        if HAS_SEGMENTS:
            visible = row_segments[:, None] == load_row(segments, columns, T, COLUMNS)[None, :]
        weights = weights_again(scores, visible, log_total[:, None], SIMILARITY, POWER, HAS_SEGMENTS)
        values = load_tile(u, columns, T, U_STRIDE, V, COLUMNS, BLOCK_V, False)
        low = values
        if PAIR:
            low = load_tile(residue, columns, T, U_STRIDE, V, COLUMNS, BLOCK_V, False)
        past = add_product(weights, values, low, past, PAIR, PRECISION)
    return past


@triton.jit
def solve_target(
    inverse, past, n, start, T, v, alpha, beta,
    HAS_ALPHA: tl.constexpr, HAS_BETA: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, V: tl.constexpr,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """u of some rows, whose `inverse` it is: the system's right-hand side is α v − β past."""
    row = tl.cast(n, tl.int64) * T
    v = head_base(v, n // HEADS, n % HEADS // (HEADS // KV_HEADS), T, KV_HEADS, V)
    if HAS_BETA:
        past *= load_row(beta + row, start, T, ROWS)[:, None]
    target = load_tile(v, start, T, KV_HEADS * V, V, ROWS, BLOCK_V, False).to(tl.float32)
    if HAS_ALPHA:
        target *= load_row(alpha + row, start, T, ROWS)[:, None]
    return tl.dot(inverse, target - past, input_precision=PRECISION)


@triton.jit
def solve_parts(
    inverse, inverse_low, past, n, start, T, v, alpha, beta, operand, residue,
    HAS_ALPHA: tl.constexpr, HAS_BETA: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, V: tl.constexpr,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """`solve_target` with the inverses in memory, of the rows whose sums lie in the array `past`; u is stored in two
    parts. Some columns of the width at a time, so that parts and products have place in registers."""
    batch, head = n // HEADS, n % HEADS
    row = tl.cast(n, tl.int64) * T
    v = head_base(v, batch, head // (HEADS // KV_HEADS), T, KV_HEADS, V)
    past = head_base(past, batch, head, T, HEADS, V)
    inverse = load_inverse(inverse, n, start, T, ROWS)
    inverse_low = load_inverse(inverse_low, n, start, T, ROWS)
    operand = head_base(operand, batch, head, T, HEADS, V)
    residue = head_base(residue, batch, head, T, HEADS, V)
    WIDTH: tl.constexpr = min(BLOCK_V, 32)
    for column in tl.range(0, BLOCK_V, WIDTH, num_stages=1):
        known = load_columns(past, start, T, column, HEADS * V, V, ROWS, WIDTH)
        if HAS_BETA:
            known *= load_row(beta + row, start, T, ROWS)[:, None]
        target = load_columns(v, start, T, column, KV_HEADS * V, V, ROWS, WIDTH).to(tl.float32)
        if HAS_ALPHA:
            target *= load_row(alpha + row, start, T, ROWS)[:, None]
        high, low = parts(target - known)
        high, low = parts(product_of_parts(inverse, inverse_low, high, low, True, PRECISION))
        store_columns(operand, start, T, column, high, HEADS * V, V, ROWS, WIDTH)
        store_columns(residue, start, T, column, low, HEADS * V, V, ROWS, WIDTH)


@triton.jit
def summarise(
    past, seen, n, start, w, k, u, source, residue, lse, segments, T, scale, summary, out, share, rest,
    TIED: tl.constexpr, HAS_SEGMENTS: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    SIMILARITY: tl.constexpr, POWER: tl.constexpr, PAIR: tl.constexpr, SCORE_PRECISION: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """s of the ROWS rows at `start`, given `past`, their sums over the columns before; and o, if TIED. `seen`: more
    than 0 where there are such columns or own ones. u of the rows has just been stored."""
    batch, head = n // HEADS, n % HEADS
    row = tl.cast(n, tl.int64) * T
    w = head_base(w, batch, head, T, HEADS, K)
    k = head_base(k, batch, head // (HEADS // KV_HEADS), T, KV_HEADS, K)
    rows = load_tile(w, start, T, HEADS * K, K, ROWS, BLOCK_K, False)
    keys = load_tile(k, start, T, KV_HEADS * K, K, ROWS, BLOCK_K, False)
    scores = tl.dot(rows, tl.trans(keys), input_precision=SCORE_PRECISION) * scale
    index = tl.arange(0, ROWS)
    visible = index[:, None] > index[None, :]
    if HAS_SEGMENTS:
        segments += tl.cast(batch, tl.int64) * T
        visible &= load_row(segments, start, T, ROWS)[:, None] == load_row(segments, start, T, ROWS)[None, :]
    log_total = seen
    if SIMILARITY == "softmax":
        log_total = load_row(lse + padded(n, T), start, T, ROWS)
    if TIED:
        excess = tl.sum(tl.where(index[:, None] == index[None, :], scores, 0.0), 1) - log_total
        # Without a past all of the row's weight is its own.
        own_share = tl.where(seen > 0, 1.0 / (1.0 + tl.exp2(tl.where(seen > 0, -excess, 0.0))), 1.0)
        past_share = tl.where(seen > 0, 1.0 / (1.0 + tl.exp2(tl.where(seen > 0, excess, 0.0))), 0.0)
        store_row(share + row, start, T, own_share, ROWS)
        store_row(rest + row, start, T, past_share, ROWS)
    weights = weights_again(scores, visible, log_total[:, None], SIMILARITY, POWER, True)
    source = head_base(source, batch, head, T, HEADS, V)
    values = load_tile(source, start, T, HEADS * V, V, ROWS, BLOCK_V, False)
    low = values
    if PAIR:
        residue = head_base(residue, batch, head, T, HEADS, V)
        low = load_tile(residue, start, T, HEADS * V, V, ROWS, BLOCK_V, False)
    past = add_product(weights, values, low, past, PAIR, PRECISION)
    store_tile(head_base(summary, batch, head, T, HEADS, V), start, T, past, HEADS * V, V, ROWS, BLOCK_V)
    if TIED:
        values = load_tile(head_base(u, batch, head, T, HEADS, V), start, T, HEADS * V, V, ROWS, BLOCK_V, False)
        read = past_share[:, None] * past + own_share[:, None] * values
        store_tile(head_base(out, batch, head, T, HEADS, V), start, T, read, HEADS * V, V, ROWS, BLOCK_V)


@triton.jit
def write_forward(
    w, k, v, alpha, beta, segments, first, inverse, inverse_low, T, scale,
    u, operand, residue, lse, counters, summary, out, share, rest,
    B: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    HAS_ALPHA: tl.constexpr, HAS_BETA: tl.constexpr, HAS_SEGMENTS: tl.constexpr, NARROW: tl.constexpr,
    PAIR: tl.constexpr, SUMMARY: tl.constexpr, TIED: tl.constexpr, SIMILARITY: tl.constexpr, POWER: tl.constexpr,
    SCORE_PRECISION: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    HALVES: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """w [B,T,HEADS,K], k [B,T,KV_HEADS,K], v [B,T,KV_HEADS,V], alpha, beta [B,HEADS,T], segments [B,T],
    first [B,blocks]: the first column that a block's first row sees; PAIR: inverse, inverse_low: invert_blocks.py's of
    ROWS / HALVES rows ->
    u [B,T,HEADS,V] float32, but with PAIR what the rows' sums were; u as products take it: operand, of the arrays'
    dtype with NARROW, or with PAIR the high part and in residue the low one; lse [B,HEADS,padded T], base 2, zeroed;
    SUMMARY: s [B,T,HEADS,V]; TIED: out [B,T,HEADS,V], share, rest [B,HEADS,T]. `scale` has log2(e) in it for
    softmax."""
    blocks = tl.cdiv(T, ROWS)
    n, block = draw(counters, B * HEADS, GROUP, blocks)
    counter = counters + 1 + n
    batch, head = n // HEADS, n % HEADS
    source = u
    if NARROW or PAIR:
        source = operand
    head_k = head_base(k, batch, head // (HEADS // KV_HEADS), T, KV_HEADS, K)
    head_source = head_base(source, batch, head, T, HEADS, V)
    head_residue = head_source
    if PAIR:
        head_residue = head_base(residue, batch, head, T, HEADS, V)
    start = block * ROWS
    rows = load_tile(head_base(w, batch, head, T, HEADS, K), start, T, HEADS * K, K, ROWS, BLOCK_K, False)
    earliest = 0
    row_segments = start
    head_segments = segments
    if HAS_SEGMENTS:
        earliest = tl.load(first + batch * blocks + block) // COLUMNS * COLUMNS
        head_segments = segments + tl.cast(batch, tl.int64) * T
        row_segments = load_row(head_segments, start, T, ROWS)
    highest = tl.full([ROWS], LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    weighted = tl.zeros([ROWS, BLOCK_V], tl.float32)

    # All but the last of the earlier blocks, as they get ready.
    last_start = tl.maximum(start - ROWS, earliest)
    columns = earliest
    while columns < last_start:
        ready = tl.minimum(done_blocks(counter) * ROWS, last_start)
        highest, total, weighted = stream(
            rows, head_k, head_source, head_residue, columns, ready, row_segments, head_segments, T, scale, highest,
            total, weighted,
            HAS_SEGMENTS, KV_HEADS * K, K, HEADS * V, V, COLUMNS, BLOCK_K, BLOCK_V, SIMILARITY, POWER, PAIR,
            SCORE_PRECISION, PRECISION,
        )  # fmt: skip
        columns = tl.maximum(columns, ready)

    # Put away: until they are needed again their registers are. u's place is free until it is known.
    zero = unknown_zero(counter)
    n += zero
    start += zero
    head_u = head_base(u, n // HEADS, n % HEADS, T, HEADS, V)
    store_tile(head_u, start, T, weighted, HEADS * V, V, ROWS, BLOCK_V)
    # The softmax sums need no u: complete them, and invert, before the last block is ready.
    log_total = total
    before = highest
    if SIMILARITY == "softmax":
        head_k = head_base(k, n // HEADS, n % HEADS // (HEADS // KV_HEADS), T, KV_HEADS, K)
        if HAS_SEGMENTS:
            head_segments = segments + tl.cast(n // HEADS, tl.int64) * T
            row_segments = load_row(head_segments, start, T, ROWS)
        # The first row of all in its block sees no column before, the last one those of its own block.
        for columns in tl.range(last_start, start + ROWS, COLUMNS, num_stages=1):
            strict = (start + tl.arange(0, ROWS))[:, None] > (columns + tl.arange(0, COLUMNS))[None, :]
            _weights, highest, total, _shrink = score_tile(
                rows, head_k, columns, row_segments, head_segments, T, scale, highest, total, strict,
                HAS_SEGMENTS, True, False, KV_HEADS * K, K, COLUMNS, BLOCK_K, SIMILARITY, POWER, SCORE_PRECISION,
            )  # fmt: skip
        log_total = log_sum(highest, total)
        store_row(lse + padded(n, T), start, T, log_total, ROWS)
    tl.debug_barrier()
    HALF: tl.constexpr = ROWS // HALVES
    if not PAIR:
        upper = own_inverse(
            n, start, w, k, beta, lse, segments, T, scale, HAS_BETA, HAS_SEGMENTS, HEADS, KV_HEADS, K, HALF, BLOCK_K,
            SIMILARITY, POWER, SCORE_PRECISION, PRECISION,
        )  # fmt: skip
        if HALVES == 2:
            lower = own_inverse(
                n, start + HALF, w, k, beta, lse, segments, T, scale, HAS_BETA, HAS_SEGMENTS, HEADS, KV_HEADS, K, HALF,
                BLOCK_K, SIMILARITY, POWER, SCORE_PRECISION, PRECISION,
            )  # fmt: skip

    zero = unknown_zero(counter)
    n += zero
    start += zero
    head_u = head_base(u, n // HEADS, n % HEADS, T, HEADS, V)
    past = load_tile(head_u, start, T, HEADS * V, V, ROWS, BLOCK_V, False)
    if SIMILARITY == "softmax":
        past *= tl.exp2(before - log_total)[:, None]
    wait_for(counter, start // ROWS)
    head_k = head_base(k, n // HEADS, n % HEADS // (HEADS // KV_HEADS), T, KV_HEADS, K)
    head_source = head_base(source, n // HEADS, n % HEADS, T, HEADS, V)
    head_residue = head_source
    if PAIR:
        head_residue = head_base(residue, n // HEADS, n % HEADS, T, HEADS, V)
    if HAS_SEGMENTS:
        head_segments = segments + tl.cast(n // HEADS, tl.int64) * T
        row_segments = load_row(head_segments, start, T, ROWS)
    # Narrower tiles: of three operands none waits in registers.
    NEAR: tl.constexpr = min(COLUMNS, 32) if PAIR else COLUMNS
    past = known_rows(
        rows, head_k, head_source, head_residue, last_start, start, row_segments, head_segments, T, scale, log_total,
        past,
        HAS_SEGMENTS, KV_HEADS * K, K, HEADS * V, V, NEAR, BLOCK_K, BLOCK_V, SIMILARITY, POWER, PAIR,
        SCORE_PRECISION, PRECISION,
    )  # fmt: skip
    store_tile(head_u, start, T, past, HEADS * V, V, ROWS, BLOCK_V)
    tl.debug_barrier()
    zero = unknown_zero(counter)
    n += zero
    start += zero
    head_u = head_base(u, n // HEADS, n % HEADS, T, HEADS, V)
    head_operand = operand
    if PAIR:
        solve_parts(
            inverse, inverse_low, u, n, start, T, v, alpha, beta, operand, residue,
            HAS_ALPHA, HAS_BETA, HEADS, KV_HEADS, V, PRECISION, HALF, BLOCK_V,
        )  # fmt: skip
    else:
        past = load_tile(head_u, start, T, HEADS * V, V, HALF, BLOCK_V, False)
        solved = solve_target(
            upper, past, n, start, T, v, alpha, beta,
            HAS_ALPHA, HAS_BETA, HEADS, KV_HEADS, V, PRECISION, HALF, BLOCK_V,
        )  # fmt: skip
        if SUMMARY:
            # Out of the place where u goes now.
            past = load_tile(head_u, start, T, HEADS * V, V, HALF, BLOCK_V, False)
            tl.debug_barrier()
        store_tile(head_u, start, T, solved, HEADS * V, V, HALF, BLOCK_V)
        if NARROW:
            head_operand = head_base(operand, n // HEADS, n % HEADS, T, HEADS, V)
            store_tile(head_operand, start, T, solved, HEADS * V, V, HALF, BLOCK_V)
    if HALVES == 2:
        tl.debug_barrier()
        half_rows = head_base(w, n // HEADS, n % HEADS, T, HEADS, K)
        half_rows = load_tile(half_rows, start + HALF, T, HEADS * K, K, HALF, BLOCK_K, False)
        half_segments = start
        if HAS_SEGMENTS:
            half_segments = load_row(head_segments, start + HALF, T, HALF)
        half_total = tl.zeros([HALF], tl.float32)
        if SIMILARITY == "softmax":
            half_total = load_row(lse + padded(n, T), start + HALF, T, HALF)
        lower_past = load_tile(head_u, start + HALF, T, HEADS * V, V, HALF, BLOCK_V, False)
        lower_past = known_rows(
            half_rows, head_k, head_source, head_residue, start, start + HALF, half_segments, head_segments, T, scale,
            half_total, lower_past,
            HAS_SEGMENTS, KV_HEADS * K, K, HEADS * V, V, HALF, BLOCK_K, BLOCK_V, SIMILARITY, POWER, PAIR,
            SCORE_PRECISION, PRECISION,
        )  # fmt: skip
        if PAIR:
            store_tile(head_u, start + HALF, T, lower_past, HEADS * V, V, HALF, BLOCK_V)
            tl.debug_barrier()
            solve_parts(
                inverse, inverse_low, u, n, start + HALF, T, v, alpha, beta, operand, residue,
                HAS_ALPHA, HAS_BETA, HEADS, KV_HEADS, V, PRECISION, HALF, BLOCK_V,
            )  # fmt: skip
        else:
            solved = solve_target(
                lower, lower_past, n, start + HALF, T, v, alpha, beta,
                HAS_ALPHA, HAS_BETA, HEADS, KV_HEADS, V, PRECISION, HALF, BLOCK_V,
            )  # fmt: skip
            store_tile(head_u, start + HALF, T, solved, HEADS * V, V, HALF, BLOCK_V)
            if NARROW:
                store_tile(head_operand, start + HALF, T, solved, HEADS * V, V, HALF, BLOCK_V)
    publish(counter, start // ROWS + 1)
    zero = unknown_zero(counter)
    n += zero
    start += zero

    if SUMMARY:
        if PAIR:
            # It still lies there: u has places of its own.
            head_u = head_base(u, n // HEADS, n % HEADS, T, HEADS, V)
            past = load_tile(head_u, start, T, HEADS * V, V, HALF, BLOCK_V, False)
        upper_seen, lower_seen = total, total
        if HALVES == 2:
            upper_seen, lower_seen = row_halves(total, ROWS)
        summarise(
            past, upper_seen, n, start, w, k, u, source, residue, lse, segments, T, scale, summary, out, share,
            rest,
            TIED, HAS_SEGMENTS, HEADS, KV_HEADS, K, V, HALF, BLOCK_K, BLOCK_V, SIMILARITY, POWER, PAIR,
            SCORE_PRECISION, PRECISION,
        )  # fmt: skip
        if HALVES == 2:
            summarise(
                lower_past, lower_seen, n, start + HALF, w, k, u, source, residue, lse, segments, T, scale, summary,
                out, share, rest,
                TIED, HAS_SEGMENTS, HEADS, KV_HEADS, K, V, HALF, BLOCK_K, BLOCK_V, SIMILARITY, POWER, PAIR,
                SCORE_PRECISION, PRECISION,
            )  # fmt: skip
