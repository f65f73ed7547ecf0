"""Indexing in the gated kernels: which chunk of which head a program works on, and where its data are in memory."""

import triton
import triton.language as tl

from pallas_kernels.triton.memory import head_base, load_columns, store_columns


@triton.jit
def chunk_of(number, T, HEADS: tl.constexpr, C: tl.constexpr):
    """(batch row, head, first token, index in arrays [B·HEADS·n, …]) of chunk `number` of all heads' chunks."""
    chunks = tl.cdiv(T, C)
    n = number // chunks
    chunk = number % chunks
    return n // HEADS, n % HEADS, chunk * C, tl.cast(n, tl.int64) * chunks + chunk


@triton.jit
def columns_of(number, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    """(head or chunk, first column) of program `number`, if different programs take different columns of a width."""
    parts: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    return number // parts, number % parts * COLUMNS


@triton.jit
def key_base(x, batch, head, T, HEADS: tl.constexpr, K_HEADS: tl.constexpr, K: tl.constexpr):
    """Pointer to the key head of x [B,T,K_HEADS,K] that value head `head` of HEADS uses."""
    return head_base(x, batch, head // (HEADS // K_HEADS), T, K_HEADS, K)


@triton.jit
def segments_of(segments, batch, start, T, C: tl.constexpr):
    """Pointer to the segment numbers, in an array [B, n C], of the chunk that begins at `start`."""
    return segments + tl.cast(batch, tl.int64) * tl.cdiv(T, C) * C + start


@triton.jit
def square(block, C: tl.constexpr):
    """The offsets [C, C] of a chunk's matrix in an array [B, HEADS, n, C, C]."""
    index = tl.arange(0, C)
    return block * C * C + index[:, None] * C + index[None, :]


@triton.jit
def row_or_one(x, C: tl.constexpr, PRESENT: tl.constexpr):
    """C numbers at x; ones if the array is not PRESENT."""
    if PRESENT:
        return tl.load(x + tl.arange(0, C))
    else:
        return tl.full([C], 1.0, tl.float32)


@triton.jit
def load_state(x, n, column, K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, VALUES: tl.constexpr):
    """VALUES columns, from `column` on, of the n-th state [K,V] of x: [BLOCK_K, VALUES]. n is 64-bit."""
    return load_columns(x + n * K * V, 0, K, column, V, V, BLOCK_K, VALUES)


@triton.jit
def store_state(x, n, column, state, K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, VALUES: tl.constexpr):
    store_columns(x + n * K * V, 0, K, column, state, V, V, BLOCK_K, VALUES)
