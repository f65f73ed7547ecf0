"""The inverses X = (I + diag(β) A)⁻¹ of the chunks' triangular systems (wy_form.py). All chunks are independent."""

import triton
import triton.language as tl

from pallas_kernels.triton.gated.places import chunk_of, row_or_one, square
from pallas_kernels.triton.gated.walk.chunk import decays_of, gates_of, load_keys
from pallas_kernels.triton.memory import head_of
from pallas_kernels.triton.triangular import invert


@triton.jit
def gated_invert(
    k, sums, segments, beta, T, inverse, FORM: tl.constexpr, SOLVE_PRECISION: tl.constexpr, C: tl.constexpr
):
    """X of one chunk of one value head. Grid: B × heads × n programs.

    Reads k [B,T,key_heads,K], sums (of gates) [B,heads,n,2,C], beta [B,heads,n C], segments [B,n C]. Writes inverse
    [B,heads,n,C,C] in k's dtype.
    """
    KEYS: tl.constexpr = FORM.keys
    batch, head, start, block = chunk_of(tl.program_id(0), T, FORM.heads, C)
    n = batch * FORM.heads + head
    gates = gates_of(n, sums, segments, beta, beta, beta, beta, inverse, T, FORM, C)
    keys = load_keys(head_of(k, n, T, FORM.heads, KEYS), start, T, FORM, C)
    pairs = tl.dot(keys, tl.trans(keys), input_precision=FORM.precision) * decays_of(gates, start, FORM, C)
    pairs *= row_or_one(gates.beta + start, C, FORM.has_beta)[:, None]
    tl.store(inverse + square(block, C), invert(pairs, C, SOLVE_PRECISION).to(keys.dtype))
