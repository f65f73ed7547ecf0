"""The inverse of I + A for a small strictly lower triangular A, in registers.

The ladder doubles the size of the blocks that are already inverted, and never forms a power of A:

    X ← X − X L_b X,      L_b: A inside the 2b×2b diagonal blocks but outside the b×b ones,      b = 1, 2, 4, …
"""

import triton
import triton.language as tl


@triton.jit
def invert(a, N: tl.constexpr, PRECISION: tl.constexpr):
    """(I + a)⁻¹, N×N. Entries of `a` on and above the diagonal are not used."""
    RUNGS: tl.constexpr = (N > 2) + (N > 4) + (N > 8) + (N > 16) + (N > 32) + (N > 64) + 1
    row = tl.arange(0, N)[:, None]
    column = tl.arange(0, N)[None, :]
    a = tl.where(row > column, a, 0.0)
    # The highest bit in which row and column differ says in which step an entry belongs to L_b. The first step, b = 1,
    # is done here.
    inverse = tl.where(row == column, 1.0, tl.where((row ^ column) == 1, -a, 0.0))
    # A loop, neither unrolled nor with code hoisted out of it: otherwise the masks and products of all steps would need
    # registers at the same time.
    for rung in tl.range(1, RUNGS, num_stages=1, disable_licm=True):
        below = tl.where(((row >> rung) ^ (column >> rung)) == 1, a, 0.0)
        left = tl.dot(inverse, below, input_precision=PRECISION)
        inverse -= tl.dot(left, inverse, input_precision=PRECISION)
    return inverse
