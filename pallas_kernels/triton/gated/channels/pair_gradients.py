"""The gradients of queries, keys and channel decays, from the gradients of the outputs of pairs.py. All chunks and
all parts of the channels are independent.

At the level of blocks of b tokens, with E = e^D between a token and the border of its block, q' = E ⊙ q, k' = E ⊙ k,
and dqk, dkk masked to pairs of neighbouring blocks,

    dq' = dqk k',      dk' = dqkᵀ q' + (dkk + dkkᵀ) k',      dq += E ⊙ dq',      dk += E ⊙ dk',
    z = q' ⊙ dq' + k' ⊙ dk',      dg_l += Σ_{i≥l} z_i  in a second block,      Σ_{j<l} z_j  in a first

The sums run over the tokens of the block whose way to the border includes gate l. So every pair contributes only to the
gates that it spans, and nothing has to cancel. Derived for this project."""

import triton
import triton.language as tl

from pallas_kernels.triton.gated.channels.pairs import (
    decay_to_border,
    doubled,
    enter_leave_total,
    meeting,
    same_segment,
)
from pallas_kernels.triton.gated.places import chunk_of, columns_of, key_base, segments_of, square
from pallas_kernels.triton.memory import head_base, load_columns, load_row, store_columns


@triton.jit
def sums_of_rows(where, x, dsum, PRECISION: tl.constexpr):
    """dsum_l + Σ_i [where_li] x_i, multiplied in x's dtype."""
    return tl.dot(tl.where(where, 1.0, 0.0).to(x.dtype), x, dsum, input_precision=PRECISION)


@triton.jit
def gated_channel_pair_gradients(
    q,
    k,
    g,
    segments,
    to_border,
    dkk,
    dqk,
    dk_reads,
    dq_reads,
    dwrites,
    dtotal,
    T,
    dq,
    dk,
    dg,
    HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    K: tl.constexpr,
    HAS_SEGMENTS: tl.constexpr,
    DELTA: tl.constexpr,
    PRECISION: tl.constexpr,
    C: tl.constexpr,
    LEVELS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """The gradients of KEYS channels of one chunk of one value head. Grid: B × HEADS × n × ⌈K / KEYS⌉ programs.

    Reads the inputs of `gated_channel_pairs`, the gradients of its outputs in the outputs' shapes, and to_border
    [LEVELS,C,C], which is 1 if gate l lies between token i and the border of their block. Writes dq, dk, dg
    [B,T,HEADS,K].
    """
    number, column = columns_of(tl.program_id(0), K, KEYS)
    batch, head, start, block = chunk_of(number, T, HEADS, C)
    segments = segments_of(segments, batch, start, T, C)
    q = key_base(q, batch, head, T, HEADS, K_HEADS, K)
    k = key_base(k, batch, head, T, HEADS, K_HEADS, K)
    g = head_base(g, batch, head, T, HEADS, K)
    keys = load_columns(k, start, T, column, K_HEADS * K, K, C, KEYS)
    queries = load_columns(q, start, T, column, K_HEADS * K, K, C, KEYS)
    until = load_columns(g, start, T, column, HEADS * K, K, C, KEYS)
    after = tl.zeros([C, KEYS], tl.float32)
    row = tl.arange(0, C)
    below = row[:, None] > row[None, :]
    if HAS_SEGMENTS:
        below &= same_segment(segments, C)
    inside = square(0, C)
    read = tl.load(dqk + square(block, C))
    own = tl.sum(tl.where(row[:, None] == row[None, :], read, 0.0).to(tl.float32), 1)
    read = tl.where(below, read, 0.0).to(keys.dtype)
    if DELTA:
        deleted = tl.where(below, tl.load(dkk + square(block, C)), 0.0).to(keys.dtype)
        # The matrix is strictly lower triangular, so that this is dkk + dkkᵀ without rounding.
        deleted += tl.trans(deleted)
    dqueries = own[:, None] * keys
    dkeys = own[:, None] * queries
    dgates = tl.zeros([C, KEYS], tl.float32)
    # The gradient of the sum of the gates between each token and the border.
    dsum = tl.zeros([C, KEYS], to_border.dtype.element_ty)
    for level in tl.range(0, LEVELS, num_stages=1):
        # This product uses dsum of the previous level, so that it does not wait for this level's products.
        where = tl.load(to_border + tl.maximum(level - 1, 0) * C * C + inside)
        dgates = tl.dot(where, dsum, dgates, input_precision=PRECISION)
        decay = decay_to_border(until, after, level, C)
        meet = meeting(level, C)
        near_keys = (keys * decay).to(keys.dtype)
        near_queries = (queries * decay).to(keys.dtype)
        pairs = tl.where(meet, read, 0.0).to(keys.dtype)
        part = decay * tl.dot(pairs, near_keys, input_precision=PRECISION)
        dqueries += part
        change = queries * part
        # These products are not accumulated into one another: Triton would let every group of four warps compute the
        # whole of such a chain.
        part = decay * tl.dot(tl.trans(pairs), near_queries, input_precision=PRECISION)
        dkeys += part
        change += keys * part
        if DELTA:
            part = decay * tl.dot(tl.where(meet, deleted, 0.0).to(keys.dtype), near_keys, input_precision=PRECISION)
            dkeys += part
            change += keys * part
        dsum = change.to(dsum.dtype)
        until, after = doubled(until, after, level, C, KEYS)
    where = tl.load(to_border + (LEVELS - 1) * C * C + inside)
    dgates = tl.dot(where, dsum, dgates, input_precision=PRECISION)
    enter, leave, left = enter_leave_total(until, after, segments, start, C, HAS_SEGMENTS)
    dnear_queries = load_columns(head_base(dq_reads, batch, head, T, HEADS, K), start, T, column, HEADS * K, K, C, KEYS)
    dqueries += enter * dnear_queries
    change = queries * dnear_queries.to(tl.float32)
    if DELTA:
        dnear_keys = load_columns(
            head_base(dk_reads, batch, head, T, HEADS, K), start, T, column, HEADS * K, K, C, KEYS
        )
        dkeys += enter * dnear_keys
        change += keys * dnear_keys.to(tl.float32)
    dgates = sums_of_rows(row[None, :] >= row[:, None], (enter * change).to(dsum.dtype), dgates, PRECISION)
    store_columns(head_base(dq, batch, head, T, HEADS, K), start, T, column, dqueries, HEADS * K, K, C, KEYS)
    dnear_keys = load_columns(head_base(dwrites, batch, head, T, HEADS, K), start, T, column, HEADS * K, K, C, KEYS)
    dkeys += leave * dnear_keys
    change = keys * dnear_keys.to(tl.float32)
    dgates = sums_of_rows(row[None, :] < row[:, None], (leave * change).to(dsum.dtype), dgates, PRECISION)
    store_columns(head_base(dk, batch, head, T, HEADS, K), start, T, column, dkeys, HEADS * K, K, C, KEYS)
    dgates += (left * load_row(dtotal + block * K, column, K, KEYS))[None, :]
    store_columns(head_base(dg, batch, head, T, HEADS, K), start, T, column, dgates, HEADS * K, K, C, KEYS)
