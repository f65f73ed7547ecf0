"""κ and its slope inside a kernel, and the softmax sums that grow tile by tile.

Scores come in already multiplied by the scale, for softmax by log2(e) too: its exponentials are powers of two, one
instruction each. A similarity is the name "linear", "relu", "exp", "softmax" or "round", known while compiling.
"""

import triton
import triton.language as tl

# Where a running maximum starts: finite, so that the difference of two such starts is 0 and not NaN.
LOWEST: tl.constexpr = tl.constexpr(-1e30)

LOG2_E = 1.4426950408889634


@triton.jit
def round_half_to_even(x):
    """x in float32 to the nearest integer, ties to the even one."""
    # Adding 2^23 leaves a float32 no bits for a fraction, and addition rounds half to even.
    size = tl.abs(x)
    whole = (size + 8388608.0) - 8388608.0
    whole = tl.where(size < 8388608.0, whole, size)
    return tl.where(x < 0, -whole, whole)


@triton.jit
def weight(scores, FORM: tl.constexpr):
    """κ(s); for softmax the numerator, of scores in base two."""
    if FORM.softmax:
        return tl.exp2(scores)
    elif FORM.similarity == "exp":
        return tl.exp(scores)
    elif FORM.similarity == "relu":
        return tl.maximum(scores, 0.0)
    elif FORM.similarity == "round":
        return round_half_to_even(scores * FORM.power) / FORM.power
    else:
        return scores


@triton.jit
def times_slope(dots, scores, weights, FORM: tl.constexpr):
    """κ'(s) · dots, given κ(s)."""
    if FORM.softmax:
        return weights * dots
    elif FORM.similarity == "exp":
        return weights * dots
    elif FORM.similarity == "relu":
        return tl.where(weights > 0, dots, 0.0)
    else:
        return dots


@triton.jit
def absorb(scores, visible, highest, total, FORM: tl.constexpr, MASKED: tl.constexpr):
    """One more tile of columns: its weights, the running maximum and normaliser, and what the old sums shrink by.

    For softmax the weights are 2^(s − m), m the new maximum; otherwise κ(s), and the rest stays as it is.
    """
    if FORM.softmax:
        if MASKED:
            scores = tl.where(visible, scores, LOWEST)
        new = tl.maximum(highest, tl.max(scores, 1))
        weights = tl.exp2(scores - new[:, None])
        if MASKED:
            # In a row that has seen nothing both are LOWEST, and the power is 1.
            weights = tl.where(visible, weights, 0.0)
        shrink = tl.exp2(highest - new)
        return weights, new, total * shrink + tl.sum(weights, 1), shrink
    else:
        if MASKED:
            scores = tl.where(visible, scores, 0.0)
        weights = weight(scores, FORM)
        if MASKED:
            weights = tl.where(visible, weights, 0.0)
        return weights, highest, total, tl.full(highest.shape, 1.0, tl.float32)


@triton.jit
def weights_again(scores, visible, lse, FORM: tl.constexpr, MASKED: tl.constexpr):
    """κ recomputed from scores and, for softmax, log2 of the rows' sums; `lse` lines up with the scores."""
    if FORM.softmax:
        scores = scores - lse
    if MASKED:
        # A hidden score may lie above its row's sum: mask before the exponential too.
        scores = tl.where(visible, scores, 0.0)
    weights = weight(scores, FORM)
    if MASKED:
        weights = tl.where(visible, weights, 0.0)
    return weights


@triton.jit
def inverse_or_zero(total):
    """1/l, and 0 for a row that saw nothing."""
    return tl.where(total > 0, 1.0 / tl.where(total > 0, total, 1.0), 0.0)


@triton.jit
def log_sum(highest, total):
    """log2 of the normaliser; 0 in a row that saw nothing, where nothing multiplies it."""
    return tl.where(total > 0, highest + tl.log2(tl.where(total > 0, total, 1.0)), 0.0)
