"""The write's gradients: one sweep over blocks of columns from the last to the first. M = I + diag(β) A, G = M⁻ᵀ dU:

    G_j = dU_j − Σ_{i>j} A_ij β_i G_i                  a transposed solve inside the block
    dS_ij = κ'(s_ij) (−β_i G_i·u_j − D_i),             D_i = −G_i·(α_i v_i − u_i) for softmax, 0 otherwise
    dV = α G,   dα_i = v_i·G_i,   dβ_i = −G_i·s_i,   dW = scale · dS K,   dK = scale · dSᵀ W

A block follows its head's later blocks as they get ready (order.py), in five products per pair of tiles. Its own
triangular system needs no G and is inverted before the last of them is ready. What later blocks leave for it is
H_i = −β_i G_i and D_i.

TIED: one softmax writes and reads. P the write's weights, s its sums, π and ρ = 1 − π a row's own share and the rest:

    H_i = ρ_i dO_i − β_i G_i,    c_i = ρ_i dO_i·o_i + D_i,    G_j = dU_j + π_j dO_j + Σ_{i>j} P_ij H_i
    dS_ij = P_ij (H_i·u_j − c_i) for j < i

and the same five products serve both. What a row's own score adds is diagonal, and the caller's.

dW is added to memory tile by tile by several programs at once: its last bits differ from run to run.
"""

import triton
import triton.language as tl

from pallas_kernels.triton.delta.invert_blocks import load_inverse, own_inverse
from pallas_kernels.triton.delta.order import done_blocks, draw, publish, unknown_zero, wait_for
from pallas_kernels.triton.delta.read_backward import add_transposed, score_gradient, weights_seen
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
from pallas_kernels.triton.products import (
    add_product,
    add_product_with_given,
    parts,
    product_of_given,
    product_of_parts,
)


@triton.jit
def write_rows(
    keys, values, low, dkeys, rest, n, columns, w, adjoint, adjoint_residue, lse, centre, dw, segments, begin, end, T,
    score_scale,
    HAS_SEGMENTS: tl.constexpr, OWN: tl.constexpr, INCOMING: tl.constexpr, GRADIENTS: tl.constexpr,
    HEADS: tl.constexpr, K: tl.constexpr, V: tl.constexpr, SIMILARITY: tl.constexpr, POWER: tl.constexpr,
    PAIR: tl.constexpr, SCORE_PRECISION: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """After the rows from `end` back to `begin`: what comes in to the columns' G (INCOMING), and dkeys, with dW added
    to memory (GRADIENTS). OWN: the columns' own block may be among the rows."""
    batch, head = n // HEADS, n % HEADS
    w = head_base(w, batch, head, T, HEADS, K)
    dw = head_base(dw, batch, head, T, HEADS, K)
    adjoint = head_base(adjoint, batch, head, T, HEADS, V)
    if PAIR:
        adjoint_residue = head_base(adjoint_residue, batch, head, T, HEADS, V)
    lse += padded(n, T)
    centre += padded(n, T)
    column = columns + tl.arange(0, COLUMNS)
    column_segments = columns
    if HAS_SEGMENTS:
        segments += tl.cast(batch, tl.int64) * T
        column_segments = load_row(segments, columns, T, COLUMNS)
    for back in tl.range(0, end - begin, ROWS, num_stages=STAGES):
        start = end - ROWS - back
        rows = load_tile(w, start, T, HEADS * K, K, ROWS, BLOCK_K, False)
        grads = load_tile(adjoint, start, T, HEADS * V, V, ROWS, BLOCK_V, False)
        low_grads = grads
        if PAIR:
            low_grads = load_tile(adjoint_residue, start, T, HEADS * V, V, ROWS, BLOCK_V, False)
        scores = tl.dot(keys, tl.trans(rows), input_precision=SCORE_PRECISION) * score_scale
        index = start + tl.arange(0, ROWS)
        log_total = index
        if SIMILARITY == "softmax":
            log_total = tl.load(lse + index)
        weights, visible = weights_seen(
            scores, log_total, segments, column_segments, column, start, T,
            HAS_SEGMENTS, OWN, False, ROWS, SIMILARITY, POWER,
        )  # fmt: skip
        if INCOMING:
            rest = add_product(weights, grads, low_grads, rest, PAIR, PRECISION)
        if GRADIENTS:
            dots = product_of_parts(values, low, tl.trans(grads), tl.trans(low_grads), PAIR, PRECISION)
            if SIMILARITY == "softmax":
                dots -= tl.load(centre + index)[None, :]
            dscores = score_gradient(dots, scores, weights, visible, OWN or HAS_SEGMENTS, SIMILARITY)
            dkeys = add_product_with_given(dscores, rows, dkeys, PAIR, PRECISION)
            drows = product_of_given(tl.trans(keys), dscores, PAIR, PRECISION)
            add_transposed(dw, start, T, drows, HEADS * K, K, ROWS, BLOCK_K)
    return dkeys, rest


@triton.jit
def kept_gradient(dout, rest_share, start, T, HEADS: tl.constexpr, V: tl.constexpr, ROWS: tl.constexpr, BLOCK_V: tl.constexpr):  # fmt: skip  # noqa: E501
    """ρ dO in float32."""
    grads = load_tile(dout, start, T, HEADS * V, V, ROWS, BLOCK_V, False).to(tl.float32)
    return grads * load_row(rest_share, start, T, ROWS)[:, None]


@triton.jit
def read_incoming(
    keys, values, rest, n, columns, w, dout, rest_share, lse, segments, T, score_scale,
    HAS_SEGMENTS: tl.constexpr, HEADS: tl.constexpr, K: tl.constexpr, V: tl.constexpr, SIMILARITY: tl.constexpr,
    POWER: tl.constexpr, SCORE_PRECISION: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, HALF: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """`rest` with Σ P_ij ρ_i dO_i over the rows of the columns' own half: what comes in there before G is known."""
    batch, head = n // HEADS, n % HEADS
    w = head_base(w, batch, head, T, HEADS, K)
    dout = head_base(dout, batch, head, T, HEADS, V)
    rest_share += tl.cast(n, tl.int64) * T
    lse += padded(n, T)
    column = columns + tl.arange(0, COLUMNS)
    column_segments = columns
    if HAS_SEGMENTS:
        segments += tl.cast(batch, tl.int64) * T
        column_segments = load_row(segments, columns, T, COLUMNS)
    for start in tl.range(columns, columns + COLUMNS, ROWS, num_stages=1):
        rows = load_tile(w, start, T, HEADS * K, K, ROWS, BLOCK_K, False)
        scores = tl.dot(keys, tl.trans(rows), input_precision=SCORE_PRECISION) * score_scale
        weights, _visible = weights_seen(
            scores, load_row(lse, start, T, ROWS), segments, column_segments, column, start, T,
            HAS_SEGMENTS, True, False, ROWS, SIMILARITY, POWER,
        )  # fmt: skip
        if HALF < COLUMNS:
            weights = tl.where(column[:, None] // HALF == start // HALF, weights, 0.0)
        grads = kept_gradient(dout, rest_share, start, T, HEADS, V, ROWS, BLOCK_V).to(values.dtype)
        rest = tl.dot(weights.to(values.dtype), grads, rest, input_precision=PRECISION)
    return rest


@triton.jit
def solve_rows(
    inverse, rest, n, start, T, v, alpha, beta, u, summary, du, dout, rest_share, read_dot, dv, dalpha, dbeta, adjoint,
    centre,
    HAS_ALPHA: tl.constexpr, HAS_BETA: tl.constexpr, TIED: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr,
    V: tl.constexpr, SIMILARITY: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Some rows' G, and all that follows from it; stores what earlier blocks and the caller need of that."""
    batch, head = n // HEADS, n % HEADS
    row = tl.cast(n, tl.int64) * T
    rest += load_tile(head_base(du, batch, head, T, HEADS, V), start, T, HEADS * V, V, ROWS, BLOCK_V, False)
    grad = tl.dot(tl.trans(inverse), rest, input_precision=PRECISION)
    dv = head_base(dv, batch, head, T, HEADS, V)
    if HAS_ALPHA:
        store_tile(dv, start, T, load_row(alpha + row, start, T, ROWS)[:, None] * grad, HEADS * V, V, ROWS, BLOCK_V)
    else:
        store_tile(dv, start, T, grad, HEADS * V, V, ROWS, BLOCK_V)
    v = head_base(v, batch, head // (HEADS // KV_HEADS), T, KV_HEADS, V)
    written = load_tile(v, start, T, KV_HEADS * V, V, ROWS, BLOCK_V, False).to(tl.float32)
    row_dot = tl.sum(written * grad, 1)
    store_row(dalpha + row, start, T, row_dot, ROWS)
    if SIMILARITY == "softmax":
        if HAS_ALPHA:
            row_dot *= load_row(alpha + row, start, T, ROWS)
        written = load_tile(head_base(u, batch, head, T, HEADS, V), start, T, HEADS * V, V, ROWS, BLOCK_V, False)
        row_dot = tl.sum(grad * written, 1) - row_dot
        if TIED:
            row_dot += load_row(rest_share + row, start, T, ROWS) * load_row(read_dot + row, start, T, ROWS)
        store_row(centre + padded(n, T), start, T, row_dot, ROWS)
    if HAS_BETA:
        summary = head_base(summary, batch, head, T, HEADS, V)
        past = load_tile(summary, start, T, HEADS * V, V, ROWS, BLOCK_V, False).to(tl.float32)
        store_row(dbeta + row, start, T, -tl.sum(grad * past, 1), ROWS)
        grad *= load_row(beta + row, start, T, ROWS)[:, None]
    grad = -grad
    if TIED:
        dout = head_base(dout, batch, head, T, HEADS, V)
        grad += kept_gradient(dout, rest_share + row, start, T, HEADS, V, ROWS, BLOCK_V)
    store_tile(head_base(adjoint, batch, head, T, HEADS, V), start, T, grad, HEADS * V, V, ROWS, BLOCK_V)


@triton.jit
def solve_parts_of_rows(
    inverse, inverse_low, n, start, T, v, alpha, beta, summary, du, dv, dalpha, dbeta, adjoint, adjoint_residue,
    HAS_ALPHA: tl.constexpr, HAS_BETA: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, V: tl.constexpr,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """`solve_rows` with the inverses in memory and H in two parts, of similarities that nothing normalises. What came
    in lies where dv goes. Some columns of the width at a time, so that parts and products have place in registers."""
    batch, head = n // HEADS, n % HEADS
    row = tl.cast(n, tl.int64) * T
    v = head_base(v, batch, head // (HEADS // KV_HEADS), T, KV_HEADS, V)
    summary = head_base(summary, batch, head, T, HEADS, V)
    du = head_base(du, batch, head, T, HEADS, V)
    dv = head_base(dv, batch, head, T, HEADS, V)
    inverse = load_inverse(inverse, n, start, T, ROWS)
    inverse_low = load_inverse(inverse_low, n, start, T, ROWS)
    adjoint = head_base(adjoint, batch, head, T, HEADS, V)
    adjoint_residue = head_base(adjoint_residue, batch, head, T, HEADS, V)
    alpha_dot, beta_dot = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    WIDTH: tl.constexpr = min(BLOCK_V, 64)
    for column in tl.range(0, BLOCK_V, WIDTH, num_stages=1):
        rest = load_columns(dv, start, T, column, HEADS * V, V, ROWS, WIDTH)
        rest += load_columns(du, start, T, column, HEADS * V, V, ROWS, WIDTH)
        high, low = parts(rest)
        grad = product_of_parts(tl.trans(inverse), tl.trans(inverse_low), high, low, True, PRECISION)
        written = load_columns(v, start, T, column, KV_HEADS * V, V, ROWS, WIDTH).to(tl.float32)
        alpha_dot += tl.sum(written * grad, 1)
        written = grad
        if HAS_ALPHA:
            written *= load_row(alpha + row, start, T, ROWS)[:, None]
        store_columns(dv, start, T, column, written, HEADS * V, V, ROWS, WIDTH)
        if HAS_BETA:
            past = load_columns(summary, start, T, column, HEADS * V, V, ROWS, WIDTH).to(tl.float32)
            beta_dot += tl.sum(grad * past, 1)
            grad *= load_row(beta + row, start, T, ROWS)[:, None]
        high, low = parts(-grad)
        store_columns(adjoint, start, T, column, high, HEADS * V, V, ROWS, WIDTH)
        store_columns(adjoint_residue, start, T, column, low, HEADS * V, V, ROWS, WIDTH)
    store_row(dalpha + row, start, T, alpha_dot, ROWS)
    if HAS_BETA:
        store_row(dbeta + row, start, T, -beta_dot, ROWS)


@triton.jit
def write_backward(
    w, k, v, alpha, beta, segments, last, inverse, inverse_low, u, operand, residue, summary, lse, du, dout,
    rest_share, read_dot, T, score_scale, dw, dk, dv, dalpha, dbeta, adjoint, adjoint_residue, centre, counters,
    B: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    HAS_ALPHA: tl.constexpr, HAS_BETA: tl.constexpr, HAS_SEGMENTS: tl.constexpr, TIED: tl.constexpr,
    SIMILARITY: tl.constexpr, POWER: tl.constexpr, PAIR: tl.constexpr, SCORE_PRECISION: tl.constexpr,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, HALVES: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr, GROUP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """As `write_forward`, with last [B,blocks]: the row after the last one that sees a block's last column; u and
    operand, residue: u in float32 (softmax) and as products take it; du [B,T,HEADS,V] float32, with π dO in it if
    TIED; HAS_BETA: summary (s) [B,T,HEADS,V]; TIED: dout [B,T,HEADS,V], rest_share (ρ), read_dot (dO·o) [B,HEADS,T]
    -> dw, dk [B,T,HEADS,K], dv [B,T,HEADS,V], dalpha, dbeta [B,HEADS,T], all float32, dw zeroed, dw and dk without
    their factor of scale; adjoint, and with PAIR adjoint_residue: H in operand's dtype; centre [B,HEADS,padded T],
    zeroed: D, or c. `score_scale` has log2(e) in it for softmax."""
    blocks = tl.cdiv(T, COLUMNS)
    n, later_blocks = draw(counters, B * HEADS, GROUP, blocks)
    counter = counters + 1 + n
    block = blocks - 1 - later_blocks
    batch, head = n // HEADS, n % HEADS
    begin = block * COLUMNS
    near = begin + COLUMNS
    far = near + COLUMNS
    end = tl.cdiv(T, ROWS) * ROWS
    if HAS_SEGMENTS:
        end = tl.maximum(tl.cdiv(tl.load(last + batch * blocks + block), ROWS) * ROWS, tl.minimum(near, end))
    keys = head_base(k, batch, head // (HEADS // KV_HEADS), T, KV_HEADS, K)
    keys = load_tile(keys, begin, T, KV_HEADS * K, K, COLUMNS, BLOCK_K, False)
    values = head_base(operand, batch, head, T, HEADS, V)
    values = load_tile(values, begin, T, HEADS * V, V, COLUMNS, BLOCK_V, False)
    low = values
    if PAIR:
        low = head_base(residue, batch, head, T, HEADS, V)
        low = load_tile(low, begin, T, HEADS * V, V, COLUMNS, BLOCK_V, False)
    dkeys = tl.zeros([COLUMNS, BLOCK_K], tl.float32)
    rest = tl.zeros([COLUMNS, BLOCK_V], tl.float32)

    # All but the nearest of the later blocks, as they get ready.
    while end > far:
        ready = tl.minimum(tl.maximum((blocks - done_blocks(counter)) * COLUMNS, far), end)
        dkeys, rest = write_rows(
            keys, values, low, dkeys, rest, n, begin, w, adjoint, adjoint_residue, lse, centre, dw, segments, ready,
            end, T, score_scale,
            HAS_SEGMENTS, False, True, True, HEADS, K, V, SIMILARITY, POWER, PAIR, SCORE_PRECISION, PRECISION,
            ROWS, COLUMNS, BLOCK_K, BLOCK_V, STAGES,
        )  # fmt: skip
        end = ready
    HALF: tl.constexpr = COLUMNS // HALVES
    # Put away: until they are needed again their registers are. dv's place is free until G is known.
    zero = unknown_zero(counter)
    n += zero
    begin += zero
    wide_k = head_base(dk, n // HEADS, n % HEADS, T, HEADS, K)
    wide_v = head_base(dv, n // HEADS, n % HEADS, T, HEADS, V)
    store_tile(wide_k, begin, T, dkeys, HEADS * K, K, COLUMNS, BLOCK_K)
    if TIED:
        rest = read_incoming(
            keys, values, rest, n, begin, w, dout, rest_share, lse, segments, T, score_scale,
            HAS_SEGMENTS, HEADS, K, V, SIMILARITY, POWER, SCORE_PRECISION, PRECISION, ROWS, COLUMNS, HALF,
            BLOCK_K, BLOCK_V,
        )  # fmt: skip
    store_tile(wide_v, begin, T, rest, HEADS * V, V, COLUMNS, BLOCK_V)
    tl.debug_barrier()

    # The block's own system needs no G: invert it before the nearest block is ready.
    if not PAIR:
        upper = own_inverse(
            n, begin, w, k, beta, lse, segments, T, score_scale, HAS_BETA, HAS_SEGMENTS, HEADS, KV_HEADS, K, HALF,
            BLOCK_K, SIMILARITY, POWER, SCORE_PRECISION, PRECISION,
        )  # fmt: skip
        if HALVES == 2:
            lower = own_inverse(
                n, begin + HALF, w, k, beta, lse, segments, T, score_scale, HAS_BETA, HAS_SEGMENTS, HEADS, KV_HEADS, K,
                HALF, BLOCK_K, SIMILARITY, POWER, SCORE_PRECISION, PRECISION,
            )  # fmt: skip

    zero = unknown_zero(counter)
    n += zero
    begin += zero
    wide_v = head_base(dv, n // HEADS, n % HEADS, T, HEADS, V)
    rest = load_tile(wide_v, begin, T, HEADS * V, V, COLUMNS, BLOCK_V, False)
    wait_for(counter, blocks - 1 - begin // COLUMNS)
    # Only what G needs; the gradients of these rows can wait until this block's G is out.
    dkeys, rest = write_rows(
        keys, values, low, dkeys, rest, n, begin, w, adjoint, adjoint_residue, lse, centre, dw, segments,
        begin + COLUMNS, end, T, score_scale,
        HAS_SEGMENTS, False, True, False, HEADS, K, V, SIMILARITY, POWER, PAIR, SCORE_PRECISION, PRECISION,
        ROWS, COLUMNS, BLOCK_K, BLOCK_V, 1,
    )  # fmt: skip
    if HALVES == 2:
        store_tile(wide_v, begin, T, rest, HEADS * V, V, COLUMNS, BLOCK_V)
        tl.debug_barrier()
        zero = unknown_zero(counter)
        n += zero
        begin += zero
        if PAIR:
            solve_parts_of_rows(
                inverse, inverse_low, n, begin + HALF, T, v, alpha, beta, summary, du, dv, dalpha, dbeta, adjoint,
                adjoint_residue,
                HAS_ALPHA, HAS_BETA, HEADS, KV_HEADS, V, PRECISION, HALF, BLOCK_V,
            )  # fmt: skip
        else:
            wide_v = head_base(dv, n // HEADS, n % HEADS, T, HEADS, V)
            rest = load_tile(wide_v, begin + HALF, T, HEADS * V, V, HALF, BLOCK_V, False)
            solve_rows(
                lower, rest, n, begin + HALF, T, v, alpha, beta, u, summary, du, dout, rest_share, read_dot, dv,
                dalpha, dbeta, adjoint, centre,
                HAS_ALPHA, HAS_BETA, TIED, HEADS, KV_HEADS, V, SIMILARITY, PRECISION, HALF, BLOCK_V,
            )  # fmt: skip
        tl.debug_barrier()
        # To the upper half of the columns the lower half of the rows is one more later block.
        zero = unknown_zero(counter)
        n += zero
        begin += zero
        half_keys = head_base(k, n // HEADS, n % HEADS // (HEADS // KV_HEADS), T, KV_HEADS, K)
        half_keys = load_tile(half_keys, begin, T, KV_HEADS * K, K, HALF, BLOCK_K, False)
        wide_v = head_base(dv, n // HEADS, n % HEADS, T, HEADS, V)
        rest = load_tile(wide_v, begin, T, HEADS * V, V, HALF, BLOCK_V, False)
        dkeys, rest = write_rows(
            half_keys, values, low, dkeys, rest, n, begin, w, adjoint, adjoint_residue, lse, centre, dw, segments,
            begin + HALF, tl.minimum(begin + COLUMNS, end), T, score_scale,
            HAS_SEGMENTS, False, True, False, HEADS, K, V, SIMILARITY, POWER, PAIR, SCORE_PRECISION, PRECISION,
            ROWS, HALF, BLOCK_K, BLOCK_V, 1,
        )  # fmt: skip
    zero = unknown_zero(counter)
    n += zero
    begin += zero
    if PAIR:
        wide_v = head_base(dv, n // HEADS, n % HEADS, T, HEADS, V)
        store_tile(wide_v, begin, T, rest, HEADS * V, V, HALF, BLOCK_V)
        tl.debug_barrier()
        zero = unknown_zero(counter)
        n += zero
        begin += zero
        solve_parts_of_rows(
            inverse, inverse_low, n, begin, T, v, alpha, beta, summary, du, dv, dalpha, dbeta, adjoint, adjoint_residue,
            HAS_ALPHA, HAS_BETA, HEADS, KV_HEADS, V, PRECISION, HALF, BLOCK_V,
        )  # fmt: skip
    else:
        solve_rows(
            upper, rest, n, begin, T, v, alpha, beta, u, summary, du, dout, rest_share, read_dot, dv, dalpha, dbeta,
            adjoint, centre,
            HAS_ALPHA, HAS_BETA, TIED, HEADS, KV_HEADS, V, SIMILARITY, PRECISION, HALF, BLOCK_V,
        )  # fmt: skip
    publish(counter, blocks - begin // COLUMNS)

    zero = unknown_zero(counter)
    n += zero
    begin += zero
    wide_k = head_base(dk, n // HEADS, n % HEADS, T, HEADS, K)
    dkeys = load_tile(wide_k, begin, T, HEADS * K, K, COLUMNS, BLOCK_K, False)
    dkeys, rest = write_rows(
        keys, values, low, dkeys, rest, n, begin, w, adjoint, adjoint_residue, lse, centre, dw, segments, begin, end, T,
        score_scale,
        HAS_SEGMENTS, True, False, True, HEADS, K, V, SIMILARITY, POWER, PAIR, SCORE_PRECISION, PRECISION,
        ROWS, COLUMNS, BLOCK_K, BLOCK_V, STAGES,
    )  # fmt: skip
    store_tile(wide_k, begin, T, dkeys, HEADS * K, K, COLUMNS, BLOCK_K)
