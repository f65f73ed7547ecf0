"""Loads and stores tiles of rows of arrays [B, T, heads, width]. The arrays are not copied to heads-first order: the
rows of a head are read with a stride."""

import dataclasses

import triton
import triton.language as tl


def block_width(width: int) -> int:
    """The width of a tile in a kernel: `width` rounded up to a power of two, at least 16."""
    return max(16, 1 << (width - 1).bit_length())


@dataclasses.dataclass(frozen=True)
class Layout:
    """The memory layout of an array [B, T, heads, width], as a kernel's constant."""

    heads: int
    width: int

    @property
    def stride(self) -> int:
        """The number of elements from one row of a head to the next."""
        return self.heads * self.width

    @property
    def block(self) -> int:
        """The width of the array's tiles."""
        return block_width(self.width)


@triton.jit
def head_base(x, batch, head, T, HEADS: tl.constexpr, WIDTH: tl.constexpr):
    """Pointer to the first element of a head of x [B, T, HEADS, WIDTH]."""
    return x + (tl.cast(batch, tl.int64) * T * HEADS + head) * WIDTH


@triton.jit
def tile_pointers(base, start, STRIDE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """[ROWS, BLOCK] pointers to rows start … start + ROWS − 1. The offsets are 64-bit, which long contexts need."""
    row = tl.cast(start + tl.arange(0, ROWS), tl.int64)
    return base + row[:, None] * STRIDE + tl.arange(0, BLOCK)[None, :]


@triton.jit
def tile_mask(start, T, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    return ((start + tl.arange(0, ROWS))[:, None] < T) & (tl.arange(0, BLOCK)[None, :] < WIDTH)


@triton.jit
def load_tile(
    base,
    start,
    T,
    STRIDE: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """The tile of rows start … start + ROWS − 1, 0 past T and past the width. WHOLE: the caller knows that all rows lie
    before T."""
    pointers = tile_pointers(base, start, STRIDE, ROWS, BLOCK)
    if WHOLE:
        if WIDTH == BLOCK:
            return tl.load(pointers)
        else:
            return tl.load(pointers, mask=tl.arange(0, BLOCK)[None, :] < WIDTH, other=0.0)
    else:
        return tl.load(pointers, mask=tile_mask(start, T, WIDTH, ROWS, BLOCK), other=0.0)


@triton.jit
def store_tile(
    base, start, T, tile, STRIDE: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    pointers = tile_pointers(base, start, STRIDE, ROWS, BLOCK)
    tl.store(pointers, tile.to(base.dtype.element_ty), mask=tile_mask(start, T, WIDTH, ROWS, BLOCK))


@triton.jit
def load_row(base, start, T, ROWS: tl.constexpr):
    """Numbers start … start + ROWS − 1 of a contiguous array of T numbers, one per token; 0 past its end."""
    index = start + tl.arange(0, ROWS)
    return tl.load(base + index, mask=index < T, other=0)


@triton.jit
def load_segments(segments, start, T, HAS_SEGMENTS: tl.constexpr, ROWS: tl.constexpr):
    """The segment ids of the rows at `start`. Without segments, an unused number."""
    if HAS_SEGMENTS:
        return load_row(segments, start, T, ROWS)
    else:
        return start


@triton.jit
def store_row(base, start, T, numbers, ROWS: tl.constexpr):
    index = start + tl.arange(0, ROWS)
    tl.store(base + index, numbers, mask=index < T)


@triton.jit
def padded(n, T):
    """The offset of row n in an array [rows, T padded to a multiple of 64]. The padding aligns the rows, so that loads
    coalesce, and holds zeros, which a last tile of at most 64 rows reads past T."""
    return tl.cast(n, tl.int64) * (tl.cdiv(T, 64) * 64)


@triton.jit
def columns_mask(start, T, column, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    return ((start + tl.arange(0, ROWS))[:, None] < T) & ((column + tl.arange(0, BLOCK))[None, :] < WIDTH)


@triton.jit
def load_columns(
    base, start, T, column, STRIDE: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """Columns column … column + BLOCK − 1 of rows start … start + ROWS − 1; 0 past T and past the width."""
    pointers = tile_pointers(base + column, start, STRIDE, ROWS, BLOCK)
    return tl.load(pointers, mask=columns_mask(start, T, column, WIDTH, ROWS, BLOCK), other=0.0)


@triton.jit
def store_columns(
    base, start, T, column, tile, STRIDE: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    pointers = tile_pointers(base + column, start, STRIDE, ROWS, BLOCK)
    tl.store(pointers, tile.to(base.dtype.element_ty), mask=columns_mask(start, T, column, WIDTH, ROWS, BLOCK))


@triton.jit
def head_of(x, n, T, HEADS: tl.constexpr, LAYOUT: tl.constexpr):
    """Pointer to the head of x that head n of the B × HEADS heads uses. x has LAYOUT.heads heads, at most HEADS; each
    is shared by HEADS / LAYOUT.heads neighbouring heads."""
    return head_base(x, n // HEADS, n % HEADS // (HEADS // LAYOUT.heads), T, LAYOUT.heads, LAYOUT.width)


@triton.jit
def load_rows(base, start, T, LAYOUT: tl.constexpr, ROWS: tl.constexpr, WHOLE: tl.constexpr = False):
    """`load_tile` with an array's Layout."""
    return load_tile(base, start, T, LAYOUT.stride, LAYOUT.width, ROWS, LAYOUT.block, WHOLE)


@triton.jit
def store_rows(base, start, T, tile, LAYOUT: tl.constexpr, ROWS: tl.constexpr):
    store_tile(base, start, T, tile, LAYOUT.stride, LAYOUT.width, ROWS, LAYOUT.block)
