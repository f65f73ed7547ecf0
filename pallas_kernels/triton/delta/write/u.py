"""The last step of the write: u = (I + diag(β) A)⁻¹ (α v − β past) of rows whose sums over the earlier columns, `past`,
are known. A holds the weights inside the rows' own block.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from pallas_kernels.triton.delta.read_forward import Columns, Rows, load_u
from pallas_kernels.triton.delta.similarity import weights_again
from pallas_kernels.triton.delta.split_products import add_product, parts, product_of_parts
from pallas_kernels.triton.delta.write.invert_blocks import load_inverse
from pallas_kernels.triton.memory import (
    head_of,
    load_columns,
    load_row,
    load_rows,
    load_segments,
    padded,
    store_columns,
    store_rows,
)


class Given(NamedTuple):
    """The inputs of a write, forward and backward: pointers to whole arrays; T; the factor that products of w and k are
    multiplied by."""

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


class Written(NamedTuple):
    """Pointers to the whole arrays that a write fills. For operands "exact", `operand` is u."""

    u: tl.tensor
    operand: tl.tensor
    residue: tl.tensor
    lse: tl.tensor
    summary: tl.tensor
    out: tl.tensor
    own_share: tl.tensor
    past_share: tl.tensor


@triton.jit
def columns_of(given, written, n, FORM: tl.constexpr):
    """The Columns of head n."""
    KEYS: tl.constexpr = FORM.keys
    U: tl.constexpr = FORM.u
    k = head_of(given.k, n, given.T, FORM.heads, KEYS)
    u = head_of(written.operand, n, given.T, FORM.heads, U)
    residue = u
    if FORM.pair:
        residue = head_of(written.residue, n, given.T, FORM.heads, U)
    segments = given.segments
    if FORM.has_segments:
        segments += tl.cast(n // FORM.heads, tl.int64) * given.T
    return Columns(k, u, residue, segments, given.T, given.scale)


@triton.jit
def rows_of(tile, columns, start, FORM: tl.constexpr, ROWS: tl.constexpr):
    """The Rows at `start`; `tile` is their tile of w."""
    return Rows(tile, load_segments(columns.segments, start, columns.T, FORM.has_segments, ROWS))


@triton.jit
def add_columns_to_known(past, rows, log_total, columns, begin, end, FORM: tl.constexpr, COLUMNS: tl.constexpr):
    """`past` + Σ P u over the columns begin … end − 1, for rows whose log-sum-exp `log_total` is known already."""
    KEYS: tl.constexpr = FORM.keys
    for start in tl.range(begin, end, COLUMNS, num_stages=1):
        keys = load_rows(columns.k, start, columns.T, KEYS, COLUMNS)
        scores = tl.dot(rows.tile, tl.trans(keys), input_precision=FORM.score_precision) * columns.scale
        visible = start
        if FORM.has_segments:
            visible = rows.segments[:, None] == load_row(columns.segments, start, columns.T, COLUMNS)[None, :]
        weights = weights_again(scores, visible, log_total[:, None], FORM, FORM.has_segments)
        high, low = load_u(columns, start, FORM, COLUMNS)
        past = add_product(weights, high, low, past, FORM)
    return past


@triton.jit
def apply_inverse(inverse, past, given, n, start, FORM: tl.constexpr, ROWS: tl.constexpr):
    """u of the ROWS rows at `start`, given the inverse of their system and their sums `past`."""
    VALUES: tl.constexpr = FORM.values
    T = given.T
    row = tl.cast(n, tl.int64) * T
    v = head_of(given.v, n, T, FORM.heads, VALUES)
    if FORM.has_beta:
        past *= load_row(given.beta + row, start, T, ROWS)[:, None]
    target = load_rows(v, start, T, VALUES, ROWS).to(tl.float32)
    if FORM.has_alpha:
        target *= load_row(given.alpha + row, start, T, ROWS)[:, None]
    return tl.dot(inverse, target - past, input_precision=FORM.precision)


@triton.jit
def write_rows_in_parts(given, written, n, start, FORM: tl.constexpr, ROWS: tl.constexpr):
    """`write_rows` for operands "pair": the inverses are in memory, and u is stored in two parts. The sums `past` are
    in the array u. The loop takes at most 32 channels of V at a time, so that parts and products fit in registers."""
    VALUES: tl.constexpr = FORM.values
    U: tl.constexpr = FORM.u
    T = given.T
    row = tl.cast(n, tl.int64) * T
    v = head_of(given.v, n, T, FORM.heads, VALUES)
    past = head_of(written.u, n, T, FORM.heads, U)
    inverse = load_inverse(given.inverse, n, start, T, ROWS)
    inverse_low = load_inverse(given.inverse_low, n, start, T, ROWS)
    operand = head_of(written.operand, n, T, FORM.heads, U)
    residue = head_of(written.residue, n, T, FORM.heads, U)
    WIDTH: tl.constexpr = min(U.block, 32)
    for column in tl.range(0, U.block, WIDTH, num_stages=1):
        known = load_columns(past, start, T, column, U.stride, U.width, ROWS, WIDTH)
        if FORM.has_beta:
            known *= load_row(given.beta + row, start, T, ROWS)[:, None]
        target = load_columns(v, start, T, column, VALUES.stride, VALUES.width, ROWS, WIDTH).to(tl.float32)
        if FORM.has_alpha:
            target *= load_row(given.alpha + row, start, T, ROWS)[:, None]
        high, low = parts(target - known)
        high, low = parts(product_of_parts(inverse, inverse_low, high, low, FORM))
        store_columns(operand, start, T, column, high, U.stride, U.width, ROWS, WIDTH)
        store_columns(residue, start, T, column, low, U.stride, U.width, ROWS, WIDTH)


@triton.jit
def store_u(given, written, n, start, tile, FORM: tl.constexpr, ROWS: tl.constexpr):
    """Stores `tile`, u of the ROWS rows at `start`: in float32 if FORM.wide_u; for "narrow" as products take it."""
    U: tl.constexpr = FORM.u
    if FORM.wide_u:
        store_rows(head_of(written.u, n, given.T, FORM.heads, U), start, given.T, tile, U, ROWS)
    if FORM.narrow:
        store_rows(head_of(written.operand, n, given.T, FORM.heads, U), start, given.T, tile, U, ROWS)


@triton.jit
def write_rows(given, written, inverse, n, start, FORM: tl.constexpr, ROWS: tl.constexpr):
    """Computes and stores u of the ROWS rows at `start`. Their sums `past` are in the array u before.

    Returns `past`. For operands "pair", `past` stays in the array u, and the result is an unused number.
    """
    U: tl.constexpr = FORM.u
    if FORM.pair:
        write_rows_in_parts(given, written, n, start, FORM, ROWS)
        return start
    else:
        head_u = head_of(written.u, n, given.T, FORM.heads, U)
        past = load_rows(head_u, start, given.T, U, ROWS)
        tile = apply_inverse(inverse, past, given, n, start, FORM, ROWS)
        if FORM.has_summary:
            # The summary needs `past`, and `store_u` will overwrite it.
            past = load_rows(head_u, start, given.T, U, ROWS)
            tl.debug_barrier()
        store_u(given, written, n, start, tile, FORM, ROWS)
        return past


@triton.jit
def write_lower_half(given, written, inverse, columns, n, start, FORM: tl.constexpr, HALF: tl.constexpr):
    """Computes and stores u of the lower half of the block at `start`, after that of the upper half is stored. Returns
    the lower half's sums over all columns before it."""
    QUERIES: tl.constexpr = FORM.queries
    U: tl.constexpr = FORM.u
    T = given.T
    w = head_of(given.w, n, T, FORM.heads, QUERIES)
    tile = load_rows(w, start + HALF, T, QUERIES, HALF)
    rows = rows_of(tile, columns, start + HALF, FORM, HALF)
    log_total = tl.zeros([HALF], tl.float32)
    if FORM.softmax:
        log_total = load_row(written.lse + padded(n, T), start + HALF, T, HALF)
    head_u = head_of(written.u, n, T, FORM.heads, U)
    past = load_rows(head_u, start + HALF, T, U, HALF)
    past = add_columns_to_known(past, rows, log_total, columns, start, start + HALF, FORM, HALF)
    if FORM.pair:
        store_rows(head_u, start + HALF, T, past, U, HALF)
        tl.debug_barrier()
        write_rows_in_parts(given, written, n, start + HALF, FORM, HALF)
    else:
        tile = apply_inverse(inverse, past, given, n, start + HALF, FORM, HALF)
        store_u(given, written, n, start + HALF, tile, FORM, HALF)
    return past
