"""The read, o_t = Σ_{i≤t} κ(q_t, k_i) u_i: flash attention (Dao et al., arXiv 2205.14135) with any similarity. The
write kernel uses the same running sums over tiles of columns.

Rows are queries, columns are keys. One program computes one block of TILE.rows rows of one query head. It keeps their
queries and running sums in registers, and loads keys and u from memory in tiles of TILE.columns columns.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from pallas_kernels.triton.delta.similarity import LOWEST, absorb, inverse_or_zero, log_sum
from pallas_kernels.triton.delta.split_products import add_product
from pallas_kernels.triton.memory import head_of, load_row, load_rows, load_segments, store_row, store_rows


class Rows(NamedTuple):
    """A block of rows: their tile of q or w [ROWS, K], and their segment ids [ROWS]."""

    tile: tl.tensor
    segments: tl.tensor


class Columns(NamedTuple):
    """The columns of a head: pointers to its keys, to its u (`residue`: the low part, for operands "pair") and to its
    segment ids; T; the factor that products of rows and keys are multiplied by."""

    k: tl.tensor
    u: tl.tensor
    residue: tl.tensor
    segments: tl.tensor
    T: tl.tensor
    scale: tl.tensor


class Sums(NamedTuple):
    """The running sums of each row: the highest score m; for softmax the normaliser Σ 2^(s − m); and Σ κ u, for softmax
    with the weights 2^(s − m)."""

    highest: tl.tensor
    total: tl.tensor
    weighted: tl.tensor


@triton.jit
def no_sums(ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """The running sums before the first tile of columns; BLOCK is the width of u."""
    highest = tl.full([ROWS], LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    return Sums(highest, total, tl.zeros([ROWS, BLOCK], tl.float32))


@triton.jit
def absorb_columns(
    rows,
    columns,
    start,
    highest,
    total,
    ordered,
    FORM: tl.constexpr,
    COLUMNS: tl.constexpr,
    ORDERED: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """`absorb` of the tile of columns at `start`.

    ORDERED: some columns do not lie before all rows, and the mask `ordered` says which are visible. WHOLE: all columns
    lie before T.
    """
    KEYS: tl.constexpr = FORM.keys
    keys = load_rows(columns.k, start, columns.T, KEYS, COLUMNS, WHOLE)
    scores = tl.dot(rows.tile, tl.trans(keys), input_precision=FORM.score_precision) * columns.scale
    visible = ordered
    if FORM.has_segments:
        same = rows.segments[:, None] == load_row(columns.segments, start, columns.T, COLUMNS)[None, :]
        if ORDERED:
            visible = ordered & same
        else:
            visible = same
    return absorb(scores, visible, highest, total, FORM, FORM.has_segments or ORDERED)


@triton.jit
def load_u(columns, start, FORM: tl.constexpr, COLUMNS: tl.constexpr, WHOLE: tl.constexpr = False):
    """(high, low): u of the tile of columns at `start`. `low` is unused unless operands are "pair"."""
    U: tl.constexpr = FORM.u
    high = load_rows(columns.u, start, columns.T, U, COLUMNS, WHOLE)
    low = high
    if FORM.pair:
        low = load_rows(columns.residue, start, columns.T, U, COLUMNS, WHOLE)
    return high, low


@triton.jit
def add_earlier_columns(sums, rows, columns, begin, end, FORM: tl.constexpr, COLUMNS: tl.constexpr):
    """The running sums after the columns begin … end − 1. All these columns lie before T and before the rows."""
    highest, total, weighted = sums
    for start in tl.range(begin, end, COLUMNS):
        weights, highest, total, shrink = absorb_columns(
            rows, columns, start, highest, total, 0, FORM, COLUMNS, False, True
        )
        high, low = load_u(columns, start, FORM, COLUMNS, True)
        if FORM.softmax:
            weighted *= shrink[:, None]
        weighted = add_product(weights, high, low, weighted, FORM)
    return Sums(highest, total, weighted)


@triton.jit
def add_own_columns(sums, rows, columns, begin, FORM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The running sums after the columns of the rows' own block, which begins at `begin`."""
    highest, total, weighted = sums
    for start in tl.range(begin, begin + ROWS, COLUMNS, num_stages=1):
        causal = (begin + tl.arange(0, ROWS))[:, None] >= (start + tl.arange(0, COLUMNS))[None, :]
        weights, highest, total, shrink = absorb_columns(
            rows, columns, start, highest, total, causal, FORM, COLUMNS, True, False
        )
        high, low = load_u(columns, start, FORM, COLUMNS)
        weighted = add_product(weights, high, low, weighted * shrink[:, None], FORM)
    return Sums(highest, total, weighted)


@triton.jit
def read_forward(q, k, u, residue, segments, first, T, scale, out, lse, FORM: tl.constexpr, TILE: tl.constexpr):
    """The read kernel. Grid: B × heads × ⌈T / TILE.rows⌉ programs, one per block of rows of a query head.

    Reads q [B,T,heads,K], k [B,T,kv_heads,K], u [B,T,u_heads,V] (for operands "pair" its high part, and in residue the
    low part), segments [B,T], first [B,blocks] (launches.first_columns). `scale` includes log2(e) for softmax.
    Writes out [B,T,heads,V] and, for softmax, lse [B,heads,T], the log-sum-exps in base 2.
    """
    QUERIES: tl.constexpr = FORM.queries
    KEYS: tl.constexpr = FORM.keys
    U: tl.constexpr = FORM.u
    OUT: tl.constexpr = FORM.out
    ROWS: tl.constexpr = TILE.rows
    COLUMNS: tl.constexpr = TILE.columns
    blocks = tl.cdiv(T, ROWS)
    n = tl.program_id(0) // blocks
    # The last blocks of a head have the most columns and start first. Neighbouring programs share keys and u in the
    # cache.
    block = blocks - 1 - tl.program_id(0) % blocks
    batch = n // FORM.heads
    k = head_of(k, n, T, FORM.heads, KEYS)
    u = head_of(u, n, T, FORM.heads, U)
    if FORM.pair:
        residue = head_of(residue, n, T, FORM.heads, U)
    start = block * ROWS
    tile = load_rows(head_of(q, n, T, FORM.heads, QUERIES), start, T, QUERIES, ROWS)
    earliest = 0
    if FORM.has_segments:
        segments += tl.cast(batch, tl.int64) * T
    rows = Rows(tile, load_segments(segments, start, T, FORM.has_segments, ROWS))
    if FORM.has_segments:
        earliest = tl.load(first + batch * blocks + block) // COLUMNS * COLUMNS
    columns = Columns(k, u, residue, segments, T, scale)
    sums = no_sums(ROWS, OUT.block)
    sums = add_earlier_columns(sums, rows, columns, earliest, start, FORM, COLUMNS)
    sums = add_own_columns(sums, rows, columns, start, FORM, ROWS, COLUMNS)
    weighted = sums.weighted
    if FORM.softmax:
        weighted *= inverse_or_zero(sums.total)[:, None]
        store_row(lse + tl.cast(n, tl.int64) * T, start, T, log_sum(sums.highest, sums.total), ROWS)
    store_rows(head_of(out, n, T, FORM.heads, OUT), start, T, weighted, OUT, ROWS)
