"""The triangular system of one block, (I + A) x = b or (I + A)ᵀ x = b, A strictly lower triangular, in registers.

A block of rows is solved as one tile or as two halves: each half's own tile is inverted by the ladder, which doubles
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
    a = tl.where(row > column, a, 0.0)
    # Row and column part at the highest bit in which they differ.
    inverse = tl.where(row == column, 1.0, tl.where((row ^ column) == 1, -a, 0.0))
    # A loop, not unrolled, and nothing taken out of it: masks and products of all rungs would compete for registers.
    for rung in tl.range(1, RUNGS, num_stages=1, disable_licm=True):
        below = tl.where(((row >> rung) ^ (column >> rung)) == 1, a, 0.0)
        left = tl.dot(inverse, below, input_precision=PRECISION)
        inverse -= tl.dot(left, inverse, input_precision=PRECISION)
    return inverse


@triton.jit
def halves(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The upper and the lower half of the rows of x."""
    return tl.split(tl.permute(tl.reshape(x, [2, ROWS // 2, COLUMNS]), (1, 2, 0)))


@triton.jit
def row_halves(x, ROWS: tl.constexpr):
    """The upper and the lower half of a row of numbers."""
    return tl.split(tl.permute(tl.reshape(x, [2, ROWS // 2]), (1, 0)))


@triton.jit
def joined_rows(upper, lower, ROWS: tl.constexpr):
    """The inverse of `row_halves`."""
    return tl.reshape(tl.permute(tl.join(upper, lower), (1, 0)), [ROWS])
