"""The walk back: a program carries a part of the cotangent of a head's state from the last chunk to the first.

    dV' = scale Pᵀ dO + leave ⊙ (K dS),      Y = Xᵀ dV'  (delta rule)  or  dV',
    dS ← total dS + scale (enter ⊙ Q)ᵀ dO − (β enter ⊙ K)ᵀ Y  (delta rule)

Grid and precision as in walk/forward.py."""

import triton
import triton.language as tl

from pallas_kernels.triton.gated.places import columns_of
from pallas_kernels.triton.gated.walk.chunk import (
    gates_of,
    load_border,
    load_inverse,
    load_keys,
    load_values,
    pairs_of,
    store_border,
    store_part,
    store_values,
    tokens_of,
)
from pallas_kernels.triton.memory import head_of


@triton.jit
def gated_walk_back(
    q,
    k,
    dout,
    inverse,
    sums,
    segments,
    beta,
    enter,
    leave,
    total,
    dfinal,
    T,
    scale,
    dstates,
    y,
    dinitial,
    FORM: tl.constexpr,
    C: tl.constexpr,
    VALUES: tl.constexpr,
):
    """Reads arrays as `gated_walk`, and dout [B,T,heads,V], dfinal [B,heads,K,V]. Writes dstates [B,heads,n,V,K], the
    cotangents of the states that leave the chunks; y [B,T,heads,V]; dinitial [B,heads,K,V]."""
    KEYS: tl.constexpr = FORM.keys
    LAYOUT: tl.constexpr = FORM.values
    chunks = tl.cdiv(T, C)
    n, column = columns_of(tl.program_id(0), FORM.value_width, VALUES)
    gates = gates_of(n, sums, segments, beta, enter, leave, total, inverse, T, FORM, C)
    q = head_of(q, n, T, FORM.heads, KEYS)
    k = head_of(k, n, T, FORM.heads, KEYS)
    dout = head_of(dout, n, T, FORM.heads, LAYOUT)
    y = head_of(y, n, T, FORM.heads, LAYOUT)
    dstate = load_border(dfinal, n, column, FORM, VALUES).to(tl.float32)
    for step in tl.range(0, chunks):
        chunk = chunks - 1 - step
        start = chunk * C
        tokens = tokens_of(gates, start, FORM, C)
        store_part(dstates, tl.cast(n, tl.int64) * chunks + chunk, column, dstate, FORM, VALUES)
        keys = load_keys(k, start, T, FORM, C)
        queries = load_keys(q, start, T, FORM, C)
        grads = load_values(dout, start, T, column, FORM, C, VALUES)
        pairs = pairs_of(queries, keys, gates, start, scale, FORM, C)
        solved = tl.dot(dstate.to(keys.dtype), tl.trans(keys), input_precision=FORM.precision)
        solved *= tokens.leaving[None, :]
        solved = tl.dot(grads, pairs, solved, input_precision=FORM.precision)
        if FORM.has_gates:
            dstate *= tl.load(gates.total + chunk)
        if FORM.delta:
            solution = load_inverse(gates, start, C)
            solved = tl.dot(solved.to(keys.dtype), solution, input_precision=FORM.precision)
        store_values(y, start, T, column, solved, FORM, C, VALUES)
        if FORM.delta:
            # Its sign lets the product be added to dS without a second accumulator.
            back = (solved * -(tokens.beta * tokens.entering)[None, :]).to(keys.dtype)
            dstate = tl.dot(back, keys, dstate, input_precision=FORM.precision)
        entered = (grads.to(tl.float32) * (tokens.entering * scale)[None, :]).to(keys.dtype)
        dstate = tl.dot(entered, queries, dstate, input_precision=FORM.precision)
    store_border(dinitial, n, column, dstate, FORM, VALUES)
