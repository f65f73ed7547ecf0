"""A decay per channel inside a chunk: decayed scores of pairs of tokens, decayed reads and writes. All chunks are
independent. With D_ij = Σ_{j<l≤i} g_l, a vector over the channels,

    kk_ij = k_i · (e^{D_ij} ⊙ k_j)  for j < i  (delta rule),      qk_ij = q_i · (e^{D_ij} ⊙ k_j)  for j ≤ i,
    k_reads, q_reads = e^{D_i,start} ⊙ (k_i, q_i),      writes_j = e^{D_end,j} ⊙ k_j,      total = e^{D_end,start}

The decay is inside the dot product, and is applied by halves. For rows in the second of two neighbouring blocks of b
tokens and columns in the first, the border between the blocks is the reference:

    x_i · (e^{D_ij} ⊙ k_j) = (e^{D_i,border} ⊙ x_i) · (e^{D_border,j} ⊙ k_j),      b = 1, 2, 4, … C/2.

At every b, a token is either in a first or in a second block. So it has one factor, which serves it both as a row and
as a column. This takes one exponential per token, channel and b, with an exponent of at most 0, and products of size
C×C×K, of which a mask keeps the pairs of neighbouring blocks. Each D is a sum of its own gates, never a difference of
two sums. Source of the reference rows: Yang et al., Gated Linear Attention, arXiv 2312.06635.
"""

import triton
import triton.language as tl

from pallas_kernels.triton.gated.places import chunk_of, key_base, segments_of, square
from pallas_kernels.triton.memory import head_base, load_columns, store_columns


@triton.jit
def meeting(level, C: tl.constexpr):
    """[C, C] mask: True if row and column lie in different blocks of a pair of neighbouring blocks of 2^level tokens.
    The mask is symmetric; a causal mask later selects the lower triangle."""
    block = tl.arange(0, C) >> level
    return (block ^ 1)[:, None] == block[None, :]


@triton.jit
def decay_to_border(until, after, level, C: tl.constexpr):
    """e^{D} between each token and the border between its block of 2^level tokens and the neighbouring block."""
    second = (tl.arange(0, C) >> level) & 1 == 1
    return tl.exp(tl.where(second[:, None], until, after))


@triton.jit
def doubled(until, after, level, C: tl.constexpr, KEYS: tl.constexpr):
    """(until, after) for blocks of 2^(level+1) tokens, given those for blocks of 2^level tokens.

    until: the sum of the gates of the token's block up to it, itself included. after: the sum of those after it.
    """
    row = tl.arange(0, C)
    second = (row >> level) & 1 == 1
    # until + after is the sum over a token's block; any token of the neighbouring block has that block's sum.
    neighbour = tl.broadcast_to((row ^ (1 << level))[:, None], [C, KEYS])
    beside = tl.gather(until + after, neighbour, 0)
    return until + tl.where(second[:, None], beside, 0.0), after + tl.where(second[:, None], 0.0, beside)


@triton.jit
def same_segment(segments, C: tl.constexpr):
    number = tl.load(segments + tl.arange(0, C))
    return number[:, None] == number[None, :]


@triton.jit
def enter_leave_total(until, after, segments, start, C: tl.constexpr, HAS_SEGMENTS: tl.constexpr):
    """(e^{D_i,start} [C, KEYS], e^{D_end,i} [C, KEYS], e^{D_end,start} [KEYS]), 0 across segments. until and after are
    the sums over the whole chunk."""
    row = tl.arange(0, C)
    enter, leave = tl.exp(until), tl.exp(after)
    total = tl.exp(tl.sum(tl.where((row == C - 1)[:, None], until, 0.0), 0))
    if HAS_SEGMENTS:
        number = tl.load(segments + row)
        before = tl.load(segments - 1, mask=start > 0, other=0)
        last = tl.load(segments + C - 1)
        enter = tl.where((number == before)[:, None], enter, 0.0)
        leave = tl.where((number == last)[:, None], leave, 0.0)
        total = tl.where(before == last, total, 0.0)
    return enter, leave, total


@triton.jit
def gated_channel_pairs(
    q,
    k,
    g,
    segments,
    T,
    kk,
    qk,
    k_reads,
    q_reads,
    writes,
    total,
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
    """The pairs, reads and writes of one chunk of one value head. Grid: B × HEADS × n programs.

    Reads q, k [B,T,K_HEADS,K], g [B,T,HEADS,K], segments [B,n C]. Writes qk [B,HEADS,n,C,C], q_reads, writes
    [B,T,HEADS,K] in q's dtype, total [B,HEADS,n,K]; if DELTA, also kk [B,HEADS,n,C,C] and k_reads [B,T,HEADS,K]. The
    loop takes KEYS channels at a time and keeps the sums of kk and qk on chip. C = 2^LEVELS.
    """
    batch, head, start, block = chunk_of(tl.program_id(0), T, HEADS, C)
    segments = segments_of(segments, batch, start, T, C)
    q = key_base(q, batch, head, T, HEADS, K_HEADS, K)
    k = key_base(k, batch, head, T, HEADS, K_HEADS, K)
    g = head_base(g, batch, head, T, HEADS, K)
    k_reads = head_base(k_reads, batch, head, T, HEADS, K)
    q_reads = head_base(q_reads, batch, head, T, HEADS, K)
    writes = head_base(writes, batch, head, T, HEADS, K)
    row = tl.arange(0, C)
    deleted = tl.zeros([C, C], tl.float32)
    read = tl.zeros([C, C], tl.float32)
    for column in tl.range(0, K, KEYS, num_stages=1):
        keys = load_columns(k, start, T, column, K_HEADS * K, K, C, KEYS)
        queries = load_columns(q, start, T, column, K_HEADS * K, K, C, KEYS)
        until = load_columns(g, start, T, column, HEADS * K, K, C, KEYS)
        after = tl.zeros([C, KEYS], tl.float32)
        own = tl.sum(queries.to(tl.float32) * keys.to(tl.float32), 1)
        read += tl.where(row[:, None] == row[None, :], own[:, None], 0.0)
        for level in tl.range(0, LEVELS, num_stages=1):
            decay = decay_to_border(until, after, level, C)
            meet = meeting(level, C)
            near_keys = (keys * decay).to(keys.dtype)
            near_queries = (queries * decay).to(keys.dtype)
            if DELTA:
                part = tl.dot(near_keys, tl.trans(near_keys), input_precision=PRECISION)
                deleted += tl.where(meet, part, 0.0)
            part = tl.dot(near_queries, tl.trans(near_keys), input_precision=PRECISION)
            read += tl.where(meet, part, 0.0)
            until, after = doubled(until, after, level, C, KEYS)
        enter, leave, left = enter_leave_total(until, after, segments, start, C, HAS_SEGMENTS)
        if DELTA:
            store_columns(k_reads, start, T, column, keys * enter, HEADS * K, K, C, KEYS)
        store_columns(q_reads, start, T, column, queries * enter, HEADS * K, K, C, KEYS)
        store_columns(writes, start, T, column, keys * leave, HEADS * K, K, C, KEYS)
        channel = column + tl.arange(0, KEYS)
        tl.store(total + block * K + channel, left, mask=channel < K)
    seen = row[:, None] >= row[None, :]
    if HAS_SEGMENTS:
        seen &= same_segment(segments, C)
    if DELTA:
        tl.store(kk + square(block, C), tl.where(seen, deleted, 0.0))
    tl.store(qk + square(block, C), tl.where(seen, read, 0.0).to(qk.dtype.element_ty))
