"""The decay between two tokens of a chunk, 0 across segments, and its gradient."""

import triton
import triton.language as tl


@triton.jit
def decays(g, segments, C: tl.constexpr, HAS_DECAY: tl.constexpr, HAS_SEGMENTS: tl.constexpr):
    """[C, C]: e^{D_ij}, D_ij = Σ_{j<l≤i} g_l, for j ≤ i in one segment; 0 elsewhere. g and segments point to the
    chunk's first token.

    Each D is a sum of its own gates, not a difference of two sums: after a strong decay, a difference would have lost
    the digits of the weak decays. No exponent is positive.
    """
    row = tl.arange(0, C)
    visible = row[:, None] >= row[None, :]
    if HAS_SEGMENTS:
        number = tl.load(segments + row)
        visible &= number[:, None] == number[None, :]
    if HAS_DECAY:
        gates = tl.load(g + row)
        between = tl.cumsum(tl.where(row[:, None] > row[None, :], gates[:, None], 0.0), 0)
        return tl.where(visible, tl.exp(between), 0.0)
    else:
        return tl.where(visible, 1.0, 0.0)


@triton.jit
def gate_gradient(dbetween, C: tl.constexpr):
    """The gradient of the gates [C] from the gradient of D [C, C]: dg_l = Σ_{j<l≤i} dD_ij."""
    row = tl.arange(0, C)
    later = tl.cumsum(dbetween, 0, reverse=True)
    return tl.sum(tl.where(row[:, None] > row[None, :], later, 0.0), 1)
