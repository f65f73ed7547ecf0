"""The write's sums s_t = Σ_{i<t} P_ti u_i, which dβ needs; and, if tied (one softmax for write and read, w = q), the
read that follows from them:

    o_t = (1 − π_t) s_t + π_t u_t,    π_t = e^{s_tt} / (e^{s_tt} + Σ_{i<t} e^{s_ti})

π and 1 − π are computed separately, as two sigmoids, so that neither suffers from cancellation.
"""

import triton
import triton.language as tl

from pallas_kernels.triton.delta.read_forward import load_u
from pallas_kernels.triton.delta.similarity import weights_again
from pallas_kernels.triton.delta.split_products import add_product
from pallas_kernels.triton.delta.write.invert_blocks import own_scores
from pallas_kernels.triton.delta.write.u import columns_of
from pallas_kernels.triton.memory import head_of, load_row, load_rows, padded, store_row, store_rows


@triton.jit
def halves_of(numbers, ROWS: tl.constexpr):
    """(first half, second half) of ROWS numbers."""
    return tl.split(tl.permute(tl.reshape(numbers, [2, ROWS // 2]), (1, 0)))


@triton.jit
def shares(scores, log_total, seen, ROWS: tl.constexpr):
    """(π, 1 − π) of each row: the weights of the row's own token and of the earlier tokens. `seen` is more than 0 if
    there are earlier tokens."""
    index = tl.arange(0, ROWS)
    excess = tl.sum(tl.where(index[:, None] == index[None, :], scores, 0.0), 1) - log_total
    # Without earlier tokens, π = 1.
    own_share = tl.where(seen > 0, 1.0 / (1.0 + tl.exp2(tl.where(seen > 0, -excess, 0.0))), 1.0)
    past_share = tl.where(seen > 0, 1.0 / (1.0 + tl.exp2(tl.where(seen > 0, excess, 0.0))), 0.0)
    return own_share, past_share


@triton.jit
def store_summary(past, seen, given, written, n, start, FORM: tl.constexpr, ROWS: tl.constexpr):
    """Stores s of the ROWS rows at `start`; if tied, also o, π and 1 − π.

    `past`: the sums over the columns before `start`. `seen`: more than 0 for rows that see at least one column. u of
    the rows must have been stored before.
    """
    U: tl.constexpr = FORM.u
    T = given.T
    row = tl.cast(n, tl.int64) * T
    scores, visible = own_scores(given, n, start, FORM, ROWS)
    log_total = seen
    if FORM.softmax:
        log_total = load_row(written.lse + padded(n, T), start, T, ROWS)
    if FORM.tied:
        own_share, past_share = shares(scores, log_total, seen, ROWS)
        store_row(written.own_share + row, start, T, own_share, ROWS)
        store_row(written.past_share + row, start, T, past_share, ROWS)
    weights = weights_again(scores, visible, log_total[:, None], FORM, True)
    high, low = load_u(columns_of(given, written, n, FORM), start, FORM, ROWS)
    past = add_product(weights, high, low, past, FORM)
    store_rows(head_of(written.summary, n, T, FORM.heads, U), start, T, past, U, ROWS)
    if FORM.tied:
        own = load_rows(head_of(written.u, n, T, FORM.heads, U), start, T, U, ROWS)
        out = past_share[:, None] * past + own_share[:, None] * own
        store_rows(head_of(written.out, n, T, FORM.heads, U), start, T, out, U, ROWS)


@triton.jit
def store_summaries(
    upper_past, lower_past, seen, given, written, n, start, FORM: tl.constexpr, HALF: tl.constexpr, HALVES: tl.constexpr
):
    """`store_summary` of the whole block (HALVES = 1), or of its upper and its lower half."""
    U: tl.constexpr = FORM.u
    if FORM.pair:
        # The sums are still in the array u, because the two parts of u are stored elsewhere.
        upper_past = load_rows(head_of(written.u, n, given.T, FORM.heads, U), start, given.T, U, HALF)
    upper_seen, lower_seen = seen, seen
    if HALVES == 2:
        upper_seen, lower_seen = halves_of(seen, 2 * HALF)
    store_summary(upper_past, upper_seen, given, written, n, start, FORM, HALF)
    if HALVES == 2:
        store_summary(lower_past, lower_seen, given, written, n, start + HALF, FORM, HALF)
