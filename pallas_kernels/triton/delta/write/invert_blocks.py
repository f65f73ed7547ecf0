"""(I + diag(β) A)⁻¹ of blocks of rows on the diagonal.

Similarities that nothing normalises know their weights beforehand: between bfloat16 arrays their triangular systems are
inverted in a launch of their own, all at once, and the kernels in which one block waits for another only multiply by
them. Softmax's wait for its sums, and are inverted there, as are float32's.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from pallas_kernels.triton.delta.similarity import weights_again
from pallas_kernels.triton.delta.split_products import parts
from pallas_kernels.triton.memory import head_of, load_row, load_rows, load_tile, padded, store_tile
from pallas_kernels.triton.triangular import invert


class System(NamedTuple):
    """What the triangular systems are made of: pointers to whole arrays; T; what products of w and k are multiplied
    by."""

    w: tl.tensor
    k: tl.tensor
    beta: tl.tensor
    segments: tl.tensor
    T: tl.tensor
    scale: tl.tensor


@triton.jit
def own_scores(system, n, start, FORM: tl.constexpr, ROWS: tl.constexpr):
    """The scores of ROWS rows and as many columns from `start`, and which of them lie before the diagonal, unseen ones
    left out."""
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
    """(I + diag(β) A)⁻¹ of ROWS rows and as many columns from `start`. `system`: a System, or what has its fields."""
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
    """`own_inverse` of the block of HALVES × ROWS at `start`, of its upper and of its lower half, which may be one;
    of no account where the inverses lie in memory."""
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
    """Where the inverses of head n begin in an array [heads, T padded to a multiple of 2 ROWS, ROWS]: a block may be
    two such, and the second is read wherever the first is."""
    return inverse + tl.cast(n, tl.int64) * (tl.cdiv(T, 2 * ROWS) * 2 * ROWS * ROWS)


@triton.jit
def load_inverse(inverse, n, start, T, ROWS: tl.constexpr):
    """One part of the inverse of the rows at `start`."""
    return load_tile(inverse_base(inverse, n, T, ROWS), start, T, ROWS, ROWS, ROWS, ROWS, True)


@triton.jit
def invert_blocks(w, k, beta, segments, T, scale, high, low, FORM: tl.constexpr, ROWS: tl.constexpr):
    """w [B,T,heads,K], k [B,T,kv_heads,K], beta [B,heads,T], segments [B,T] -> high, low [B,heads,padded T,ROWS]: the
    two parts (split_products.py) of the inverses, T padded to a multiple of 2 ROWS."""
    blocks = tl.cdiv(T, 2 * ROWS) * 2
    n = tl.program_id(0) // blocks
    start = tl.program_id(0) % blocks * ROWS
    # No log-sum-exp: it is softmax's.
    system = System(w, k, beta, segments, T, scale)
    inverse_high, inverse_low = parts(own_inverse(system, beta, n, start, FORM, ROWS))
    end = blocks * ROWS
    store_tile(inverse_base(high, n, T, ROWS), start, end, inverse_high, ROWS, ROWS, ROWS, ROWS)
    store_tile(inverse_base(low, n, T, ROWS), start, end, inverse_low, ROWS, ROWS, ROWS, ROWS)
