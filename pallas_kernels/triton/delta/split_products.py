"""Products of float32 numbers that are taken as two bfloat16 parts, x = h + l up to 2^-17 |x|:

    (h + l)(h' + l') ≈ h h' + h l' + l h'

three bfloat16 products for one, 2^-16 of the largest term: what u needs between bfloat16 arrays where no normaliser
keeps it small. What many tiles multiply is parted once and lies in memory as two arrays: it reaches the tensor cores
without passing through registers. What the caller's arrays hold has one part, and two products do.

So it is where FORM.operands is "pair" (form.py). Otherwise both operands of a product have the dtype of the one
that comes from memory, low parts are not looked at, and FORM says how float32 is multiplied. Smallest terms are added
first.
"""

import triton
import triton.language as tl


@triton.jit
def parts(x):
    """h, l."""
    x = x.to(tl.float32)
    high = x.to(tl.bfloat16)
    return high, (x - high.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def add_product(left, high, low, total, FORM: tl.constexpr):
    """total + left · (high + low), left computed here."""
    if FORM.pair:
        left_high, left_low = parts(left)
        total = tl.dot(left_low, high, total)
        total = tl.dot(left_high, low, total)
        return tl.dot(left_high, high, total)
    else:
        return tl.dot(left.to(high.dtype), high, total, input_precision=FORM.precision)


@triton.jit
def add_product_with_given(left, right, total, FORM: tl.constexpr):
    """total + left · right, left computed here, right as the caller's arrays have it."""
    if FORM.pair:
        left_high, left_low = parts(left)
        total = tl.dot(left_low, right, total)
        return tl.dot(left_high, right, total)
    else:
        return tl.dot(left.to(right.dtype), right, total, input_precision=FORM.precision)


@triton.jit
def product_of_given(left, right, FORM: tl.constexpr):
    """left · right, left as the caller's arrays have it, right computed here."""
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
    """(high + low) · right, right as the caller's arrays have it."""
    if FORM.pair:
        return tl.dot(high, right, tl.dot(low, right))
    else:
        return tl.dot(high, right, input_precision=FORM.precision)
