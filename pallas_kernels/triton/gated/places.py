"""Which chunk of which head a program of the gated kernels works on."""

import triton
import triton.language as tl


@triton.jit
def chunk_of(number, T, HEADS: tl.constexpr, C: tl.constexpr):
    """Of the `number`-th of all heads' chunks: its batch row and head, its first token, its place in arrays
    [B, HEADS, n, …]."""
    chunks = tl.cdiv(T, C)
    n = number // chunks
    chunk = number % chunks
    return n // HEADS, n % HEADS, chunk * C, tl.cast(n, tl.int64) * chunks + chunk


@triton.jit
def segments_of(segments, batch, start, T, C: tl.constexpr):
    """The segments, [B, n C], of the chunk that begins at `start`."""
    return segments + tl.cast(batch, tl.int64) * tl.cdiv(T, C) * C + start


@triton.jit
def columns_of(number, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    """Where parts of a width go side by side: which head or chunk it is, and the first column."""
    parts: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    return number // parts, number % parts * COLUMNS
