"""The write's gradients: one sweep over blocks of columns from the last to the first. M = I + diag(β) A, G = M⁻ᵀ dU:

    G_j = dU_j − Σ_{i>j} A_ij β_i G_i                  a transposed solve inside the block
    dS_ij = κ'(s_ij) (−β_i G_i·u_j − D_i),             D_i = −G_i·(α_i v_i − u_i) for softmax, 0 otherwise
    dV = α G,   dα_i = v_i·G_i,   dβ_i = −G_i·s_i,   dW = scale · dS K,   dK = scale · dSᵀ W

A block follows its head's later blocks as they get ready (order.py), in five products per pair of tiles. Its own
triangular system needs no G and is inverted before the last of them is ready. What later blocks leave for it is
H_i = −β_i G_i and D_i.

Tied, one softmax writes and reads. P the write's weights, s its sums, π and ρ = 1 − π a row's own share and the rest:

    H_i = ρ_i dO_i − β_i G_i,    c_i = ρ_i dO_i·o_i + D_i,    G_j = dU_j + π_j dO_j + Σ_{i>j} P_ij H_i
    dS_ij = P_ij (H_i·u_j − c_i) for j < i

and the same five products serve both. What a row's own score adds is diagonal, and the caller's.

dW is added to memory tile by tile by several programs at once: its last bits differ from run to run.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from pallas_kernels.triton.delta.invert_blocks import own_inverses
from pallas_kernels.triton.delta.order import afresh, done_blocks, draw, publish, wait_for
from pallas_kernels.triton.delta.read_backward import (
    OwnTiles,
    Places,
    add_transposed,
    load_own_tiles,
    score_gradient,
    weights_seen,
)
from pallas_kernels.triton.delta.split_products import (
    add_product,
    add_product_with_given,
    product_of_given,
    product_of_parts,
)
from pallas_kernels.triton.delta.write_adjoint import (
    GradientArrays,
    kept_gradient,
    store_adjoint,
    store_adjoint_in_parts,
)
from pallas_kernels.triton.memory import head_of, load_row, load_rows, load_segments, padded, store_rows


class LaterRows(NamedTuple):
    """Pointers to what one head's later rows have for its columns, and where their dW goes."""

    w: tl.tensor
    adjoint: tl.tensor
    adjoint_residue: tl.tensor
    lse: tl.tensor
    centre: tl.tensor
    dw: tl.tensor


@triton.jit
def later_rows_of(arrays, n, SHAPE: tl.constexpr, WEIGHTING: tl.constexpr):
    """Those of head n."""
    QUERIES: tl.constexpr = SHAPE.queries
    U: tl.constexpr = SHAPE.u
    T = arrays.T
    w = head_of(arrays.w, n, T, SHAPE.heads, QUERIES)
    dw = head_of(arrays.dw, n, T, SHAPE.heads, QUERIES)
    adjoint = head_of(arrays.adjoint, n, T, SHAPE.heads, U)
    adjoint_residue = adjoint
    if WEIGHTING.pair:
        adjoint_residue = head_of(arrays.adjoint_residue, n, T, SHAPE.heads, U)
    return LaterRows(w, adjoint, adjoint_residue, arrays.lse + padded(n, T), arrays.centre + padded(n, T), dw)


@triton.jit
def segments_of(arrays, n, SHAPE: tl.constexpr, HAS: tl.constexpr):
    """The segments of head n's row of the batch."""
    segments = arrays.segments
    if HAS.segments:
        segments += tl.cast(n // SHAPE.heads, tl.int64) * arrays.T
    return segments


@triton.jit
def follow_rows(
    dkeys,
    incoming,
    own,
    arrays,
    n,
    columns,
    begin,
    end,
    SHAPE: tl.constexpr,
    WEIGHTING: tl.constexpr,
    HAS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    OWN: tl.constexpr,
    INCOMING: tl.constexpr,
    GRADIENTS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """After the rows from `end` back to `begin`: what comes in to the columns' G (INCOMING), and dkeys, with dW added
    to memory (GRADIENTS). OWN: the columns' own block may be among the rows."""
    QUERIES: tl.constexpr = SHAPE.queries
    U: tl.constexpr = SHAPE.u
    T = arrays.T
    later = later_rows_of(arrays, n, SHAPE, WEIGHTING)
    segments = segments_of(arrays, n, SHAPE, HAS)
    column = columns + tl.arange(0, COLUMNS)
    places = Places(column, load_segments(segments, columns, T, HAS.segments, COLUMNS))
    for back in tl.range(0, end - begin, ROWS, num_stages=STAGES):
        start = end - ROWS - back
        rows = load_rows(later.w, start, T, QUERIES, ROWS)
        grads = load_rows(later.adjoint, start, T, U, ROWS)
        low_grads = grads
        if WEIGHTING.pair:
            low_grads = load_rows(later.adjoint_residue, start, T, U, ROWS)
        scores = tl.dot(own.k, tl.trans(rows), input_precision=WEIGHTING.score_precision) * arrays.scale
        index = start + tl.arange(0, ROWS)
        log_total = index
        if WEIGHTING.softmax:
            log_total = tl.load(later.lse + index)
        weights, visible = weights_seen(scores, log_total, places, segments, start, T, WEIGHTING, HAS, ROWS, OWN, False)
        if INCOMING:
            incoming = add_product(weights, grads, low_grads, incoming, WEIGHTING)
        if GRADIENTS:
            dots = product_of_parts(own.u, own.low, tl.trans(grads), tl.trans(low_grads), WEIGHTING)
            if WEIGHTING.softmax:
                dots -= tl.load(later.centre + index)[None, :]
            dscores = score_gradient(dots, scores, weights, visible, WEIGHTING, OWN or HAS.segments)
            dkeys = add_product_with_given(dscores, rows, dkeys, WEIGHTING)
            drows = product_of_given(tl.trans(own.k), dscores, WEIGHTING)
            add_transposed(later.dw, start, T, drows, QUERIES, ROWS)
    return dkeys, incoming


@triton.jit
def follow_later_blocks(
    own,
    arrays,
    counter,
    n,
    columns,
    nearest_end,
    end,
    SHAPE: tl.constexpr,
    WEIGHTING: tl.constexpr,
    HAS: tl.constexpr,
    TILE: tl.constexpr,
):
    """dkeys, and what comes in to G, of the rows from `end` back to `nearest_end`, as their blocks get ready; and where
    the rows that are left end."""
    COLUMNS: tl.constexpr = TILE.columns
    BLOCK_K: tl.constexpr = SHAPE.key_gradients.block
    BLOCK_V: tl.constexpr = SHAPE.u.block
    blocks = tl.cdiv(arrays.T, COLUMNS)
    dkeys = tl.zeros([COLUMNS, BLOCK_K], tl.float32)
    incoming = tl.zeros([COLUMNS, BLOCK_V], tl.float32)
    while end > nearest_end:
        ready = tl.minimum(tl.maximum((blocks - done_blocks(counter)) * COLUMNS, nearest_end), end)
        dkeys, incoming = follow_rows(
            dkeys,
            incoming,
            own,
            arrays,
            n,
            columns,
            ready,
            end,
            SHAPE,
            WEIGHTING,
            HAS,
            TILE.rows,
            COLUMNS,
            False,
            True,
            True,
            TILE.stages,
        )
        end = ready
    return dkeys, incoming, end


@triton.jit
def add_read_incoming(
    incoming,
    own,
    arrays,
    n,
    columns,
    SHAPE: tl.constexpr,
    WEIGHTING: tl.constexpr,
    HAS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    HALF: tl.constexpr,
):
    """`incoming` with Σ P_ij ρ_i dO_i over the rows of the columns' own half: what comes in there before G is known."""
    QUERIES: tl.constexpr = SHAPE.queries
    OUT: tl.constexpr = SHAPE.out
    T = arrays.T
    w = head_of(arrays.w, n, T, SHAPE.heads, QUERIES)
    dout = head_of(arrays.dout, n, T, SHAPE.heads, OUT)
    past_share = arrays.past_share + tl.cast(n, tl.int64) * T
    lse = arrays.lse + padded(n, T)
    segments = segments_of(arrays, n, SHAPE, HAS)
    column = columns + tl.arange(0, COLUMNS)
    places = Places(column, load_segments(segments, columns, T, HAS.segments, COLUMNS))
    for start in tl.range(columns, columns + COLUMNS, ROWS, num_stages=1):
        rows = load_rows(w, start, T, QUERIES, ROWS)
        scores = tl.dot(own.k, tl.trans(rows), input_precision=WEIGHTING.score_precision) * arrays.scale
        log_total = load_row(lse, start, T, ROWS)
        weights, _visible = weights_seen(
            scores, log_total, places, segments, start, T, WEIGHTING, HAS, ROWS, True, False
        )
        if HALF < COLUMNS:
            weights = tl.where(places.column[:, None] // HALF == start // HALF, weights, 0.0)
        grads = kept_gradient(dout, past_share, start, T, OUT, ROWS).to(own.u.dtype)
        incoming = tl.dot(weights.to(own.u.dtype), grads, incoming, input_precision=WEIGHTING.precision)
    return incoming


@triton.jit
def follow_lower_half(
    dkeys,
    own,
    arrays,
    n,
    begin,
    end,
    SHAPE: tl.constexpr,
    WEIGHTING: tl.constexpr,
    HAS: tl.constexpr,
    ROWS: tl.constexpr,
    HALF: tl.constexpr,
):
    """What comes in to the upper half of the columns at `begin`, to which the lower half of the rows, which end at
    `end` or before, is one more later block. What came from the others lies where dv goes."""
    KEYS: tl.constexpr = SHAPE.keys
    U: tl.constexpr = SHAPE.u
    T = arrays.T
    keys = load_rows(head_of(arrays.k, n, T, SHAPE.heads, KEYS), begin, T, KEYS, HALF)
    incoming = load_rows(head_of(arrays.dv, n, T, SHAPE.heads, U), begin, T, U, HALF)
    upper = OwnTiles(keys, own.u, own.low)
    _dkeys, incoming = follow_rows(
        dkeys,
        incoming,
        upper,
        arrays,
        n,
        begin,
        begin + HALF,
        tl.minimum(begin + 2 * HALF, end),
        SHAPE,
        WEIGHTING,
        HAS,
        ROWS,
        HALF,
        False,
        True,
        False,
        1,
    )
    return incoming


@triton.jit
def write_backward(
    w,
    k,
    v,
    alpha,
    beta,
    segments,
    last,
    inverse,
    inverse_low,
    u,
    operand,
    residue,
    summary,
    lse,
    du,
    dout,
    past_share,
    read_dot,
    T,
    scale,
    dw,
    dk,
    dv,
    dalpha,
    dbeta,
    adjoint,
    adjoint_residue,
    centre,
    counters,
    B: tl.constexpr,
    SHAPE: tl.constexpr,
    WEIGHTING: tl.constexpr,
    HAS: tl.constexpr,
    TILE: tl.constexpr,
):
    """As `write_forward`, with last [B,blocks]: the row after the last one that sees a block's last column; u and
    operand, residue: u in float32 (softmax) and as products take it; du [B,T,heads,V] float32, with π dO in it if
    tied; HAS.beta: summary (s) [B,T,heads,V]; tied: dout [B,T,heads,V], past_share (ρ), read_dot (dO·o) [B,heads,T]
    -> dw, dk [B,T,heads,K], dv [B,T,heads,V], dalpha, dbeta [B,heads,T], all float32, dw zeroed, dw and dk without
    their factor of scale; adjoint, and for pairs adjoint_residue: H in operand's dtype; centre [B,heads,padded T],
    zeroed: D, or c. `scale` has log2(e) in it for softmax."""
    KEY_GRADIENTS: tl.constexpr = SHAPE.key_gradients
    U: tl.constexpr = SHAPE.u
    HEADS: tl.constexpr = SHAPE.heads
    ROWS: tl.constexpr = TILE.rows
    COLUMNS: tl.constexpr = TILE.columns
    HALF: tl.constexpr = TILE.columns // TILE.halves
    arrays = GradientArrays(
        w,
        k,
        v,
        alpha,
        beta,
        segments,
        inverse,
        inverse_low,
        u,
        summary,
        lse,
        du,
        dout,
        past_share,
        read_dot,
        T,
        scale,
        dw,
        dv,
        dalpha,
        dbeta,
        adjoint,
        adjoint_residue,
        centre,
    )
    blocks = tl.cdiv(T, COLUMNS)
    n, later_blocks = draw(counters, B * SHAPE.heads, TILE.group, blocks)
    counter = counters + 1 + n
    block = blocks - 1 - later_blocks
    batch = n // HEADS
    begin = block * COLUMNS
    near = begin + COLUMNS
    far = near + COLUMNS
    end = tl.cdiv(T, ROWS) * ROWS
    if HAS.segments:
        seen = tl.load(last + batch * blocks + block)
        end = tl.maximum(tl.cdiv(seen, ROWS) * ROWS, tl.minimum(near, end))

    # All but the nearest of the later blocks, as they get ready.
    own = load_own_tiles(k, operand, residue, n, begin, T, SHAPE, WEIGHTING, COLUMNS)
    dkeys, incoming, end = follow_later_blocks(own, arrays, counter, n, begin, far, end, SHAPE, WEIGHTING, HAS, TILE)
    # Put away: until they are needed again their registers are. dv's place is free until G is known.
    n, begin = afresh(n, begin, counter)
    head_dk = head_of(dk, n, T, HEADS, KEY_GRADIENTS)
    head_dv = head_of(dv, n, T, HEADS, U)
    store_rows(head_dk, begin, T, dkeys, KEY_GRADIENTS, COLUMNS)
    if WEIGHTING.tied:
        incoming = add_read_incoming(incoming, own, arrays, n, begin, SHAPE, WEIGHTING, HAS, ROWS, COLUMNS, HALF)
    store_rows(head_dv, begin, T, incoming, U, COLUMNS)
    tl.debug_barrier()

    # The block's own system needs no G: invert it before the nearest block is ready.
    upper, lower = own_inverses(arrays, n, begin, SHAPE, WEIGHTING, HAS, HALF, TILE.halves)

    n, begin = afresh(n, begin, counter)
    incoming = load_rows(head_of(dv, n, T, HEADS, U), begin, T, U, COLUMNS)
    wait_for(counter, blocks - 1 - begin // COLUMNS)
    # Only what G needs; the gradients of these rows can wait until this block's G is out.
    dkeys, incoming = follow_rows(
        dkeys,
        incoming,
        own,
        arrays,
        n,
        begin,
        begin + COLUMNS,
        end,
        SHAPE,
        WEIGHTING,
        HAS,
        ROWS,
        COLUMNS,
        False,
        True,
        False,
        1,
    )
    if TILE.halves == 2:
        store_rows(head_of(dv, n, T, HEADS, U), begin, T, incoming, U, COLUMNS)
        tl.debug_barrier()
        n, begin = afresh(n, begin, counter)
        if WEIGHTING.pair:
            store_adjoint_in_parts(arrays, n, begin + HALF, SHAPE, WEIGHTING, HAS, HALF)
        else:
            incoming = load_rows(head_of(dv, n, T, HEADS, U), begin + HALF, T, U, HALF)
            store_adjoint(lower, incoming, arrays, n, begin + HALF, SHAPE, WEIGHTING, HAS, HALF)
        tl.debug_barrier()
        n, begin = afresh(n, begin, counter)
        incoming = follow_lower_half(dkeys, own, arrays, n, begin, end, SHAPE, WEIGHTING, HAS, ROWS, HALF)
    n, begin = afresh(n, begin, counter)
    if WEIGHTING.pair:
        store_rows(head_of(dv, n, T, HEADS, U), begin, T, incoming, U, HALF)
        tl.debug_barrier()
        n, begin = afresh(n, begin, counter)
        store_adjoint_in_parts(arrays, n, begin, SHAPE, WEIGHTING, HAS, HALF)
    else:
        store_adjoint(upper, incoming, arrays, n, begin, SHAPE, WEIGHTING, HAS, HALF)
    publish(counter, blocks - begin // COLUMNS)

    n, begin = afresh(n, begin, counter)
    head_dk = head_of(dk, n, T, HEADS, KEY_GRADIENTS)
    dkeys = load_rows(head_dk, begin, T, KEY_GRADIENTS, COLUMNS)
    dkeys, _incoming = follow_rows(
        dkeys,
        incoming,
        own,
        arrays,
        n,
        begin,
        begin,
        end,
        SHAPE,
        WEIGHTING,
        HAS,
        ROWS,
        COLUMNS,
        True,
        False,
        True,
        TILE.stages,
    )
    store_rows(head_dk, begin, T, dkeys, KEY_GRADIENTS, COLUMNS)
