"""u of rows whose sums over the earlier columns are known: the inverse of their triangular system times α v − β past."""

from typing import NamedTuple

import triton
import triton.language as tl

from pallas_kernels.triton.delta.invert_blocks import load_inverse
from pallas_kernels.triton.delta.read_forward import Columns, Rows, load_u
from pallas_kernels.triton.delta.similarity import weights_again
from pallas_kernels.triton.delta.split_products import add_product, parts, product_of_parts
from pallas_kernels.triton.memory import (
    head_of,
    load_part,
    load_row,
    load_rows,
    load_segments,
    padded,
    store_part,
    store_rows,
)


class WriteArrays(NamedTuple):
    """What `write_forward` takes and gives: pointers to whole arrays, T, and what products of w and k are multiplied by.
    Where products take u itself, `operand` is u."""

    w: tl.tensor
    k: tl.tensor
    v: tl.tensor
    alpha: tl.tensor
    beta: tl.tensor
    segments: tl.tensor
    inverse: tl.tensor
    inverse_low: tl.tensor
    T: tl.tensor
    scale: tl.tensor
    u: tl.tensor
    operand: tl.tensor
    residue: tl.tensor
    lse: tl.tensor
    summary: tl.tensor
    out: tl.tensor
    own_share: tl.tensor
    past_share: tl.tensor


@triton.jit
def columns_of(arrays, n, SHAPE: tl.constexpr, WEIGHTING: tl.constexpr, HAS: tl.constexpr):
    """What the rows of head n look at."""
    KEYS: tl.constexpr = SHAPE.keys
    U: tl.constexpr = SHAPE.u
    k = head_of(arrays.k, n, arrays.T, SHAPE.heads, KEYS)
    u = head_of(arrays.operand, n, arrays.T, SHAPE.heads, U)
    residue = u
    if WEIGHTING.pair:
        residue = head_of(arrays.residue, n, arrays.T, SHAPE.heads, U)
    segments = arrays.segments
    if HAS.segments:
        segments += tl.cast(n // SHAPE.heads, tl.int64) * arrays.T
    return Columns(k, u, residue, segments, arrays.T, arrays.scale)


@triton.jit
def rows_of(tile, columns, start, HAS: tl.constexpr, ROWS: tl.constexpr):
    """The rows at `start`, whose tile of w it is."""
    return Rows(tile, load_segments(columns.segments, start, columns.T, HAS.segments, ROWS))


@triton.jit
def add_columns_to_known(
    past,
    rows,
    log_total,
    columns,
    begin,
    end,
    SHAPE: tl.constexpr,
    WEIGHTING: tl.constexpr,
    HAS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """`add_earlier_columns` to rows whose `log_total` is known: `past` with Σ P u over columns begin … end."""
    KEYS: tl.constexpr = SHAPE.keys
    for start in tl.range(begin, end, COLUMNS, num_stages=1):
        keys = load_rows(columns.k, start, columns.T, KEYS, COLUMNS)
        scores = tl.dot(rows.tile, tl.trans(keys), input_precision=WEIGHTING.score_precision) * columns.scale
        visible = start
        if HAS.segments:
            visible = rows.segments[:, None] == load_row(columns.segments, start, columns.T, COLUMNS)[None, :]
        weights = weights_again(scores, visible, log_total[:, None], WEIGHTING, HAS.segments)
        high, low = load_u(columns, start, SHAPE, WEIGHTING, COLUMNS)
        past = add_product(weights, high, low, past, WEIGHTING)
    return past


@triton.jit
def apply_inverse(
    inverse,
    past,
    arrays,
    n,
    start,
    SHAPE: tl.constexpr,
    WEIGHTING: tl.constexpr,
    HAS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """u of some rows, whose `inverse` and sums it takes."""
    VALUES: tl.constexpr = SHAPE.values
    T = arrays.T
    row = tl.cast(n, tl.int64) * T
    v = head_of(arrays.v, n, T, SHAPE.heads, VALUES)
    if HAS.beta:
        past *= load_row(arrays.beta + row, start, T, ROWS)[:, None]
    target = load_rows(v, start, T, VALUES, ROWS).to(tl.float32)
    if HAS.alpha:
        target *= load_row(arrays.alpha + row, start, T, ROWS)[:, None]
    return tl.dot(inverse, target - past, input_precision=WEIGHTING.precision)


@triton.jit
def write_rows_in_parts(
    arrays, n, start, SHAPE: tl.constexpr, WEIGHTING: tl.constexpr, HAS: tl.constexpr, ROWS: tl.constexpr
):
    """`write_rows` with the inverses in memory and u in two parts. Some columns of the width at a time, so that parts and
    products have place in registers."""
    VALUES: tl.constexpr = SHAPE.values
    U: tl.constexpr = SHAPE.u
    T = arrays.T
    row = tl.cast(n, tl.int64) * T
    v = head_of(arrays.v, n, T, SHAPE.heads, VALUES)
    past = head_of(arrays.u, n, T, SHAPE.heads, U)
    inverse = load_inverse(arrays.inverse, n, start, T, ROWS)
    inverse_low = load_inverse(arrays.inverse_low, n, start, T, ROWS)
    operand = head_of(arrays.operand, n, T, SHAPE.heads, U)
    residue = head_of(arrays.residue, n, T, SHAPE.heads, U)
    WIDTH: tl.constexpr = min(U.block, 32)
    for column in tl.range(0, U.block, WIDTH, num_stages=1):
        known = load_part(past, start, T, column, U, ROWS, WIDTH)
        if HAS.beta:
            known *= load_row(arrays.beta + row, start, T, ROWS)[:, None]
        target = load_part(v, start, T, column, VALUES, ROWS, WIDTH).to(tl.float32)
        if HAS.alpha:
            target *= load_row(arrays.alpha + row, start, T, ROWS)[:, None]
        high, low = parts(target - known)
        high, low = parts(product_of_parts(inverse, inverse_low, high, low, WEIGHTING))
        store_part(operand, start, T, column, high, U, ROWS, WIDTH)
        store_part(residue, start, T, column, low, U, ROWS, WIDTH)


@triton.jit
def store_u(arrays, n, start, tile, SHAPE: tl.constexpr, WEIGHTING: tl.constexpr, ROWS: tl.constexpr):
    """u of some rows, and as products take it."""
    U: tl.constexpr = SHAPE.u
    store_rows(head_of(arrays.u, n, arrays.T, SHAPE.heads, U), start, arrays.T, tile, U, ROWS)
    if WEIGHTING.narrow:
        store_rows(head_of(arrays.operand, n, arrays.T, SHAPE.heads, U), start, arrays.T, tile, U, ROWS)


@triton.jit
def write_rows(
    arrays,
    inverse,
    n,
    start,
    SHAPE: tl.constexpr,
    WEIGHTING: tl.constexpr,
    HAS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Stores u of the rows whose sums lie in its place, which it gives back; of no account where they stay there, u
    being of two parts."""
    U: tl.constexpr = SHAPE.u
    if WEIGHTING.pair:
        write_rows_in_parts(arrays, n, start, SHAPE, WEIGHTING, HAS, ROWS)
        return start
    else:
        head_u = head_of(arrays.u, n, arrays.T, SHAPE.heads, U)
        past = load_rows(head_u, start, arrays.T, U, ROWS)
        tile = apply_inverse(inverse, past, arrays, n, start, SHAPE, WEIGHTING, HAS, ROWS)
        if WEIGHTING.tied or HAS.beta:
            # Out of the place where u goes now.
            past = load_rows(head_u, start, arrays.T, U, ROWS)
            tl.debug_barrier()
        store_u(arrays, n, start, tile, SHAPE, WEIGHTING, ROWS)
        return past


@triton.jit
def write_lower_half(
    arrays,
    inverse,
    columns,
    n,
    start,
    SHAPE: tl.constexpr,
    WEIGHTING: tl.constexpr,
    HAS: tl.constexpr,
    HALF: tl.constexpr,
):
    """Stores u of the lower half of the block at `start`, whose upper half is written; gives its sums."""
    QUERIES: tl.constexpr = SHAPE.queries
    U: tl.constexpr = SHAPE.u
    T = arrays.T
    w = head_of(arrays.w, n, T, SHAPE.heads, QUERIES)
    tile = load_rows(w, start + HALF, T, QUERIES, HALF)
    rows = rows_of(tile, columns, start + HALF, HAS, HALF)
    log_total = tl.zeros([HALF], tl.float32)
    if WEIGHTING.softmax:
        log_total = load_row(arrays.lse + padded(n, T), start + HALF, T, HALF)
    head_u = head_of(arrays.u, n, T, SHAPE.heads, U)
    past = load_rows(head_u, start + HALF, T, U, HALF)
    past = add_columns_to_known(past, rows, log_total, columns, start, start + HALF, SHAPE, WEIGHTING, HAS, HALF)
    if WEIGHTING.pair:
        store_rows(head_u, start + HALF, T, past, U, HALF)
        tl.debug_barrier()
        write_rows_in_parts(arrays, n, start + HALF, SHAPE, WEIGHTING, HAS, HALF)
    else:
        tile = apply_inverse(inverse, past, arrays, n, start + HALF, SHAPE, WEIGHTING, HAS, HALF)
        store_u(arrays, n, start + HALF, tile, SHAPE, WEIGHTING, HALF)
    return past
