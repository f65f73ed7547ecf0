"""Similarities κ and their derivatives inside a kernel, and the running softmax sums (online softmax).

The scores are already multiplied by the scale. For softmax they are also multiplied by log2(e), because its
exponentials are computed as powers of two, which take one instruction each. The similarity is FORM.similarity, a
compile-time constant.
"""

import triton
import triton.language as tl

# The start of a running maximum. It is finite, so that the difference of two starts is 0 and not NaN.
LOWEST: tl.constexpr = tl.constexpr(-1e30)

LOG2_E = 1.4426950408889634


@triton.jit
def round_half_to_even(x):
    """x, float32, rounded to the nearest integer, ties to even."""
    # A float32 of 2^23 or more has no bits for a fraction, so adding 2^23 rounds to an integer, ties to even.
    size = tl.abs(x)
    whole = (size + 8388608.0) - 8388608.0
    whole = tl.where(size < 8388608.0, whole, size)
    return tl.where(x < 0, -whole, whole)


@triton.jit
def weight(scores, FORM: tl.constexpr):
    """κ(s). For softmax the numerator 2^s."""
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
    """(weights, running maximum, running normaliser, shrink) after one more tile of columns.

    For softmax the weights are 2^(s − m), with m the new maximum, and `shrink` is the factor that the old weighted sums
    must be multiplied by. For the other similarities the weights are κ(s), the sums do not change and `shrink` is 1.
    """
    if FORM.softmax:
        if MASKED:
            scores = tl.where(visible, scores, LOWEST)
        new = tl.maximum(highest, tl.max(scores, 1))
        weights = tl.exp2(scores - new[:, None])
        if MASKED:
            # In a row that has seen nothing, score and maximum are both LOWEST, and the power is 1. So mask again.
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
    """κ, recomputed from the scores and, for softmax, the rows' log-sum-exps in base 2. `lse` broadcasts against
    `scores`."""
    if FORM.softmax:
        scores = scores - lse
    if MASKED:
        # A hidden score may exceed its row's log-sum-exp, and the exponential could overflow. So mask before it too.
        scores = tl.where(visible, scores, 0.0)
    weights = weight(scores, FORM)
    if MASKED:
        weights = tl.where(visible, weights, 0.0)
    return weights


@triton.jit
def inverse_or_zero(total):
    """1/l of each row; 0 for a row that saw nothing."""
    return tl.where(total > 0, 1.0 / tl.where(total > 0, total, 1.0), 0.0)


@triton.jit
def log_sum(highest, total):
    """The log-sum-exp in base 2 of each row; 0 for a row that saw nothing, whose weights are masked anyway."""
    return tl.where(total > 0, highest + tl.log2(tl.where(total > 0, total, 1.0)), 0.0)
