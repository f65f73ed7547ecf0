"""The gradients of the write, with M = I + diag(β) A and G = M⁻ᵀ dU:

    G_j = dU_j − Σ_{i>j} A_ij β_i G_i                  a transposed solve inside the block
    dS_ij = κ'(s_ij) (−β_i G_i·u_j − D_i),             D_i = −G_i·(α_i v_i − u_i) for softmax, 0 otherwise
    dV = α G,   dα_i = v_i·G_i,   dβ_i = −G_i·s_i,   dW = scale · dS K,   dK = scale · dSᵀ W

One program computes G, dK, dV, dα and dβ of one block of TILE.columns columns of one head. It needs G of all later
blocks of the head, which other programs compute at the same time (order.py); the blocks are taken from the last to the
first. For later use, each block stores H_i = −β_i G_i and D_i. The program follows the later blocks as they become
ready, with five matrix products per pair of tiles. Its own triangular system needs no G, so the program inverts it
before the nearest later block is ready. Tiles of scores are transposed: [columns, rows].

If tied, one softmax writes and reads. With P the write's weights, s its sums, π the weight of a row's own token and
ρ = 1 − π, the same five products serve both:

    H_i = ρ_i dO_i − β_i G_i,    c_i = ρ_i dO_i·o_i + D_i,    G_j = dU_j + π_j dO_j + Σ_{i>j} P_ij H_i
    dS_ij = P_ij (H_i·u_j − c_i) for j < i

The caller (api.py) adds the gradients of the diagonal scores s_ii.

dW is added to memory tile by tile with atomics, by several programs at once, so that its last bits differ from run to
run.
"""

import triton
import triton.language as tl

from pallas_kernels.triton.delta.order import afresh, draw, publish, wait_for
from pallas_kernels.triton.delta.read_backward import Places, load_own_tiles, weights_seen
from pallas_kernels.triton.delta.write.adjoint import (
    Gradients,
    Saved,
    kept_gradient,
    store_adjoint,
    store_adjoint_in_parts,
)
from pallas_kernels.triton.delta.write.invert_blocks import own_inverses
from pallas_kernels.triton.delta.write.later_rows import (
    follow_later_blocks,
    follow_lower_half,
    follow_rows,
    later_rows_of,
    segments_of,
)
from pallas_kernels.triton.delta.write.u import Given
from pallas_kernels.triton.memory import head_of, load_row, load_rows, load_segments, padded, store_rows


@triton.jit
def add_read_incoming(
    incoming,
    own,
    given,
    saved,
    n,
    begin,
    FORM: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    HALF: tl.constexpr,
):
    """`incoming` + Σ P_ij ρ_i dO_i over the rows of the columns' own half. This is the part of P_ij H_i there that does
    not depend on the block's own G; the transposed solve accounts for the other part."""
    QUERIES: tl.constexpr = FORM.queries
    OUT: tl.constexpr = FORM.out
    T = given.T
    w = head_of(given.w, n, T, FORM.heads, QUERIES)
    dout = head_of(saved.dout, n, T, FORM.heads, OUT)
    past_share = saved.past_share + tl.cast(n, tl.int64) * T
    lse = saved.lse + padded(n, T)
    column = begin + tl.arange(0, COLUMNS)
    segments = segments_of(given, n, FORM)
    places = Places(column, load_segments(segments, begin, T, FORM.has_segments, COLUMNS))
    for start in tl.range(begin, begin + COLUMNS, ROWS, num_stages=1):
        rows = load_rows(w, start, T, QUERIES, ROWS)
        scores = tl.dot(own.k, tl.trans(rows), input_precision=FORM.score_precision) * given.scale
        log_total = load_row(lse, start, T, ROWS)
        weights, _visible = weights_seen(scores, log_total, places, segments, start, T, FORM, ROWS, True, False)
        if HALF < COLUMNS:
            weights = tl.where(column[:, None] // HALF == start // HALF, weights, 0.0)
        grads = kept_gradient(dout, past_share, start, T, OUT, ROWS).to(own.u.dtype)
        incoming = tl.dot(weights.to(own.u.dtype), grads, incoming, input_precision=FORM.precision)
    return incoming


@triton.jit
def take_lower_half(
    dkeys,
    lower,
    own,
    given,
    saved,
    gradients,
    counter,
    n,
    begin,
    end,
    FORM: tl.constexpr,
    ROWS: tl.constexpr,
    HALF: tl.constexpr,
):
    """Computes G of the lower half of the columns at `begin` and stores what follows from it.

    The sums Σ P_ij H_i over later rows are in the array dv before. Returns these sums for the upper half, with the
    lower half's rows added, and n and `begin` afresh (order.py).
    """
    U: tl.constexpr = FORM.u
    T = given.T
    tl.debug_barrier()
    n, begin = afresh(n, begin, counter)
    if FORM.pair:
        store_adjoint_in_parts(given, saved, gradients, n, begin + HALF, FORM, HALF)
    else:
        incoming = load_rows(head_of(gradients.dv, n, T, FORM.heads, U), begin + HALF, T, U, HALF)
        store_adjoint(lower, incoming, given, saved, gradients, n, begin + HALF, FORM, HALF)
    tl.debug_barrier()
    n, begin = afresh(n, begin, counter)
    incoming = follow_lower_half(dkeys, own, given, saved, gradients, n, begin, end, FORM, ROWS, HALF)
    return incoming, n, begin


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
    FORM: tl.constexpr,
    TILE: tl.constexpr,
):
    """The backward kernel of the write. Grid: B × heads × ⌈T / TILE.columns⌉ programs, one per block of columns of a
    head (order.py).

    Reads the inputs of `write_forward`, with inverses of blocks of TILE.columns / TILE.halves rows; last [B,blocks],
    one more than the last row that sees a block's last column; u in float32 (for a softmax without β only);
    operand and residue, u as products take it; lse; du [B,T,heads,V] float32, with π dO added if tied; with β, summary
    (s) [B,T,heads,V]; if tied, dout [B,T,heads,V], past_share (ρ) and read_dot (dO·o) [B,heads,T]. `scale` includes
    log2(e) for softmax.
    Writes dw, dk [B,T,heads,K], dv [B,T,heads,V], dalpha, dbeta [B,heads,T], all float32. dw starts at 0 and is added
    to. dw and dk are not multiplied by the scale.
    Scratch that later programs read: adjoint, H in operand's dtype, and for "pair" adjoint_residue, its low part;
    centre [B,heads,padded T], D or, if tied, c; it starts at 0. The arrays dk and dv also hold sums in between.
    """
    KEY_GRADIENTS: tl.constexpr = FORM.key_gradients
    U: tl.constexpr = FORM.u
    HEADS: tl.constexpr = FORM.heads
    ROWS: tl.constexpr = TILE.rows
    COLUMNS: tl.constexpr = TILE.columns
    HALF: tl.constexpr = TILE.columns // TILE.halves
    given = Given(w, k, v, alpha, beta, segments, inverse, inverse_low, T, scale)
    saved = Saved(u, summary, lse, du, dout, past_share, read_dot)
    gradients = Gradients(dw, dv, dalpha, dbeta, adjoint, adjoint_residue, centre)
    blocks = tl.cdiv(T, COLUMNS)
    n, later_blocks = draw(counters, B * HEADS, TILE.group, blocks)
    counter = counters + 1 + n
    block = blocks - 1 - later_blocks
    begin = block * COLUMNS
    near = begin + COLUMNS
    end = tl.cdiv(T, ROWS) * ROWS
    if FORM.has_segments:
        seen = tl.load(last + n // HEADS * blocks + block)
        end = tl.maximum(tl.cdiv(seen, ROWS) * ROWS, tl.minimum(near, end))

    # All later blocks but the nearest, as they become ready.
    own = load_own_tiles(k, operand, residue, n, begin, T, FORM, COLUMNS)
    far = near + COLUMNS
    dkeys, incoming, end = follow_later_blocks(own, given, saved, gradients, counter, n, begin, far, end, FORM, TILE)
    # Store the sums until they are needed again, to free their registers. They go where dk and dv will be stored.
    n, begin = afresh(n, begin, counter)
    head_dk = head_of(dk, n, T, HEADS, KEY_GRADIENTS)
    head_dv = head_of(dv, n, T, HEADS, U)
    store_rows(head_dk, begin, T, dkeys, KEY_GRADIENTS, COLUMNS)
    if FORM.tied:
        incoming = add_read_incoming(incoming, own, given, saved, n, begin, FORM, ROWS, COLUMNS, HALF)
    store_rows(head_dv, begin, T, incoming, U, COLUMNS)
    tl.debug_barrier()
    # The block's own system needs no G: invert it before the nearest block is ready.
    upper, lower = own_inverses(given, lse, n, begin, FORM, HALF, TILE.halves)

    n, begin = afresh(n, begin, counter)
    head_dv = head_of(dv, n, T, HEADS, U)
    incoming = load_rows(head_dv, begin, T, U, COLUMNS)
    wait_for(counter, blocks - 1 - begin // COLUMNS)
    # For the nearest block, compute only what G needs. Its other gradients follow after this block's G is published,
    # so that earlier blocks wait less.
    near = begin + COLUMNS
    later = later_rows_of(given, saved, gradients, n, begin, FORM, COLUMNS)
    dkeys, incoming = follow_rows(dkeys, incoming, own, later, near, end, FORM, ROWS, False, True, False, 1)
    if TILE.halves == 2:
        store_rows(head_dv, begin, T, incoming, U, COLUMNS)
        incoming, n, begin = take_lower_half(
            dkeys, lower, own, given, saved, gradients, counter, n, begin, end, FORM, ROWS, HALF
        )
    n, begin = afresh(n, begin, counter)
    if FORM.pair:
        store_rows(head_of(dv, n, T, HEADS, U), begin, T, incoming, U, HALF)
        tl.debug_barrier()
        n, begin = afresh(n, begin, counter)
        store_adjoint_in_parts(given, saved, gradients, n, begin, FORM, HALF)
    else:
        store_adjoint(upper, incoming, given, saved, gradients, n, begin, FORM, HALF)
    publish(counter, blocks - begin // COLUMNS)

    n, begin = afresh(n, begin, counter)
    head_dk = head_of(dk, n, T, HEADS, KEY_GRADIENTS)
    dkeys = load_rows(head_dk, begin, T, KEY_GRADIENTS, COLUMNS)
    later = later_rows_of(given, saved, gradients, n, begin, FORM, COLUMNS)
    dkeys, _incoming = follow_rows(dkeys, incoming, own, later, begin, end, FORM, ROWS, True, False, True, TILE.stages)
    store_rows(head_dk, begin, T, dkeys, KEY_GRADIENTS, COLUMNS)
