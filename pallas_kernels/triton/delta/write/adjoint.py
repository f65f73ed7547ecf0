"""The last step of the write's backward pass: G of rows whose sums over the later rows (`incoming`) are complete, and
what follows from G: dV, dα, dβ, and H and D for the earlier columns (backward.py)."""

from typing import NamedTuple

import triton
import triton.language as tl

from pallas_kernels.triton.delta.split_products import parts, product_of_parts
from pallas_kernels.triton.delta.write.invert_blocks import load_inverse
from pallas_kernels.triton.memory import (
    head_of,
    load_columns,
    load_row,
    load_rows,
    padded,
    store_columns,
    store_row,
    store_rows,
)


class Saved(NamedTuple):
    """Pointers to whole arrays: the residuals of the forward pass and the cotangents."""

    u: tl.tensor
    summary: tl.tensor
    lse: tl.tensor
    du: tl.tensor
    dout: tl.tensor
    past_share: tl.tensor
    read_dot: tl.tensor


class Gradients(NamedTuple):
    """Pointers to the whole arrays that a write's backward fills."""

    dw: tl.tensor
    dv: tl.tensor
    dalpha: tl.tensor
    dbeta: tl.tensor
    adjoint: tl.tensor
    adjoint_residue: tl.tensor
    centre: tl.tensor


@triton.jit
def kept_gradient(dout, past_share, start, T, OUT: tl.constexpr, ROWS: tl.constexpr):
    """ρ dO of the ROWS rows at `start`, in float32."""
    grads = load_rows(dout, start, T, OUT, ROWS).to(tl.float32)
    return grads * load_row(past_share, start, T, ROWS)[:, None]


@triton.jit
def store_adjoint(inverse, incoming, given, saved, gradients, n, start, FORM: tl.constexpr, ROWS: tl.constexpr):
    """Computes G = inverseᵀ (dU + incoming) of the ROWS rows at `start`, and stores dV, dα, dβ, D or c, and H."""
    VALUES: tl.constexpr = FORM.values
    U: tl.constexpr = FORM.u
    T = given.T
    row = tl.cast(n, tl.int64) * T
    incoming += load_rows(head_of(saved.du, n, T, FORM.heads, U), start, T, U, ROWS)
    grad = tl.dot(tl.trans(inverse), incoming, input_precision=FORM.precision)
    dv = head_of(gradients.dv, n, T, FORM.heads, U)
    if FORM.has_alpha:
        store_rows(dv, start, T, load_row(given.alpha + row, start, T, ROWS)[:, None] * grad, U, ROWS)
    else:
        store_rows(dv, start, T, grad, U, ROWS)
    if FORM.has_alpha or not FORM.has_beta:
        v = head_of(given.v, n, T, FORM.heads, VALUES)
        alpha_dot = tl.sum(load_rows(v, start, T, VALUES, ROWS).to(tl.float32) * grad, 1)
        if FORM.has_alpha:
            store_row(gradients.dalpha + row, start, T, alpha_dot, ROWS)
    # D = −G·(α v − u) = −β G·s = β dβ: with a β, u itself is not read.
    if FORM.has_beta:
        past = load_rows(head_of(saved.summary, n, T, FORM.heads, U), start, T, U, ROWS).to(tl.float32)
        beta_dot = -tl.sum(grad * past, 1)
        store_row(gradients.dbeta + row, start, T, beta_dot, ROWS)
        beta = load_row(given.beta + row, start, T, ROWS)
        centre = beta * beta_dot
        left = -beta[:, None] * grad
    else:
        if FORM.softmax:
            u = load_rows(head_of(saved.u, n, T, FORM.heads, U), start, T, U, ROWS)
            if FORM.has_alpha:
                alpha_dot *= load_row(given.alpha + row, start, T, ROWS)
            centre = tl.sum(grad * u, 1) - alpha_dot
        left = -grad
    if FORM.softmax:
        if FORM.tied:
            centre += load_row(saved.past_share + row, start, T, ROWS) * load_row(saved.read_dot + row, start, T, ROWS)
        store_row(gradients.centre + padded(n, T), start, T, centre, ROWS)
    if FORM.tied:
        dout = head_of(saved.dout, n, T, FORM.heads, U)
        left += kept_gradient(dout, saved.past_share + row, start, T, U, ROWS)
    store_rows(head_of(gradients.adjoint, n, T, FORM.heads, U), start, T, left, U, ROWS)


@triton.jit
def store_adjoint_in_parts(given, saved, gradients, n, start, FORM: tl.constexpr, ROWS: tl.constexpr):
    """`store_adjoint` for operands "pair": the inverses are in memory, H is stored in two parts, and there is no D. The
    sums over later rows are in the array dv. The loop takes at most 64 channels of V at a time, so that parts and
    products fit in registers."""
    VALUES: tl.constexpr = FORM.values
    U: tl.constexpr = FORM.u
    T = given.T
    row = tl.cast(n, tl.int64) * T
    v = head_of(given.v, n, T, FORM.heads, VALUES)
    summary = head_of(saved.summary, n, T, FORM.heads, U)
    du = head_of(saved.du, n, T, FORM.heads, U)
    dv = head_of(gradients.dv, n, T, FORM.heads, U)
    inverse = load_inverse(given.inverse, n, start, T, ROWS)
    inverse_low = load_inverse(given.inverse_low, n, start, T, ROWS)
    adjoint = head_of(gradients.adjoint, n, T, FORM.heads, U)
    adjoint_residue = head_of(gradients.adjoint_residue, n, T, FORM.heads, U)
    alpha_dot, beta_dot = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    WIDTH: tl.constexpr = min(U.block, 64)
    for column in tl.range(0, U.block, WIDTH, num_stages=1):
        incoming = load_columns(dv, start, T, column, U.stride, U.width, ROWS, WIDTH)
        incoming += load_columns(du, start, T, column, U.stride, U.width, ROWS, WIDTH)
        high, low = parts(incoming)
        grad = product_of_parts(tl.trans(inverse), tl.trans(inverse_low), high, low, FORM)
        dvalue = grad
        if FORM.has_alpha:
            value = load_columns(v, start, T, column, VALUES.stride, VALUES.width, ROWS, WIDTH).to(tl.float32)
            alpha_dot += tl.sum(value * grad, 1)
            dvalue *= load_row(given.alpha + row, start, T, ROWS)[:, None]
        store_columns(dv, start, T, column, dvalue, U.stride, U.width, ROWS, WIDTH)
        if FORM.has_beta:
            past = load_columns(summary, start, T, column, U.stride, U.width, ROWS, WIDTH).to(tl.float32)
            beta_dot += tl.sum(grad * past, 1)
            grad *= load_row(given.beta + row, start, T, ROWS)[:, None]
        high, low = parts(-grad)
        store_columns(adjoint, start, T, column, high, U.stride, U.width, ROWS, WIDTH)
        store_columns(adjoint_residue, start, T, column, low, U.stride, U.width, ROWS, WIDTH)
    if FORM.has_alpha:
        store_row(gradients.dalpha + row, start, T, alpha_dot, ROWS)
    if FORM.has_beta:
        store_row(gradients.dbeta + row, start, T, -beta_dot, ROWS)
