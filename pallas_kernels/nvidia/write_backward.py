"""The write's gradients: one sweep over blocks of columns from the last to the first. With M = I + diag(β) A, G = M⁻ᵀ dU:

    G_j = dU_j − Σ_{i>j} A_ij β_i G_i                  a transposed solve inside the block
    dS_ij = κ'(s_ij) (−β_i G_i·u_j − D_i),             D_i = −G_i·(α_i v_i − u_i) for softmax, 0 otherwise
    dV = α G,   dα_i = v_i·G_i,   dβ_i = −Σ_j A_ij G_i·u_j,   dW = scale · dS K,   dK = scale · dSᵀ W

A block follows its head's later blocks as they get ready (order.py), in five products per pair of tiles. Its own
triangular system needs no G and is inverted before the last of them is ready.

TIED: one softmax writes and reads. With P the write's weights, s its sums, π and ρ = 1 − π a row's own share and the rest:

    H_i = ρ_i dO_i − β_i G_i,    c_i = ρ_i dO_i·o_i + D_i,    G_j = dU_j + π_j dO_j + Σ_{i>j} P_ij H_i
    dS_ij = P_ij (H_i·u_j − c_i) for j < i,    dβ_i = −G_i·s_i

and the same five products serve both. What a row's own score adds is diagonal, and the caller's.

dW (and dβ) are added to memory tile by tile by several programs at once: their last bits differ from run to run.
"""

import triton
import triton.language as tl

from pallas_kernels.nvidia.memory import head_base, load_row, load_tile, store_row, store_tile
from pallas_kernels.nvidia.order import done_blocks, draw, publish, wait_for
from pallas_kernels.nvidia.read_backward import add_tile, score_gradient, weights_and_dots
from pallas_kernels.nvidia.solve import prepare, solve_transposed
from pallas_kernels.nvidia.weights import weights_again


@triton.jit
def write_rows(
    keys, values, dkeys, rest, w, adjoint, beta, lse, centre, dw, dbeta, segments, column_segments, column, begin, end,
    T, scale, score_scale,
    HAS_BETA: tl.constexpr, HAS_SEGMENTS: tl.constexpr, OWN: tl.constexpr, TIED: tl.constexpr, HEADS: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, SIMILARITY: tl.constexpr, POWER: tl.constexpr, SCORE_PRECISION: tl.constexpr,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dkeys and what comes in to the columns' G after the rows from `end` back to `begin`. OWN: the block's own rows,
    whose part in G is known already."""
    for back in tl.range(0, end - begin, ROWS, num_stages=STAGES):
        start = end - ROWS - back
        rows = load_tile(w, start, T, HEADS * K, K, ROWS, BLOCK_K, False)
        grads = load_tile(adjoint, start, T, HEADS * V, V, ROWS, BLOCK_V, False)
        weights, scores, dots, visible = weights_and_dots(
            keys, values, rows, grads, load_row(lse, start, T, ROWS), segments, column_segments, column, start, T,
            score_scale, HAS_SEGMENTS, OWN, False, ROWS, SIMILARITY, POWER, SCORE_PRECISION, PRECISION,
        )  # fmt: skip
        if TIED:
            if not OWN:
                rest = tl.dot(weights.to(values.dtype), grads, rest, input_precision=PRECISION)
        else:
            index = start + tl.arange(0, ROWS)
            tl.atomic_add(dbeta + index, -tl.sum(weights * dots, 0), mask=index < T, sem="relaxed")
            if HAS_BETA:
                gate = load_row(beta, start, T, ROWS)[None, :]
                dots = -gate * dots
                if not OWN:
                    rest = tl.dot((-gate * weights).to(values.dtype), grads, rest, input_precision=PRECISION)
            else:
                dots = -dots
                if not OWN:
                    rest = tl.dot((-weights).to(values.dtype), grads, rest, input_precision=PRECISION)
        if SIMILARITY == "softmax":
            dots -= load_row(centre, start, T, ROWS)[None, :]
        dscores = score_gradient(dots, scores, weights, visible, OWN or HAS_SEGMENTS, SIMILARITY).to(values.dtype)
        dkeys = tl.dot(dscores, rows.to(values.dtype), dkeys, input_precision=PRECISION)
        drows = tl.dot(tl.trans(dscores), keys.to(values.dtype), input_precision=PRECISION) * scale
        add_tile(dw, start, T, drows, HEADS * K, K, ROWS, BLOCK_K)
    return dkeys, rest


@triton.jit
def write_backward(
    w, k, v, alpha, beta, segments, last, u, operand, lse, du, dout, summary, rest_share, read_dot,
    T, scale, score_scale, dw, dk, dv, dalpha, dbeta, adjoint, centre, counters,
    B: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    HAS_ALPHA: tl.constexpr, HAS_BETA: tl.constexpr, HAS_SEGMENTS: tl.constexpr, TIED: tl.constexpr,
    SIMILARITY: tl.constexpr, POWER: tl.constexpr, SCORE_PRECISION: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, HALVES: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    GROUP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """As `write_forward`, with last [B,blocks]: the row after the last one that sees a block's last column; u and
    operand: u in float32 and as the products take it; du [B,T,HEADS,V] float32, with π dO in it if TIED; TIED: dout,
    summary (s) [B,T,HEADS,V], rest_share (ρ), read_dot (dO·o) [B,HEADS,T] ->
    dw, dk [B,T,HEADS,K], dv [B,T,HEADS,V], dalpha, dbeta [B,HEADS,T], all float32, dw and dbeta zeroed; adjoint: G, or
    H if TIED, in operand's dtype; centre: D, or c. `score_scale` has log2(e) in it for softmax, `scale` has not."""
    blocks = tl.cdiv(T, COLUMNS)
    n, later_blocks = draw(counters, B * HEADS, GROUP, blocks)
    block = blocks - 1 - later_blocks
    batch, head = n // HEADS, n % HEADS
    kv_head = head // (HEADS // KV_HEADS)
    row = tl.cast(n, tl.int64) * T
    begin = block * COLUMNS
    column = begin + tl.arange(0, COLUMNS)
    w = head_base(w, batch, head, T, HEADS, K)
    dw = head_base(dw, batch, head, T, HEADS, K)
    adjoint = head_base(adjoint, batch, head, T, HEADS, V)
    beta += row
    lse += row
    centre += row
    dbeta += row
    k = head_base(k, batch, kv_head, T, KV_HEADS, K)
    keys = load_tile(k, begin, T, KV_HEADS * K, K, COLUMNS, BLOCK_K, False)
    operand = head_base(operand, batch, head, T, HEADS, V)
    values = load_tile(operand, begin, T, HEADS * V, V, COLUMNS, BLOCK_V, False)
    end = blocks * COLUMNS
    column_segments = begin
    if HAS_SEGMENTS:
        segments += tl.cast(batch, tl.int64) * T
        column_segments = load_row(segments, begin, T, COLUMNS)
        end = tl.cdiv(tl.load(last + batch * blocks + block), ROWS) * ROWS
    dkeys = tl.zeros([COLUMNS, BLOCK_K], tl.float32)
    rest = load_tile(head_base(du, batch, head, T, HEADS, V), begin, T, HEADS * V, V, COLUMNS, BLOCK_V, False)

    # All but the nearest of the later blocks, as they get ready.
    near = begin + COLUMNS
    far = near + COLUMNS
    while end > far:
        ready = tl.minimum(tl.maximum((blocks - done_blocks(counters + 1 + n)) * COLUMNS, far), end)
        dkeys, rest = write_rows(
            keys, values, dkeys, rest, w, adjoint, beta, lse, centre, dw, dbeta, segments, column_segments, column,
            ready, end, T, scale, score_scale,
            HAS_BETA, HAS_SEGMENTS, False, TIED, HEADS, K, V, SIMILARITY, POWER, SCORE_PRECISION, PRECISION, ROWS,
            BLOCK_K, BLOCK_V, STAGES,
        )  # fmt: skip
        end = ready

    rows = load_tile(w, begin, T, HEADS * K, K, COLUMNS, BLOCK_K, False)
    scores = tl.dot(rows, tl.trans(keys), input_precision=SCORE_PRECISION) * score_scale
    strict = tl.arange(0, COLUMNS)[:, None] > tl.arange(0, COLUMNS)[None, :]
    if HAS_SEGMENTS:
        strict &= column_segments[:, None] == column_segments[None, :]
    own = weights_again(scores, strict, load_row(lse, begin, T, COLUMNS)[:, None], SIMILARITY, POWER, True)
    if TIED:
        kept = load_row(rest_share + row, begin, T, COLUMNS)
        grads = load_tile(head_base(dout, batch, head, T, HEADS, V), begin, T, HEADS * V, V, COLUMNS, BLOCK_V, False)
        grads = grads.to(tl.float32) * kept[:, None]
        rest += tl.dot(tl.trans(own), grads, input_precision=PRECISION)
    if HAS_BETA:
        own *= load_row(beta, begin, T, COLUMNS)[:, None]
    upper, below, lower = prepare(own, COLUMNS, HALVES, PRECISION)

    wait_for(counters + 1 + n, later_blocks)
    dkeys, rest = write_rows(
        keys, values, dkeys, rest, w, adjoint, beta, lse, centre, dw, dbeta, segments, column_segments, column,
        near, tl.maximum(end, near), T, scale, score_scale,
        HAS_BETA, HAS_SEGMENTS, False, TIED, HEADS, K, V, SIMILARITY, POWER, SCORE_PRECISION, PRECISION, ROWS,
        BLOCK_K, BLOCK_V, 1,
    )  # fmt: skip
    grad = solve_transposed(upper, below, lower, rest, COLUMNS, BLOCK_V, HALVES, PRECISION)
    v = head_base(v, batch, kv_head, T, KV_HEADS, V)
    written = load_tile(v, begin, T, KV_HEADS * V, V, COLUMNS, BLOCK_V, False).to(tl.float32)
    store_row(dalpha + row, begin, T, tl.sum(written * grad, 1), COLUMNS)
    dwritten = grad
    if HAS_ALPHA:
        gate = load_row(alpha + row, begin, T, COLUMNS)[:, None]
        written *= gate
        dwritten = gate * grad
    if SIMILARITY == "softmax":
        exact = load_tile(head_base(u, batch, head, T, HEADS, V), begin, T, HEADS * V, V, COLUMNS, BLOCK_V, False)
        row_dot = -tl.sum(grad * (written - exact), 1)
        if TIED:
            row_dot += kept * load_row(read_dot + row, begin, T, COLUMNS)
        store_row(centre, begin, T, row_dot, COLUMNS)
    store_tile(head_base(dv, batch, head, T, HEADS, V), begin, T, dwritten, HEADS * V, V, COLUMNS, BLOCK_V)
    if TIED:
        base = head_base(summary, batch, head, T, HEADS, V)
        past = load_tile(base, begin, T, HEADS * V, V, COLUMNS, BLOCK_V, False).to(tl.float32)
        store_row(dbeta, begin, T, -tl.sum(grad * past, 1), COLUMNS)
        if HAS_BETA:
            grad *= load_row(beta, begin, T, COLUMNS)[:, None]
        base = head_base(dout, batch, head, T, HEADS, V)
        grads = load_tile(base, begin, T, HEADS * V, V, COLUMNS, BLOCK_V, False).to(tl.float32)
        grad = kept[:, None] * grads - grad
    store_tile(adjoint, begin, T, grad, HEADS * V, V, COLUMNS, BLOCK_V)
    publish(counters + 1 + n, later_blocks + 1)

    dkeys, rest = write_rows(
        keys, values, dkeys, rest, w, adjoint, beta, lse, centre, dw, dbeta, segments, column_segments, column,
        begin, near, T, scale, score_scale,
        HAS_BETA, HAS_SEGMENTS, True, TIED, HEADS, K, V, SIMILARITY, POWER, SCORE_PRECISION, PRECISION, ROWS,
        BLOCK_K, BLOCK_V, 1,
    )  # fmt: skip
    store_tile(head_base(dk, batch, head, T, HEADS, K), begin, T, dkeys * scale, HEADS * K, K, COLUMNS, BLOCK_K)
