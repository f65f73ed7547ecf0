"""The WY form of the delta rule in a chunk, and its gradients. heads/systems.py and channels/systems.py share it.

    X = (I + diag(β) A)⁻¹,      W = X diag(β) R,      U = X diag(β) V,      V' = U − W S = X diag(β) (V − R S)

S is the state that enters the chunk, and A is strictly lower triangular. Without decay or with one decay per head,
A = e^D ⊙ K Kᵀ and R = enter ⊙ K. With a decay per channel, A and R are kk and k_reads of channels/pairs.py. Sources:
Yang et al., arXiv 2406.06484, 2412.06464. The gradients were derived for this project."""

import triton
import triton.language as tl

from pallas_kernels.triton.gated.places import load_state, square
from pallas_kernels.triton.memory import head_base, load_columns, store_columns, store_tile
from pallas_kernels.triton.triangular import invert


@triton.jit
def inverse_of(
    pairs,
    b,
    inverse,
    block,
    STORE_INVERSE: tl.constexpr,
    SOLVE_PRECISION: tl.constexpr,
    C: tl.constexpr,
    TYPE: tl.constexpr,
):
    """X [C, C] in the dtype TYPE, also stored to `inverse` [B,HEADS,n,C,C] if STORE_INVERSE. `pairs` is A; its entries
    on and above the diagonal are not used."""
    solution = invert(pairs * b[:, None], C, SOLVE_PRECISION).to(TYPE)
    if STORE_INVERSE:
        tl.store(inverse + square(block, C), solution)
    return solution


@triton.jit
def store_wy_form(
    solution,
    reads,
    b,
    v,
    w,
    u,
    batch,
    head,
    start,
    T,
    HEADS: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    PRECISION: tl.constexpr,
    C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    VALUES: tl.constexpr,
):
    """Computes W = X reads and U = X diag(β) V of a chunk and stores them to w [B,T,HEADS,K] and u [B,T,HEADS,V].

    `solution` is X; `reads` [C, BLOCK_K] is diag(β) R; v is [B,T,HEADS,V].
    """
    w = head_base(w, batch, head, T, HEADS, K)
    store_tile(w, start, T, tl.dot(solution, reads, input_precision=PRECISION), HEADS * K, K, C, BLOCK_K)
    v = head_base(v, batch, head, T, HEADS, V)
    u = head_base(u, batch, head, T, HEADS, V)
    for column in tl.range(0, V, VALUES):
        values = load_columns(v, start, T, column, HEADS * V, V, C, VALUES)
        values = (values.to(tl.float32) * b[:, None]).to(reads.dtype)
        store_columns(u, start, T, column, tl.dot(solution, values, input_precision=PRECISION), HEADS * V, V, C, VALUES)


@triton.jit
def wy_gradients(
    keys,
    entering,
    b,
    v,
    written,
    dwritten,
    inverse,
    states,
    dv,
    batch,
    head,
    start,
    block,
    T,
    HEADS: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    HAS_GATES: tl.constexpr,
    PRECISION: tl.constexpr,
    C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    VALUES: tl.constexpr,
):
    """The gradients of the WY form of a chunk, with R = entering ⊙ keys.

    Reads dV' from `dwritten`. With Y = Xᵀ dV', stores dV = diag(β) Y to `dv` and returns

        −dV Sᵀ ⊙ entering  [C, BLOCK_K],      −Σ_k (dV Sᵀ ⊙ keys)  [C], 0 without gates,      −Y V'ᵀ  [C, C],
        Y·(V − R S)  [C]

    Without HAS_GATES, entering is 1."""
    v = head_base(v, batch, head, T, HEADS, V)
    dv = head_base(dv, batch, head, T, HEADS, V)
    written = head_base(written, batch, head, T, HEADS, V)
    dwritten = head_base(dwritten, batch, head, T, HEADS, V)
    dkeys = tl.zeros([C, BLOCK_K], tl.float32)
    dentering = tl.zeros([C], tl.float32)
    dsystem = tl.zeros([C, C], tl.float32)
    dbetas = tl.zeros([C], tl.float32)
    solution = tl.trans(tl.load(inverse + square(block, C)))
    for column in tl.range(0, V, VALUES, num_stages=1):
        state = load_state(states, block, column, K, V, BLOCK_K, VALUES)
        values = load_columns(written, start, T, column, HEADS * V, V, C, VALUES)
        dvalues = load_columns(dwritten, start, T, column, HEADS * V, V, C, VALUES)
        solved = tl.dot(solution, dvalues, input_precision=PRECISION)
        if HAS_GATES:
            # The product comes before the load of v, because the other order needs more registers.
            read = tl.dot(keys, state, input_precision=PRECISION) * entering[:, None]
            rest = load_columns(v, start, T, column, HEADS * V, V, C, VALUES).to(tl.float32) - read
        else:
            rest = load_columns(v, start, T, column, HEADS * V, V, C, VALUES).to(tl.float32)
            rest -= tl.dot(keys, state, input_precision=PRECISION)
        dbetas += tl.sum(solved * rest, 1)
        dsystem -= tl.dot(solved.to(keys.dtype), tl.trans(values), input_precision=PRECISION)
        solved *= b[:, None]
        store_columns(dv, start, T, column, solved, HEADS * V, V, C, VALUES)
        # The gradient of R = entering ⊙ keys is −dV Sᵀ; its product with keys is the gradient of entering.
        part = tl.dot(solved.to(keys.dtype), tl.trans(state), input_precision=PRECISION)
        if HAS_GATES:
            dentering -= tl.sum(part * keys.to(tl.float32), 1)
        dkeys -= part * entering[:, None]
    return dkeys, dentering, dsystem, dbetas
