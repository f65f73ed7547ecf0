"""What the walk's kernels do in a chunk. The letters are those of wy_form.py and heads/reads.py.

States, values and their cotangents are transposed: rows are channels of V, columns are channels of K or tokens. Then
the state, V' and their cotangents are left operands of all products on the way from one state to the next. A left
operand may stay in registers, and the tensor cores take 64 rows at a time, of which V has more than a chunk."""

from typing import NamedTuple

import triton
import triton.language as tl

from pallas_kernels.triton.gated.places import load_state, row_or_one, segments_of, square, store_state
from pallas_kernels.triton.memory import load_columns, load_rows, load_tile, store_columns, store_tile


class Gates(NamedTuple):
    """Pointers to a head's numbers: those of beta, enter and leave at its first token, of sums [B,heads,n,2,C],
    total and inverse at its first chunk, of its batch row's segments at the first token."""

    sums: tl.tensor
    segments: tl.tensor
    beta: tl.tensor
    enter: tl.tensor
    leave: tl.tensor
    total: tl.tensor
    inverse: tl.tensor


class Tokens(NamedTuple):
    """The numbers of a chunk's tokens, [C] each; 1 if the array is absent."""

    beta: tl.tensor
    entering: tl.tensor
    leaving: tl.tensor


@triton.jit
def gates_of(n, sums, segments, beta, enter, leave, total, inverse, T, FORM: tl.constexpr, C: tl.constexpr):
    """The Gates of head n of the B × heads heads."""
    chunks = tl.cdiv(T, C)
    first = tl.cast(n, tl.int64) * chunks
    row = first * C
    segments = segments_of(segments, n // FORM.heads, 0, T, C)
    return Gates(sums + 2 * row, segments, beta + row, enter + row, leave + row, total + first, inverse + row * C)


@triton.jit
def tokens_of(gates, start, FORM: tl.constexpr, C: tl.constexpr):
    """The Tokens of the chunk that begins at `start`."""
    return Tokens(
        row_or_one(gates.beta + start, C, FORM.has_beta),
        row_or_one(gates.enter + start, C, FORM.has_gates),
        row_or_one(gates.leave + start, C, FORM.has_gates),
    )


@triton.jit
def load_inverse(gates, start, C: tl.constexpr):
    """X [C, C] of the chunk that begins at `start`."""
    return tl.load(gates.inverse + square(tl.cast(start // C, tl.int64), C))


@triton.jit
def decays_of(gates, start, FORM: tl.constexpr, C: tl.constexpr):
    """e^{D_ij} [C, C] for j ≤ i in one segment of the chunk that begins at `start`; 0 elsewhere.

    D is a difference of two sums of gates. They have two float32 parts each (launches.sums_of_gates), so that D keeps
    its digits after a strong decay. Unlike heads/decay.py, this adds up no rows, for which threads exchange numbers.
    """
    row = tl.arange(0, C)
    visible = row[:, None] >= row[None, :]
    if FORM.has_segments:
        number = tl.load(gates.segments + start + row)
        visible &= number[:, None] == number[None, :]
    if FORM.has_decay:
        high = tl.load(gates.sums + 2 * start + row)
        low = tl.load(gates.sums + 2 * start + C + row)
        between = (high[:, None] - high[None, :]) + (low[:, None] - low[None, :])
        return tl.where(visible, tl.exp(between), 0.0)
    else:
        return tl.where(visible, 1.0, 0.0)


@triton.jit
def load_keys(x, start, T, FORM: tl.constexpr, C: tl.constexpr):
    """The chunk's rows of q or k, whose head x points to: [C, BLOCK_K]."""
    KEYS: tl.constexpr = FORM.keys
    return load_rows(x + tl.cast(start, tl.int64) * KEYS.stride, 0, T - start, KEYS, C)


@triton.jit
def load_values(x, start, T, column, FORM: tl.constexpr, C: tl.constexpr, VALUES: tl.constexpr):
    """VALUES columns of the chunk's rows of an array [B,T,heads,V], whose head x points to: [VALUES, C]."""
    LAYOUT: tl.constexpr = FORM.values
    return tl.trans(
        load_columns(
            x + tl.cast(start, tl.int64) * LAYOUT.stride, 0, T - start, column, LAYOUT.stride, LAYOUT.width, C, VALUES
        )
    )


@triton.jit
def store_values(x, start, T, column, tile, FORM: tl.constexpr, C: tl.constexpr, VALUES: tl.constexpr):
    """Stores a tile [VALUES, C]; see `load_values`."""
    LAYOUT: tl.constexpr = FORM.values
    tile = tl.trans(tile.to(x.dtype.element_ty))
    store_columns(
        x + tl.cast(start, tl.int64) * LAYOUT.stride, 0, T - start, column, tile, LAYOUT.stride, LAYOUT.width, C, VALUES
    )


@triton.jit
def load_part(x, n, column, FORM: tl.constexpr, VALUES: tl.constexpr):
    """VALUES rows of the n-th transposed state of x [B,heads,n,V,K]: [VALUES, BLOCK_K]. n is 64-bit."""
    KEYS: tl.constexpr = FORM.keys
    base = x + n * FORM.key_width * FORM.value_width
    return load_tile(base, column, FORM.value_width, FORM.key_width, FORM.key_width, VALUES, KEYS.block, False)


@triton.jit
def store_part(x, n, column, state, FORM: tl.constexpr, VALUES: tl.constexpr):
    KEYS: tl.constexpr = FORM.keys
    base = x + n * FORM.key_width * FORM.value_width
    store_tile(base, column, FORM.value_width, state, FORM.key_width, FORM.key_width, VALUES, KEYS.block)


@triton.jit
def load_border(x, n, column, FORM: tl.constexpr, VALUES: tl.constexpr):
    """VALUES columns of the n-th state of x [B,heads,K,V], transposed: [VALUES, BLOCK_K]."""
    KEYS: tl.constexpr = FORM.keys
    n = tl.cast(n, tl.int64)
    return tl.trans(load_state(x, n, column, FORM.key_width, FORM.value_width, KEYS.block, VALUES))


@triton.jit
def store_border(x, n, column, state, FORM: tl.constexpr, VALUES: tl.constexpr):
    KEYS: tl.constexpr = FORM.keys
    n = tl.cast(n, tl.int64)
    store_state(x, n, column, tl.trans(state), FORM.key_width, FORM.value_width, KEYS.block, VALUES)


@triton.jit
def pairs_of(queries, keys, gates, start, scale, FORM: tl.constexpr, C: tl.constexpr):
    """scale · P [C, C] in the keys' dtype."""
    products = tl.dot(queries, tl.trans(keys), input_precision=FORM.precision)
    return (products * (decays_of(gates, start, FORM, C) * scale)).to(keys.dtype)


@triton.jit
def written_of(state, values, keys, solution, tokens, FORM: tl.constexpr):
    """V'ᵀ [VALUES, C] of Sᵀ in the keys' dtype, Vᵀ, K and X."""
    read = tl.dot(state, tl.trans(keys), input_precision=FORM.precision)
    rest = values.to(tl.float32) - read * tokens.entering[None, :]
    narrow = (rest * tokens.beta[None, :]).to(keys.dtype)
    return tl.dot(narrow, tl.trans(solution), input_precision=FORM.precision)


@triton.jit
def advanced(state, written, keys, tokens, gates, chunk, FORM: tl.constexpr):
    """Sᵀ as it leaves a chunk: total Sᵀ + V'ᵀ (leave ⊙ K)."""
    if FORM.has_gates:
        written *= tokens.leaving[None, :]
        state *= tl.load(gates.total + chunk)
    return tl.dot(written.to(keys.dtype), keys, state, input_precision=FORM.precision)
