"""The triangular system of one tile, (I + A) x = b or (I + A)ᵀ x = b, A strictly lower triangular, in registers.

A tile of N rows is solved as one block or as two halves: each diagonal block is inverted by the ladder, which doubles
the blocks that are inverted already and never forms a power of A,

    X ← X − X L_b X,      L_b: A inside the 2b-blocks but outside the b-blocks,      b = 1, 2, 4, …

and the halves are joined by substitution, which costs less than one inverse of the whole and is as exact.
"""

import triton
import triton.language as tl


@triton.jit
def invert(a, N: tl.constexpr, PRECISION: tl.constexpr):
    """(I + a)⁻¹, N×N; what `a` holds on and above the diagonal is not read."""
    RUNGS: tl.constexpr = (N > 2) + (N > 4) + (N > 8) + (N > 16) + (N > 32) + (N > 64) + 1
    row = tl.arange(0, N)[:, None]
    column = tl.arange(0, N)[None, :]
    inverse = tl.where(row == column, 1.0, 0.0)
    inverse -= tl.where((row // 2 == column // 2) & (row > column), a, 0.0)
    # A loop, not unrolled: unrolled, masks and products of all rungs compete for registers.
    for rung in tl.range(1, RUNGS, num_stages=1):
        inside = (row >> (rung + 1)) == (column >> (rung + 1))
        below = tl.where(inside & ((row >> rung) > (column >> rung)), a, 0.0)
        left = tl.dot(inverse, below, input_precision=PRECISION)
        inverse -= tl.dot(left, inverse, input_precision=PRECISION)
    return inverse


@triton.jit
def halves(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The upper and the lower half of the rows of x."""
    return tl.split(tl.permute(tl.reshape(x, [2, ROWS // 2, COLUMNS]), (1, 2, 0)))


@triton.jit
def joined(top, bottom, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The inverse of `halves`."""
    return tl.reshape(tl.permute(tl.join(top, bottom), (2, 0, 1)), [ROWS, COLUMNS])


@triton.jit
def column_halves(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The left and the right half of the columns of x."""
    return tl.split(tl.permute(tl.reshape(x, [ROWS, 2, COLUMNS // 2]), (0, 2, 1)))


@triton.jit
def prepare(a, N: tl.constexpr, HALVES: tl.constexpr, PRECISION: tl.constexpr):
    """What `solve` and `solve_transposed` need of A: inverses of its diagonal blocks, and the block below them."""
    if HALVES == 2:
        top, bottom = halves(a, N, N)
        first, _ = column_halves(top, N // 2, N)
        below, second = column_halves(bottom, N // 2, N)
        return invert(first, N // 2, PRECISION), below, invert(second, N // 2, PRECISION)
    else:
        inverse = invert(a, N, PRECISION)
        return inverse, inverse, inverse


@triton.jit
def solve(first, below, second, b, N: tl.constexpr, WIDTH: tl.constexpr, HALVES: tl.constexpr, PRECISION: tl.constexpr):
    """x [N, WIDTH] with (I + A) x = b."""
    if HALVES == 2:
        top, bottom = halves(b, N, WIDTH)
        top = tl.dot(first, top, input_precision=PRECISION)
        bottom -= tl.dot(below, top, input_precision=PRECISION)
        bottom = tl.dot(second, bottom, input_precision=PRECISION)
        return joined(top, bottom, N, WIDTH)
    else:
        return tl.dot(first, b, input_precision=PRECISION)


@triton.jit
def solve_transposed(
    first, below, second, b, N: tl.constexpr, WIDTH: tl.constexpr, HALVES: tl.constexpr, PRECISION: tl.constexpr
):
    """x [N, WIDTH] with (I + A)ᵀ x = b."""
    if HALVES == 2:
        top, bottom = halves(b, N, WIDTH)
        bottom = tl.dot(tl.trans(second), bottom, input_precision=PRECISION)
        top -= tl.dot(tl.trans(below), bottom, input_precision=PRECISION)
        top = tl.dot(tl.trans(first), top, input_precision=PRECISION)
        return joined(top, bottom, N, WIDTH)
    else:
        return tl.dot(tl.trans(first), b, input_precision=PRECISION)
