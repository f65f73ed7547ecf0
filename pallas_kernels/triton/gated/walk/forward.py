"""The walk: a program carries a part of a head's state through all chunks, and makes everything that needs it there.

    V' = X diag(β) (V − enter ⊙ (K S))  (delta rule)  or  V,
    O = scale (enter ⊙ (Q S) + P V'),      S ← total S + (leave ⊙ K)ᵀ V'

Neither W, U, V' nor S is written to memory. Grid: B × heads × ⌈V / VALUES⌉ programs, of VALUES columns of the state
each. The part of the state stays on chip in float32 and is rounded to the inputs' dtype for products. Between two
states lie three dependent products; those of Q and P are beside them."""

import triton
import triton.language as tl

from pallas_kernels.triton.gated.places import columns_of
from pallas_kernels.triton.gated.walk.chunk import (
    advanced,
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
    written_of,
)
from pallas_kernels.triton.memory import head_of


@triton.jit
def gated_walk(
    q,
    k,
    v,
    inverse,
    sums,
    segments,
    beta,
    enter,
    leave,
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
    """The forward pass.

    Reads q, k [B,T,key_heads,K], v [B,T,heads,V], inverse (X) [B,heads,n,C,C], sums (of gates) [B,heads,n,2,C], beta,
    enter, leave [B,heads,n C], segments [B,n C], total [B,heads,n], initial [B,heads,K,V]. Writes out [B,T,heads,V]
    and final [B,heads,K,V].
    """
    KEYS: tl.constexpr = FORM.keys
    LAYOUT: tl.constexpr = FORM.values
    n, column = columns_of(tl.program_id(0), FORM.value_width, VALUES)
    gates = gates_of(n, sums, segments, beta, enter, leave, total, inverse, T, FORM, C)
    q = head_of(q, n, T, FORM.heads, KEYS)
    k = head_of(k, n, T, FORM.heads, KEYS)
    v = head_of(v, n, T, FORM.heads, LAYOUT)
    out = head_of(out, n, T, FORM.heads, LAYOUT)
    state = load_border(initial, n, column, FORM, VALUES).to(tl.float32)
    for chunk in tl.range(0, tl.cdiv(T, C)):
        start = chunk * C
        tokens = tokens_of(gates, start, FORM, C)
        keys = load_keys(k, start, T, FORM, C)
        queries = load_keys(q, start, T, FORM, C)
        pairs = pairs_of(queries, keys, gates, start, scale, FORM, C)
        narrow = state.to(keys.dtype)
        written = load_values(v, start, T, column, FORM, C, VALUES).to(tl.float32)
        if FORM.delta:
            written = written_of(narrow, written, keys, load_inverse(gates, start, C), tokens, FORM)
        state = advanced(state, written, keys, tokens, gates, chunk, FORM)
        read = tl.dot(narrow, tl.trans(queries), input_precision=FORM.precision)
        read *= (tokens.entering * scale)[None, :]
        read = tl.dot(written.to(keys.dtype), tl.trans(pairs), read, input_precision=FORM.precision)
        store_values(out, start, T, column, read, FORM, C, VALUES)
    store_border(final, n, column, state, FORM, VALUES)


@triton.jit
def gated_walk_states(
    k,
    v,
    inverse,
    sums,
    segments,
    beta,
    enter,
    leave,
    total,
    initial,
    T,
    states,
    made,
    FORM: tl.constexpr,
    C: tl.constexpr,
    VALUES: tl.constexpr,
):
    """The states that enter the chunks, and V', for the backward pass. Reads arrays as `gated_walk`. Writes states
    [B,heads,n,V,K] and, if delta, made (V') [B,T,heads,V]."""
    KEYS: tl.constexpr = FORM.keys
    LAYOUT: tl.constexpr = FORM.values
    chunks = tl.cdiv(T, C)
    n, column = columns_of(tl.program_id(0), FORM.value_width, VALUES)
    gates = gates_of(n, sums, segments, beta, enter, leave, total, inverse, T, FORM, C)
    k = head_of(k, n, T, FORM.heads, KEYS)
    v = head_of(v, n, T, FORM.heads, LAYOUT)
    made = head_of(made, n, T, FORM.heads, LAYOUT)
    state = load_border(initial, n, column, FORM, VALUES).to(tl.float32)
    for chunk in tl.range(0, chunks):
        start = chunk * C
        tokens = tokens_of(gates, start, FORM, C)
        keys = load_keys(k, start, T, FORM, C)
        store_part(states, tl.cast(n, tl.int64) * chunks + chunk, column, state, FORM, VALUES)
        written = load_values(v, start, T, column, FORM, C, VALUES).to(tl.float32)
        if FORM.delta:
            solution = load_inverse(gates, start, C)
            written = written_of(state.to(keys.dtype), written, keys, solution, tokens, FORM)
            store_values(made, start, T, column, written, FORM, C, VALUES)
        state = advanced(state, written, keys, tokens, gates, chunk, FORM)
