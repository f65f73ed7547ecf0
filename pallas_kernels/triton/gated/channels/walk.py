"""The forward walk with a decay per channel: a program carries a part of a head's state through all chunks and makes
the outputs there (walk/forward.py). It reads v, the arrays of pairs.py and the inverses X.

    V' = X diag(β) (V − k_reads S)  (delta rule)  or  V,
    O = scale (q_reads S + qk V'),      S ← total ⊙ S + writesᵀ V'

Letters and precision as in walk/forward.py; states and values are transposed, as in walk/chunk.py."""

import triton
import triton.language as tl

from pallas_kernels.triton.gated.places import chunk_of, columns_of, row_or_one, square
from pallas_kernels.triton.gated.walk.chunk import load_border, load_values, store_border, store_values
from pallas_kernels.triton.gated.wy_form import inverse_of
from pallas_kernels.triton.memory import head_of, load_row, load_rows


@triton.jit
def gated_channel_invert(
    kk,
    beta,
    T,
    inverse,
    HEADS: tl.constexpr,
    HAS_BETA: tl.constexpr,
    SOLVE_PRECISION: tl.constexpr,
    C: tl.constexpr,
):
    """X of one chunk of one value head. Grid: B × HEADS × n programs.

    Reads kk [B,HEADS,n,C,C] float32, beta [B,HEADS,n C]. Writes inverse [B,HEADS,n,C,C]."""
    _, _, _, block = chunk_of(tl.program_id(0), T, HEADS, C)
    b = row_or_one(beta + block * C, C, HAS_BETA)
    pairs = tl.load(kk + square(block, C))
    inverse_of(pairs, b, inverse, block, True, SOLVE_PRECISION, C, inverse.dtype.element_ty)


@triton.jit
def gated_channel_walk(
    qk,
    q_reads,
    k_reads,
    writes,
    v,
    inverse,
    beta,
    total,
    initial,
    T,
    scale,
    out,
    final,
    FORM: tl.constexpr,
    C: tl.constexpr,
    VALUES: tl.constexpr,
):
    """Reads qk, inverse [B,heads,n,C,C], q_reads, k_reads, writes [B,T,heads,K], v [B,T,heads,V], beta [B,heads,n C],
    total [B,heads,n,K], initial [B,heads,K,V]. Writes out [B,T,heads,V] and final [B,heads,K,V]."""
    KEYS: tl.constexpr = FORM.keys
    LAYOUT: tl.constexpr = FORM.values
    BLOCK_K: tl.constexpr = KEYS.block
    chunks = tl.cdiv(T, C)
    n, column = columns_of(tl.program_id(0), FORM.value_width, VALUES)
    q_reads = head_of(q_reads, n, T, FORM.heads, KEYS)
    k_reads = head_of(k_reads, n, T, FORM.heads, KEYS)
    writes = head_of(writes, n, T, FORM.heads, KEYS)
    v = head_of(v, n, T, FORM.heads, LAYOUT)
    out = head_of(out, n, T, FORM.heads, LAYOUT)
    first = tl.cast(n, tl.int64) * chunks
    state = load_border(initial, n, column, FORM, VALUES).to(tl.float32)
    for chunk in tl.range(0, chunks):
        start = chunk * C
        narrow = state.to(v.dtype.element_ty)
        written = load_values(v, start, T, column, FORM, C, VALUES)
        if FORM.delta:
            read = tl.dot(narrow, tl.trans(load_rows(k_reads, start, T, KEYS, C)), input_precision=FORM.precision)
            b = row_or_one(beta + (first + chunk) * C, C, FORM.has_beta)
            rest = ((written.to(tl.float32) - read) * b[None, :]).to(narrow.dtype)
            solution = tl.trans(tl.load(inverse + square(first + chunk, C)))
            written = tl.dot(rest, solution, input_precision=FORM.precision).to(narrow.dtype)
        state *= load_row(total + (first + chunk) * FORM.key_width, 0, FORM.key_width, BLOCK_K)[None, :]
        added = load_rows(writes, start, T, KEYS, C)
        state = tl.dot(written, added, state, input_precision=FORM.precision)
        read = tl.dot(narrow, tl.trans(load_rows(q_reads, start, T, KEYS, C)), input_precision=FORM.precision)
        pairs = tl.trans(tl.load(qk + square(first + chunk, C)))
        read = tl.dot(written, pairs, read, input_precision=FORM.precision) * scale
        store_values(out, start, T, column, read, FORM, C, VALUES)
    store_border(final, n, column, state, FORM, VALUES)
