"""Tiles of rows in and out of arrays [B, T, heads, width], read where they lie: no copy puts heads first."""

import dataclasses

import triton
import triton.language as tl


def block_width(width: int) -> int:
    """The width a tile takes in a kernel: a power of two, 16 at least."""
    return max(16, 1 << (width - 1).bit_length())


@dataclasses.dataclass(frozen=True)
class Layout:
    """How an array [B, T, heads, width] lies in memory, as a kernel's constant."""

    heads: int
    width: int

    @property
    def stride(self) -> int:
        """From one row of a head to the next."""
        return self.heads * self.width

    @property
    def block(self) -> int:
        """The width of its tiles."""
        return block_width(self.width)


@triton.jit
def head_base(x, batch, head, T, HEADS: tl.constexpr, WIDTH: tl.constexpr):
    """The first element of a head of x [B, T, HEADS, WIDTH]."""
    return x + (tl.cast(batch, tl.int64) * T * HEADS + head) * WIDTH


@triton.jit
def tile_pointers(base, start, STRIDE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """[ROWS, BLOCK] pointers to rows `start`…; 64-bit only where a long context needs it."""
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
    """Rows start … start + ROWS, 0 past T and past the width. WHOLE: the caller knows that they all lie before T."""
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
    """Numbers start … start + ROWS of a contiguous row of T; 0 past its end."""
    index = start + tl.arange(0, ROWS)
    return tl.load(base + index, mask=index < T, other=0)


@triton.jit
def load_segments(segments, start, T, HAS_SEGMENTS: tl.constexpr, ROWS: tl.constexpr):
    """The segments of the rows at `start`; without segments a number that nothing reads."""
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
    """Where row n begins in an array [rows, T padded to a multiple of 64]: aligned, so that neighbours load together,
    and with zeros where a last tile of 64 or fewer reads past T."""
    return tl.cast(n, tl.int64) * (tl.cdiv(T, 64) * 64)


@triton.jit
def columns_mask(start, T, column, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    return ((start + tl.arange(0, ROWS))[:, None] < T) & ((column + tl.arange(0, BLOCK))[None, :] < WIDTH)


@triton.jit
def load_columns(
    base, start, T, column, STRIDE: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """Rows start … start + ROWS, of each the columns `column` … column + BLOCK; 0 past T and past the width."""
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
    """The first element of what head n of B × HEADS uses of x: LAYOUT.heads or fewer, each shared by neighbours."""
    return head_base(x, n // HEADS, n % HEADS // (HEADS // LAYOUT.heads), T, LAYOUT.heads, LAYOUT.width)


@triton.jit
def load_rows(base, start, T, LAYOUT: tl.constexpr, ROWS: tl.constexpr, WHOLE: tl.constexpr = False):
    """`load_tile` of all columns of a head's array."""
    return load_tile(base, start, T, LAYOUT.stride, LAYOUT.width, ROWS, LAYOUT.block, WHOLE)


@triton.jit
def store_rows(base, start, T, tile, LAYOUT: tl.constexpr, ROWS: tl.constexpr):
    store_tile(base, start, T, tile, LAYOUT.stride, LAYOUT.width, ROWS, LAYOUT.block)
