"""Products of float32 matrices as products of two bfloat16 parts, x = h + l up to 2^-17 |x|:

    (h + l)(h' + l') ≈ h h' + h l' + l h'

Three bfloat16 products take the place of one float32 product, with an error of 2^-16 of the largest term. u needs this
precision between bfloat16 arrays if the similarity has no normaliser that keeps u small.

A matrix that many tiles multiply (u) is split once and kept in memory as two arrays, so that the tensor cores can read
it without passing through registers. The caller's bfloat16 arrays have one part, so two products are enough for them.

This applies if FORM.operands is "pair" (form.py). Otherwise both operands are cast to the dtype of the operand that
comes from memory, low parts are ignored, and FORM.precision says how float32 is multiplied. The smallest terms are
added first.
"""

import triton
import triton.language as tl


@triton.jit
def parts(x):
    """(h, l), the two bfloat16 parts of x."""
    x = x.to(tl.float32)
    high = x.to(tl.bfloat16)
    return high, (x - high.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def add_product(left, high, low, total, FORM: tl.constexpr):
    """total + left · (high + low). `left` is float32 in registers."""
    if FORM.pair:
        left_high, left_low = parts(left)
        total = tl.dot(left_low, high, total)
        total = tl.dot(left_high, low, total)
        return tl.dot(left_high, high, total)
    else:
        return tl.dot(left.to(high.dtype), high, total, input_precision=FORM.precision)


@triton.jit
def add_product_with_given(left, right, total, FORM: tl.constexpr):
    """total + left · right. `left` is float32 in registers, `right` comes from the caller's arrays."""
    if FORM.pair:
        left_high, left_low = parts(left)
        total = tl.dot(left_low, right, total)
        return tl.dot(left_high, right, total)
    else:
        return tl.dot(left.to(right.dtype), right, total, input_precision=FORM.precision)


@triton.jit
def product_of_given(left, right, FORM: tl.constexpr):
    """left · right. `left` comes from the caller's arrays, `right` is float32 in registers."""
    if FORM.pair:
        high, low = parts(right)
        return tl.dot(left, high, tl.dot(left, low))
    else:
        return tl.dot(left, right.to(left.dtype), input_precision=FORM.precision)


@triton.jit
def product_of_parts(left_high, left_low, high, low, FORM: tl.constexpr):
    """(left_high + left_low) · (high + low)."""
    if FORM.pair:
        total = tl.dot(left_low, high)
        total = tl.dot(left_high, low, total)
        return tl.dot(left_high, high, total)
    else:
        return tl.dot(left_high, high, input_precision=FORM.precision)


@triton.jit
def product_of_parts_with_given(high, low, right, FORM: tl.constexpr):
    """(high + low) · right. `right` comes from the caller's arrays."""
    if FORM.pair:
        return tl.dot(high, right, tl.dot(low, right))
    else:
        return tl.dot(high, right, input_precision=FORM.precision)
