"""(I + diag(β) A)⁻¹ of the diagonal blocks of rows.

For operands "pair" (bfloat16 arrays, a similarity without a normaliser), the kernel `invert_blocks` here inverts all
systems in parallel, in a launch before the write. This is possible because these weights do not depend on row sums. The
write kernels, in which one block waits for another, then only multiply by the inverses. For softmax, the weights need
the row sums, so that the write kernels invert the systems themselves. They also do so for float32 arrays.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from pallas_kernels.triton.delta.similarity import weights_again
from pallas_kernels.triton.delta.split_products import parts
from pallas_kernels.triton.memory import head_of, load_row, load_rows, load_tile, padded, store_tile
from pallas_kernels.triton.triangular import invert


class System(NamedTuple):
    """The inputs of the triangular systems: pointers to whole arrays; T; the factor that products of w and k are
    multiplied by."""

    w: tl.tensor
    k: tl.tensor
    beta: tl.tensor
    segments: tl.tensor
    T: tl.tensor
    scale: tl.tensor


@triton.jit
def own_scores(system, n, start, FORM: tl.constexpr, ROWS: tl.constexpr):
    """(scores, mask) of the diagonal block of ROWS rows and columns at `start`. The mask is True for columns of the
    row's segment before the row."""
    QUERIES: tl.constexpr = FORM.queries
    KEYS: tl.constexpr = FORM.keys
    T = system.T
    w = head_of(system.w, n, T, FORM.heads, QUERIES)
    k = head_of(system.k, n, T, FORM.heads, KEYS)
    rows = load_rows(w, start, T, QUERIES, ROWS)
    keys = load_rows(k, start, T, KEYS, ROWS)
    scores = tl.dot(rows, tl.trans(keys), input_precision=FORM.score_precision) * system.scale
    index = tl.arange(0, ROWS)
    visible = index[:, None] > index[None, :]
    if FORM.has_segments:
        segments = system.segments + tl.cast(n // FORM.heads, tl.int64) * T
        visible &= load_row(segments, start, T, ROWS)[:, None] == load_row(segments, start, T, ROWS)[None, :]
    return scores, visible


@triton.jit
def own_inverse(system, lse, n, start, FORM: tl.constexpr, ROWS: tl.constexpr):
    """(I + diag(β) A)⁻¹ of the diagonal block of ROWS rows at `start`. `system` is a System or a tuple that has its
    fields, such as Given."""
    PRECISION: tl.constexpr = FORM.precision
    scores, visible = own_scores(system, n, start, FORM, ROWS)
    log_total = scores
    if FORM.softmax:
        log_total = load_row(lse + padded(n, system.T), start, system.T, ROWS)[:, None]
    weights = weights_again(scores, visible, log_total, FORM, True)
    if FORM.has_beta:
        weights *= load_row(system.beta + tl.cast(n, tl.int64) * system.T, start, system.T, ROWS)[:, None]
    return invert(weights, ROWS, PRECISION)


@triton.jit
def own_inverses(system, lse, n, start, FORM: tl.constexpr, ROWS: tl.constexpr, HALVES: tl.constexpr):
    """(upper, lower): `own_inverse` of the two halves, of ROWS rows each, of the block at `start`. With HALVES = 1, the
    block has ROWS rows, and both results are its inverse. For operands "pair" the results are unused numbers, because
    the inverses are in memory."""
    if FORM.pair:
        return start, start
    else:
        upper = own_inverse(system, lse, n, start, FORM, ROWS)
        lower = upper
        if HALVES == 2:
            lower = own_inverse(system, lse, n, start + ROWS, FORM, ROWS)
        return upper, lower


@triton.jit
def inverse_base(inverse, n, T, ROWS: tl.constexpr):
    """Pointer to the inverses of head n in an array [heads, T padded to a multiple of 2 ROWS, ROWS]. The padding is to
    2 ROWS because a block of the write may have two inverses, and reads the second even past T."""
    return inverse + tl.cast(n, tl.int64) * (tl.cdiv(T, 2 * ROWS) * 2 * ROWS * ROWS)


@triton.jit
def load_inverse(inverse, n, start, T, ROWS: tl.constexpr):
    """One part (high or low) of the inverse of the ROWS rows at `start`."""
    return load_tile(inverse_base(inverse, n, T, ROWS), start, T, ROWS, ROWS, ROWS, ROWS, True)


@triton.jit
def invert_blocks(w, k, beta, segments, T, scale, high, low, FORM: tl.constexpr, ROWS: tl.constexpr):
    """Inverts the diagonal blocks of ROWS rows of all heads. Grid: B × heads × (padded T / ROWS) programs, one per
    block; padded T is T rounded up to a multiple of 2 ROWS.

    Reads w [B,T,heads,K], k [B,T,kv_heads,K], beta [B,heads,T], segments [B,T]. Writes high and low
    [B,heads,padded T,ROWS], the two bfloat16 parts (split_products.py) of the inverses.
    """
    blocks = tl.cdiv(T, 2 * ROWS) * 2
    n = tl.program_id(0) // blocks
    start = tl.program_id(0) % blocks * ROWS
    # `beta` stands in for the log-sum-exps, which only softmax has and reads.
    system = System(w, k, beta, segments, T, scale)
    inverse_high, inverse_low = parts(own_inverse(system, beta, n, start, FORM, ROWS))
    end = blocks * ROWS
    store_tile(inverse_base(high, n, T, ROWS), start, end, inverse_high, ROWS, ROWS, ROWS, ROWS)
    store_tile(inverse_base(low, n, T, ROWS), start, end, inverse_low, ROWS, ROWS, ROWS, ROWS)
