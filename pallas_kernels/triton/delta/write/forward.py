"""The write, u_t = α_t v_t − β_t Σ_{i<t} κ(w_t, k_i) u_i: one kernel for all blocks of rows of all heads.

One program computes u of one block of TILE.rows rows of one head. The block needs u of all earlier blocks of the head,
which other programs compute at the same time (order.py). To shorten the chain of waiting programs, a program does as
much as possible before the block just before its own is done:

1. It sums over the earlier columns, as flash attention does, following the earlier blocks as they become ready, up to
   the last one.
2. For softmax, it computes the scores of the last earlier block and of its own block, which need no u. This completes
   the softmax sums. Then it inverts its own triangular system. (For operands "pair" the inverses come from
   invert_blocks.py.)
3. It waits for the last earlier block, adds that block's part to the sums, and multiplies by the inverse. Only this
   step is sequential. With TILE.halves = 2, the upper half of the block is solved first, and is then one more earlier
   block for the lower half.

If tied (one softmax for write and read, w = q), the same pass also computes the read (summary.py).
"""

import triton
import triton.language as tl

from pallas_kernels.triton.delta.order import afresh, done_blocks, draw, publish, wait_for
from pallas_kernels.triton.delta.read_forward import absorb_columns, add_earlier_columns, no_sums
from pallas_kernels.triton.delta.similarity import log_sum
from pallas_kernels.triton.delta.write.invert_blocks import own_inverses
from pallas_kernels.triton.delta.write.summary import store_summaries
from pallas_kernels.triton.delta.write.u import (
    Given,
    Written,
    add_columns_to_known,
    columns_of,
    rows_of,
    write_lower_half,
    write_rows,
)
from pallas_kernels.triton.memory import head_of, load_rows, padded, store_row, store_rows


@triton.jit
def follow_earlier_blocks(rows, columns, begin, end, counter, FORM: tl.constexpr, TILE: tl.constexpr):
    """The running sums over the columns begin … end − 1. The function follows their blocks as they become ready."""
    OUT: tl.constexpr = FORM.out
    sums = no_sums(TILE.rows, OUT.block)
    while begin < end:
        ready = tl.minimum(done_blocks(counter) * TILE.rows, end)
        sums = add_earlier_columns(sums, rows, columns, begin, ready, FORM, TILE.columns)
        begin = tl.maximum(begin, ready)
    return sums


@triton.jit
def complete_softmax(highest, total, rows, columns, last_start, start, FORM: tl.constexpr, TILE: tl.constexpr):
    """The running maximum and normaliser after the columns of the last earlier block and of the rows' own block."""
    # The mask is strict: a row does not see its own column.
    for at in tl.range(last_start, start + TILE.rows, TILE.columns, num_stages=1):
        strict = (start + tl.arange(0, TILE.rows))[:, None] > (at + tl.arange(0, TILE.columns))[None, :]
        _weights, highest, total, _shrink = absorb_columns(
            rows, columns, at, highest, total, strict, FORM, TILE.columns, True, False
        )
    return highest, total


@triton.jit
def write_forward(
    w,
    k,
    v,
    alpha,
    beta,
    segments,
    first,
    inverse,
    inverse_low,
    T,
    scale,
    u,
    operand,
    residue,
    lse,
    counters,
    summary,
    out,
    own_share,
    past_share,
    B: tl.constexpr,
    FORM: tl.constexpr,
    TILE: tl.constexpr,
):
    """The write kernel. Grid: B × heads × ⌈T / TILE.rows⌉ programs, one per block of rows of a head (order.py).

    Reads w [B,T,heads,K], k [B,T,kv_heads,K], v [B,T,kv_heads,V], alpha, beta [B,heads,T], segments [B,T], first
    [B,blocks] (the first column that a block's first row sees), and, for operands "pair", inverse and inverse_low, the
    outputs of invert_blocks.py for blocks of TILE.rows / TILE.halves rows. `scale` includes log2(e) for softmax.
    Writes
    * u [B,T,heads,V] float32, if FORM.wide_u; otherwise this array is only scratch, for the sums of the rows;
    * u as products take it: operand, in the arrays' dtype for "narrow", or for "pair" the high part, with the low part
      in residue;
    * for softmax, lse [B,heads,padded T], the log-sum-exps in base 2, which starts at 0;
    * with β or if tied, summary, s [B,T,heads,V];
    * if tied, out [B,T,heads,V], own_share (π) and past_share (1 − π) [B,heads,T].
    `counters` starts at 0.
    """
    QUERIES: tl.constexpr = FORM.queries
    U: tl.constexpr = FORM.u
    ROWS: tl.constexpr = TILE.rows
    HALF: tl.constexpr = TILE.rows // TILE.halves
    blocks = tl.cdiv(T, ROWS)
    n, block = draw(counters, B * FORM.heads, TILE.group, blocks)
    counter = counters + 1 + n
    if FORM.exact:
        operand = u
    given = Given(w, k, v, alpha, beta, segments, inverse, inverse_low, T, scale)
    written = Written(u, operand, residue, lse, summary, out, own_share, past_share)

    # Step 1: all earlier blocks but the last, as they become ready.
    columns = columns_of(given, written, n, FORM)
    start = block * ROWS
    tile = load_rows(head_of(w, n, T, FORM.heads, QUERIES), start, T, QUERIES, ROWS)
    earliest = 0
    if FORM.has_segments:
        earliest = tl.load(first + n // FORM.heads * blocks + block) // TILE.columns * TILE.columns
    rows = rows_of(tile, columns, start, FORM, ROWS)
    last_start = tl.maximum(start - ROWS, earliest)
    sums = follow_earlier_blocks(rows, columns, earliest, last_start, counter, FORM, TILE)

    # Store the sums until they are needed again, to free their registers. They go where u will be stored later.
    n, start = afresh(n, start, counter)
    store_rows(head_of(u, n, T, FORM.heads, U), start, T, sums.weighted, U, ROWS)
    # Step 2: complete the softmax sums and invert, before the last earlier block is ready.
    total = sums.total
    log_total = total
    if FORM.softmax:
        columns = columns_of(given, written, n, FORM)
        rows = rows_of(tile, columns, start, FORM, ROWS)
        highest, total = complete_softmax(sums.highest, total, rows, columns, last_start, start, FORM, TILE)
        log_total = log_sum(highest, total)
        store_row(lse + padded(n, T), start, T, log_total, ROWS)
    tl.debug_barrier()
    upper, lower = own_inverses(given, lse, n, start, FORM, HALF, TILE.halves)

    # Step 3: wait for the last earlier block, and compute u.
    n, start = afresh(n, start, counter)
    past = load_rows(head_of(u, n, T, FORM.heads, U), start, T, U, ROWS)
    if FORM.softmax:
        past *= tl.exp2(sums.highest - log_total)[:, None]
    wait_for(counter, start // ROWS)
    columns = columns_of(given, written, n, FORM)
    rows = rows_of(tile, columns, start, FORM, ROWS)
    # For operands "pair" the tiles are narrower, because three operands would not fit in registers.
    NEAR: tl.constexpr = min(TILE.columns, 32) if FORM.pair else TILE.columns
    past = add_columns_to_known(past, rows, log_total, columns, last_start, start, FORM, NEAR)
    store_rows(head_of(u, n, T, FORM.heads, U), start, T, past, U, ROWS)
    tl.debug_barrier()

    n, start = afresh(n, start, counter)
    upper_past = write_rows(given, written, upper, n, start, FORM, HALF)
    lower_past = upper_past
    if TILE.halves == 2:
        tl.debug_barrier()
        lower_past = write_lower_half(given, written, lower, columns, n, start, FORM, HALF)
    publish(counter, start // ROWS + 1)

    n, start = afresh(n, start, counter)
    if FORM.has_summary:
        store_summaries(upper_past, lower_past, total, given, written, n, start, FORM, HALF, TILE.halves)
