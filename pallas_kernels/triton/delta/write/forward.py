"""The write, u_t = α_t v_t − β_t Σ_{i<t} κ(w_t, k_i) u_i: one kernel for all blocks of rows of all heads.

A block adds up the earlier columns as flash attention does, following its head's earlier blocks as they get ready
(order.py). While the last of them is still at work it goes through that block's and its own scores, which need no u:
the softmax sums are complete, and its own triangular system is inverted. What then remains between one block and the
next is the last block's share of the sums and a product with the inverse; or two, a half of the block each, to whose
lower half the upper one is one more earlier block. Where u is kept in two parts (split_products.py) the inverses come
from invert_blocks.py.

Tied, one softmax writes and reads (w = q), in the same pass: u.py.
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
    """The running sums over the columns begin … end, as their blocks get ready."""
    OUT: tl.constexpr = FORM.out
    sums = no_sums(TILE.rows, OUT.block)
    while begin < end:
        ready = tl.minimum(done_blocks(counter) * TILE.rows, end)
        sums = add_earlier_columns(sums, rows, columns, begin, ready, FORM, TILE.columns)
        begin = tl.maximum(begin, ready)
    return sums


@triton.jit
def complete_softmax(highest, total, rows, columns, last_start, start, FORM: tl.constexpr, TILE: tl.constexpr):
    """`highest` and `total` with the columns of the last earlier block and of the rows' own."""
    # The first row of all in its block sees no column before, the last one those of its own block.
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
    """w [B,T,heads,K], k [B,T,kv_heads,K], v [B,T,kv_heads,V], alpha, beta [B,heads,T], segments [B,T],
    first [B,blocks]: the first column that a block's first row sees; inverse, inverse_low: invert_blocks.py's of
    TILE.rows / TILE.halves rows, where operands are pairs ->
    u [B,T,heads,V] float32, but with pairs what the rows' sums were; u as products take it: operand, of the arrays'
    dtype where that is narrow, or the high part of a pair and in residue the low one; lse [B,heads,padded T], base 2,
    zeroed; with β or tied: summary, s [B,T,heads,V]; tied: out [B,T,heads,V], own_share, past_share [B,heads,T].
    `scale` has log2(e) in it for softmax."""
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

    # All but the last of the earlier blocks, as they get ready.
    columns = columns_of(given, written, n, FORM)
    start = block * ROWS
    tile = load_rows(head_of(w, n, T, FORM.heads, QUERIES), start, T, QUERIES, ROWS)
    earliest = 0
    if FORM.has_segments:
        earliest = tl.load(first + n // FORM.heads * blocks + block) // TILE.columns * TILE.columns
    rows = rows_of(tile, columns, start, FORM, ROWS)
    last_start = tl.maximum(start - ROWS, earliest)
    sums = follow_earlier_blocks(rows, columns, earliest, last_start, counter, FORM, TILE)

    # Put away: until they are needed again their registers are. u's place is free until it is known.
    n, start = afresh(n, start, counter)
    store_rows(head_of(u, n, T, FORM.heads, U), start, T, sums.weighted, U, ROWS)
    # The softmax sums need no u: complete them, and invert, before the last block is ready.
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

    n, start = afresh(n, start, counter)
    past = load_rows(head_of(u, n, T, FORM.heads, U), start, T, U, ROWS)
    if FORM.softmax:
        past *= tl.exp2(sums.highest - log_total)[:, None]
    wait_for(counter, start // ROWS)
    columns = columns_of(given, written, n, FORM)
    rows = rows_of(tile, columns, start, FORM, ROWS)
    # Narrower tiles: of three operands none waits in registers.
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
