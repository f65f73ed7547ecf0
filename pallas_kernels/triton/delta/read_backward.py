"""The gradients of the read:

    dU = Pᵀ dO,    dS_ij = κ'(s_ij) (dO_i·u_j − D_i),    dQ = scale · dS K,    dK = scale · dSᵀ Q

D_i = dO_i·o_i for softmax, 0 otherwise. One program computes dK and dU of one block of TILE.columns columns of one head
of u. It keeps the block's keys, u, dK and dU on chip. It loops over tiles of TILE.rows rows, from the block's own rows
on, of all query heads that share the head of u. This takes five matrix products per pair of tiles. dQ is added to
memory tile by tile with atomics, by several programs at once, so that its last bits differ from run to run. Tiles of
scores are transposed: [columns, rows].
"""

from typing import NamedTuple

import triton
import triton.language as tl

from pallas_kernels.triton.delta.similarity import times_slope, weights_again
from pallas_kernels.triton.delta.split_products import (
    add_product_with_given,
    product_of_given,
    product_of_parts_with_given,
)
from pallas_kernels.triton.memory import head_base, head_of, load_row, load_rows, load_segments, store_rows


class OwnTiles(NamedTuple):
    """The tiles of a block of columns: k, u, and the low part of u (unused unless operands are "pair")."""

    k: tl.tensor
    u: tl.tensor
    low: tl.tensor


class Places(NamedTuple):
    """The indices of a block's columns, and their segment ids."""

    column: tl.tensor
    segments: tl.tensor


class QueryArrays(NamedTuple):
    """Pointers to the arrays of one query head; T; `scale`, the factor of the gradients of the scores; `score_scale`,
    the factor of the scores, which includes log2(e) for softmax."""

    q: tl.tensor
    dout: tl.tensor
    lse: tl.tensor
    row_dot: tl.tensor
    dq: tl.tensor
    segments: tl.tensor
    T: tl.tensor
    scale: tl.tensor
    score_scale: tl.tensor


@triton.jit
def weights_seen(
    scores,
    log_total,
    places,
    segments,
    start,
    T,
    FORM: tl.constexpr,
    ROWS: tl.constexpr,
    CAUSAL: tl.constexpr,
    DIAGONAL: tl.constexpr,
):
    """(weights κ, mask of the visible ones), both [columns, rows]. CAUSAL: rows may lie before some columns, so that a
    causal mask is needed. DIAGONAL: a row sees its own column."""
    visible = places.column
    if CAUSAL:
        row = start + tl.arange(0, ROWS)
        if DIAGONAL:
            visible = places.column[:, None] <= row[None, :]
        else:
            visible = places.column[:, None] < row[None, :]
        if FORM.has_segments:
            visible &= places.segments[:, None] == load_row(segments, start, T, ROWS)[None, :]
    else:
        if FORM.has_segments:
            visible = places.segments[:, None] == load_row(segments, start, T, ROWS)[None, :]
    weights = weights_again(scores, visible, log_total[None, :], FORM, CAUSAL or FORM.has_segments)
    return weights, visible


@triton.jit
def score_gradient(dots, scores, weights, visible, FORM: tl.constexpr, MASKED: tl.constexpr):
    """The gradient of the scores: κ'(s) · dots where visible, 0 elsewhere."""
    gradient = times_slope(dots, scores, weights, FORM)
    if MASKED:
        gradient = tl.where(visible, gradient, 0.0)
    return gradient


@triton.jit
def add_transposed(base, start, T, tile, LAYOUT: tl.constexpr, ROWS: tl.constexpr):
    """Adds a transposed tile [width, ROWS] to rows start … start + ROWS − 1 of an array, with atomics: other programs
    add to the same rows."""
    base += tl.cast(start, tl.int64) * LAYOUT.stride
    row = tl.arange(0, ROWS)[None, :]
    column = tl.arange(0, LAYOUT.block)[:, None]
    mask = (start + row < T) & (column < LAYOUT.width)
    tl.atomic_add(base + row * LAYOUT.stride + column, tile, mask=mask, sem="relaxed")


@triton.jit
def add_rows(
    dkeys,
    du,
    own,
    places,
    arrays,
    begin,
    end,
    FORM: tl.constexpr,
    ROWS: tl.constexpr,
    CAUSAL: tl.constexpr,
    STAGES: tl.constexpr,
):
    """(dkeys, du) with the contributions of rows begin … end − 1 of one query head. The head's dq is added to in
    memory."""
    QUERIES: tl.constexpr = FORM.queries
    OUT: tl.constexpr = FORM.out
    T = arrays.T
    for start in tl.range(begin, end, ROWS, num_stages=STAGES):
        rows = load_rows(arrays.q, start, T, QUERIES, ROWS)
        grads = load_rows(arrays.dout, start, T, OUT, ROWS)
        scores = tl.dot(own.k, tl.trans(rows), input_precision=FORM.score_precision) * arrays.score_scale
        log_total = start + tl.arange(0, ROWS)
        if FORM.softmax:
            log_total = load_row(arrays.lse, start, T, ROWS)
        weights, visible = weights_seen(scores, log_total, places, arrays.segments, start, T, FORM, ROWS, CAUSAL, True)
        du = add_product_with_given(weights, grads, du, FORM)
        dots = product_of_parts_with_given(own.u, own.low, tl.trans(grads), FORM)
        if FORM.softmax:
            dots -= load_row(arrays.row_dot, start, T, ROWS)[None, :]
        dscores = score_gradient(dots, scores, weights, visible, FORM, CAUSAL or FORM.has_segments)
        dkeys = add_product_with_given(dscores, rows, dkeys, FORM)
        drows = product_of_given(tl.trans(own.k), dscores, FORM) * arrays.scale
        add_transposed(arrays.dq, start, T, drows, QUERIES, ROWS)
    return dkeys, du


@triton.jit
def load_own_tiles(k, u, residue, n, begin, T, FORM: tl.constexpr, COLUMNS: tl.constexpr):
    """The OwnTiles of the COLUMNS columns at `begin` of head n of u."""
    KEYS: tl.constexpr = FORM.keys
    U: tl.constexpr = FORM.u
    keys = load_rows(head_of(k, n, T, FORM.u_heads, KEYS), begin, T, KEYS, COLUMNS)
    high = load_rows(head_of(u, n, T, FORM.u_heads, U), begin, T, U, COLUMNS)
    low = high
    if FORM.pair:
        low = load_rows(head_of(residue, n, T, FORM.u_heads, U), begin, T, U, COLUMNS)
    return OwnTiles(keys, high, low)


@triton.jit
def read_backward(
    q,
    k,
    u,
    residue,
    dout,
    lse,
    row_dot,
    segments,
    last,
    T,
    scale,
    score_scale,
    dq,
    dk,
    du,
    FORM: tl.constexpr,
    TILE: tl.constexpr,
):
    """The backward kernel of the read. Grid: B × u_heads × ⌈T / TILE.columns⌉ programs, one per block of columns of a
    head of u.

    Reads q, k, u, residue and segments as `read_forward`; dout [B,T,heads,V]; lse and row_dot (D) [B,heads,T]; last
    [B,blocks], one more than the last row that sees a block's last column (launches.last_rows). `score_scale` includes
    log2(e) for softmax; `scale` does not.
    Writes dk [B,T,u_heads,K] and du [B,T,u_heads,V], and adds to dq [B,T,heads,K], which starts at 0. All are float32.
    """
    QUERIES: tl.constexpr = FORM.queries
    OUT: tl.constexpr = FORM.out
    U: tl.constexpr = FORM.u
    KEY_GRADIENTS: tl.constexpr = FORM.key_gradients
    BLOCK_K: tl.constexpr = KEY_GRADIENTS.block
    BLOCK_V: tl.constexpr = U.block
    HEADS: tl.constexpr = FORM.heads
    SHARING: tl.constexpr = FORM.heads // FORM.u_heads
    ROWS: tl.constexpr = TILE.rows
    COLUMNS: tl.constexpr = TILE.columns
    blocks = tl.cdiv(T, COLUMNS)
    n = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    batch, u_head = n // FORM.u_heads, n % FORM.u_heads
    begin = block * COLUMNS
    column = begin + tl.arange(0, COLUMNS)
    own = load_own_tiles(k, u, residue, n, begin, T, FORM, COLUMNS)
    if FORM.has_segments:
        segments += tl.cast(batch, tl.int64) * T
    places = Places(column, load_segments(segments, begin, T, FORM.has_segments, COLUMNS))
    end = T
    if FORM.has_segments:
        end = tl.load(last + batch * blocks + block)
    dkeys = tl.zeros([COLUMNS, BLOCK_K], tl.float32)
    du_sum = tl.zeros([COLUMNS, BLOCK_V], tl.float32)
    for member in range(0, SHARING):
        head = u_head * SHARING + member
        row = tl.cast(batch * HEADS + head, tl.int64) * T
        head_q = head_base(q, batch, head, T, HEADS, QUERIES.width)
        head_dout = head_base(dout, batch, head, T, HEADS, OUT.width)
        head_dq = head_base(dq, batch, head, T, HEADS, QUERIES.width)
        arrays = QueryArrays(head_q, head_dout, lse + row, row_dot + row, head_dq, segments, T, scale, score_scale)
        near = tl.minimum(begin + COLUMNS, T)
        dkeys, du_sum = add_rows(dkeys, du_sum, own, places, arrays, begin, near, FORM, ROWS, True, 1)
        dkeys, du_sum = add_rows(
            dkeys, du_sum, own, places, arrays, begin + COLUMNS, end, FORM, ROWS, False, TILE.stages
        )
    dk = head_of(dk, n, T, FORM.u_heads, KEY_GRADIENTS)
    store_rows(dk, begin, T, dkeys * scale, KEY_GRADIENTS, COLUMNS)
    store_rows(head_of(du, n, T, FORM.u_heads, U), begin, T, du_sum, U, COLUMNS)
