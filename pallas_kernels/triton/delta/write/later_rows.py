"""The loop over later rows in the backward pass of the write. A block of columns takes the later rows from the last to
the first, and its own rows last. backward.py has the equations.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from pallas_kernels.triton.delta.order import done_blocks
from pallas_kernels.triton.delta.read_backward import (
    OwnTiles,
    Places,
    add_transposed,
    score_gradient,
    weights_seen,
)
from pallas_kernels.triton.delta.split_products import (
    add_product,
    add_product_with_given,
    product_of_given,
    product_of_parts,
)
from pallas_kernels.triton.memory import head_of, load_rows, load_segments, padded


class LaterRows(NamedTuple):
    """The later rows of one head, for one block of columns: pointers to the rows' arrays w, H (adjoint), log-sum-exps,
    D or c (centre), dW and segment ids; the places of the columns; T; the factor of the scores."""

    w: tl.tensor
    adjoint: tl.tensor
    adjoint_residue: tl.tensor
    lse: tl.tensor
    centre: tl.tensor
    dw: tl.tensor
    segments: tl.tensor
    places: Places
    T: tl.tensor
    scale: tl.tensor


@triton.jit
def segments_of(given, n, FORM: tl.constexpr):
    """Pointer to the segment ids of head n's batch row."""
    segments = given.segments
    if FORM.has_segments:
        segments += tl.cast(n // FORM.heads, tl.int64) * given.T
    return segments


@triton.jit
def later_rows_of(given, saved, gradients, n, begin, FORM: tl.constexpr, COLUMNS: tl.constexpr):
    """The LaterRows of head n for the COLUMNS columns at `begin`."""
    QUERIES: tl.constexpr = FORM.queries
    U: tl.constexpr = FORM.u
    T = given.T
    w = head_of(given.w, n, T, FORM.heads, QUERIES)
    dw = head_of(gradients.dw, n, T, FORM.heads, QUERIES)
    adjoint = head_of(gradients.adjoint, n, T, FORM.heads, U)
    adjoint_residue = adjoint
    if FORM.pair:
        adjoint_residue = head_of(gradients.adjoint_residue, n, T, FORM.heads, U)
    lse = saved.lse + padded(n, T)
    centre = gradients.centre + padded(n, T)
    column = begin + tl.arange(0, COLUMNS)
    segments = segments_of(given, n, FORM)
    places = Places(column, load_segments(segments, begin, T, FORM.has_segments, COLUMNS))
    return LaterRows(w, adjoint, adjoint_residue, lse, centre, dw, segments, places, T, given.scale)


@triton.jit
def follow_rows(
    dkeys,
    incoming,
    own,
    later,
    begin,
    end,
    FORM: tl.constexpr,
    ROWS: tl.constexpr,
    OWN: tl.constexpr,
    INCOMING: tl.constexpr,
    GRADIENTS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """(dkeys, incoming) after the rows from `end` − 1 back to `begin`.

    INCOMING: adds Σ A_ij H_i, which the columns' G needs, to `incoming`. GRADIENTS: adds the rows' part of dK to
    `dkeys`, and the rows' dW to memory. OWN: the rows may include the columns' own block, so a causal mask is needed.
    """
    QUERIES: tl.constexpr = FORM.queries
    U: tl.constexpr = FORM.u
    T = later.T
    for back in tl.range(0, end - begin, ROWS, num_stages=STAGES):
        start = end - ROWS - back
        rows = load_rows(later.w, start, T, QUERIES, ROWS)
        grads = load_rows(later.adjoint, start, T, U, ROWS)
        low_grads = grads
        if FORM.pair:
            low_grads = load_rows(later.adjoint_residue, start, T, U, ROWS)
        scores = tl.dot(own.k, tl.trans(rows), input_precision=FORM.score_precision) * later.scale
        index = start + tl.arange(0, ROWS)
        log_total = index
        if FORM.softmax:
            log_total = tl.load(later.lse + index)
        weights, visible = weights_seen(
            scores, log_total, later.places, later.segments, start, T, FORM, ROWS, OWN, False
        )
        if INCOMING:
            incoming = add_product(weights, grads, low_grads, incoming, FORM)
        if GRADIENTS:
            dots = product_of_parts(own.u, own.low, tl.trans(grads), tl.trans(low_grads), FORM)
            if FORM.softmax:
                dots -= tl.load(later.centre + index)[None, :]
            dscores = score_gradient(dots, scores, weights, visible, FORM, OWN or FORM.has_segments)
            dkeys = add_product_with_given(dscores, rows, dkeys, FORM)
            drows = product_of_given(tl.trans(own.k), dscores, FORM)
            add_transposed(later.dw, start, T, drows, QUERIES, ROWS)
    return dkeys, incoming


@triton.jit
def follow_later_blocks(
    own, given, saved, gradients, counter, n, begin, nearest_end, end, FORM: tl.constexpr, TILE: tl.constexpr
):
    """(dkeys, incoming, end of the remaining rows) after the rows from `end` − 1 back to `nearest_end`. The function
    follows their blocks as they become ready."""
    COLUMNS: tl.constexpr = TILE.columns
    BLOCK_K: tl.constexpr = FORM.key_gradients.block
    BLOCK_V: tl.constexpr = FORM.u.block
    blocks = tl.cdiv(given.T, COLUMNS)
    dkeys = tl.zeros([COLUMNS, BLOCK_K], tl.float32)
    incoming = tl.zeros([COLUMNS, BLOCK_V], tl.float32)
    while end > nearest_end:
        ready = tl.minimum(tl.maximum((blocks - done_blocks(counter)) * COLUMNS, nearest_end), end)
        later = later_rows_of(given, saved, gradients, n, begin, FORM, COLUMNS)
        dkeys, incoming = follow_rows(
            dkeys, incoming, own, later, ready, end, FORM, TILE.rows, False, True, True, TILE.stages
        )
        end = ready
    return dkeys, incoming, end


@triton.jit
def follow_lower_half(
    dkeys, own, given, saved, gradients, n, begin, end, FORM: tl.constexpr, ROWS: tl.constexpr, HALF: tl.constexpr
):
    """The sums Σ A_ij H_i for the upper half of the columns at `begin`. The lower half of the block, up to row `end` at
    most, is one more later block for it. The sums over the other later rows are in the array dv."""
    KEYS: tl.constexpr = FORM.keys
    U: tl.constexpr = FORM.u
    T = given.T
    keys = load_rows(head_of(given.k, n, T, FORM.heads, KEYS), begin, T, KEYS, HALF)
    incoming = load_rows(head_of(gradients.dv, n, T, FORM.heads, U), begin, T, U, HALF)
    upper = OwnTiles(keys, own.u, own.low)
    half_end = tl.minimum(begin + 2 * HALF, end)
    later = later_rows_of(given, saved, gradients, n, begin, FORM, HALF)
    _dkeys, incoming = follow_rows(
        dkeys, incoming, upper, later, begin + HALF, half_end, FORM, ROWS, False, True, False, 1
    )
    return incoming
