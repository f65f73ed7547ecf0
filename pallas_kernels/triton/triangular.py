"""The inverse of a small unit triangular matrix, I + A with A strictly lower triangular, in registers.

The ladder doubles the blocks that are inverted already and never forms a power of A,

    X ← X − X L_b X,      L_b: A inside the 2b-blocks but outside the b-blocks,      b = 1, 2, 4, …
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
