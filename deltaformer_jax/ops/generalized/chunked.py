"""The chunked form of the generalized delta rule. It runs and trains on every platform.

In a chunk, write D_ij = Σ_{j<l≤i} g_l for the log decay between two of its tokens, and S for the state that enters it.
A query reads the state after its token, an erase key the state before it, which has not decayed by g_i yet. With

    qk_ij = q_i · (e^{D_ij} ⊙ k_j)  for j ≤ i,             bk_ij = b_i · (e^{D_ij − g_i} ⊙ k_j)  for j < i,
    q_reads_i = e^{D_i,start} ⊙ q_i,                       b_reads_i = e^{D_i,start − g_i} ⊙ b_i,
    k_writes_j = e^{D_end,j} ⊙ k_j,                        and qa, ba, a_writes in the same way with a_j for k_j,

what the erase keys of a chunk read solves a unit lower triangular system, and the rest are products:

    (I + ba) U = b_reads S + bk V
    O = q_reads S + qk V − qa U
    S ← Diag(e^{D_end,start}) S + k_writesᵀ V − a_writesᵀ U

The decays are inside the dot products. As in the gated ops' form (ops/gated/chunked_pairs.py), they are applied by
halves, down to single tokens: each D is a sum of gates, and no exponent is positive, so nothing can overflow.

T is cut into chunks of C tokens, and the n = T/C chunks into groups of G ≈ √(n/3). A scan runs over the groups; inside
one, a scan passes the state from chunk to chunk. JAX differentiates it, any number of times and in both modes, and
recomputes each group. The backward pass thus keeps, besides the arguments, a copy of them with heads first and a state
for every group, n/G · K V numbers per head. Inside one group it keeps a state for every chunk and, for each token,
about (9 log₂ C + 20) K + 12 C + 6 V numbers.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from deltaformer_jax.ops.common import heads as H
from deltaformer_jax.ops.common.tiles import accumulation_dtype
from deltaformer_jax.ops.common.triangular import halves, invert_blocks, join_blocks
from deltaformer_jax.ops.gated.chunked import chunks_of_a_group
from deltaformer_jax.ops.gated.chunked_pairs import dot, row_dots


@dataclasses.dataclass(frozen=True)
class Plan:
    """The static arguments of a call: the scale of the read, and the rows of a chunk (a power of two)."""

    scale: float
    chunk: int


class Inputs(NamedTuple):
    """The arrays of a call: query, key [B,T,H,K], value [B,T,Hv,V], erase_key, erase_write [B,T,H or Hv,K], log_decay
    [B,T,Hv,K] or None, state [B,Hv,K,V], real and resets [B,T] bools or None, as in `definition.recurrent`."""

    query: jax.Array
    key: jax.Array
    value: jax.Array
    erase_key: jax.Array
    erase_write: jax.Array
    log_decay: jax.Array | None
    state: jax.Array
    real: jax.Array | None
    resets: jax.Array | None


def generalized_chunked(plan: Plan, inputs: Inputs):
    """(output [B,T,Hv,V] in value's dtype, final state [B,Hv,K,V] in the accumulation dtype)."""
    value, real, resets = inputs.value, inputs.real, inputs.resets
    time, value_heads = value.shape[1:3]
    dtype = accumulation_dtype(value.dtype)
    size = chunks_of_a_group(-(-time // plan.chunk))
    rows = size * plan.chunk
    groups = -(-time // rows)

    def clean(x):
        """x, 0 at padding. A padding token then decays by e^0 = 1, erases 0, writes 0 and reads 0."""
        return x if real is None else jnp.where(real.reshape(*real.shape, *[1] * (x.ndim - 2)), x, 0)

    def grouped(x):
        """[B, T, ...] -> [groups, B, rows, ...], padded with zeros; None stays None."""
        x = H.pad_time(x, groups * rows)
        return None if x is None else jnp.moveaxis(x.reshape(x.shape[0], groups, rows, *x.shape[2:]), 1, 0)

    def load(x):
        """A group's x [B, rows, h, ...] -> [B, Hv, n, C, ...] in the accumulation dtype; None stays None."""
        if x is None:
            return None
        x = H.heads_first(H.repeat_heads(x.astype(dtype), value_heads))
        return x.reshape(*x.shape[:2], size, plan.chunk, *x.shape[3:])

    def group(state, inputs):
        *arrays, resets = inputs
        query, key, value, erase_key, erase_write, log_decay = map(load, arrays)
        local = None
        if resets is not None:
            local = jnp.cumsum(resets.reshape(-1, 1, size, plan.chunk), axis=-1, dtype=jnp.int32)
        pairs = _pairs(query * plan.scale, erase_key, key, erase_write, log_decay, local)
        out, state = _advance(pairs, value, state)
        return state, H.heads_last(out.reshape(*out.shape[:2], rows, -1))

    arrays = [None if x is None else grouped(clean(x)) for x in inputs[:6]]
    state, out = lax.scan(jax.checkpoint(group), inputs.state.astype(dtype), (*arrays, grouped(resets)))
    out = jnp.moveaxis(out, 0, 1).reshape(value.shape[0], groups * rows, *out.shape[3:])
    return clean(out[:, :time]).astype(value.dtype), state


class _Pairs(NamedTuple):
    """The state-independent arrays of chunks [B, h, n, ...], as defined above: qk, qa, bk, ba [..., C, C]; q_reads,
    b_reads, k_writes, a_writes [..., C, K]; total [..., K, 1], the decay of the state over a chunk."""

    qk: jax.Array
    qa: jax.Array
    bk: jax.Array
    ba: jax.Array
    q_reads: jax.Array
    b_reads: jax.Array
    k_writes: jax.Array
    a_writes: jax.Array
    total: jax.Array


def _pairs(q, b, k, a, log_decay, local) -> _Pairs:
    """The pairs of q, b, k, a, log_decay [B, h, n, C, K] (log_decay None: no decay). `local` [B, 1, n, C] or None is,
    for each token, the number of resets in the chunk up to it; tokens with equal `local` are in one segment."""
    batch, heads, _, chunk, width = k.shape
    # An axis of two comes first: of the rows (queries, erase keys), and of the columns (keys, erase writes). Then the
    # axis of chunks is an axis of blocks of b tokens: [2, B, h, n C/b, b, K].
    rows, columns = jnp.stack([q, b]), jnp.stack([k, a])
    blocks = lambda x, size: x.reshape(2, batch, heads, -1, size, width)
    gates = jnp.zeros_like(k) if log_decay is None else log_decay
    # until: the sum of a block's log decays up to each token, for queries with its own and for erase keys without it.
    # after: the sum of those after each token.
    until = blocks(jnp.stack([gates, jnp.zeros_like(gates)]), 1)
    after = jnp.zeros_like(until[0])
    own = jnp.stack([row_dots(q, k), row_dots(q, a)]).reshape(1, 2, batch, heads, -1, 1, 1)
    scores = jnp.concatenate([own, jnp.zeros_like(own)])
    size = 1
    while size < chunk:
        (first, second), (first_after, second_after) = halves(until), halves(after)
        later = jnp.exp(second) * halves(blocks(rows, size))[1]
        earlier = jnp.exp(first_after)[None] * halves(blocks(columns, size))[0]
        scores = join_blocks(scores, dot("r...ik,s...jk->rs...ij", later, earlier))
        passed = first[:1, ..., -1:, :]
        until = jnp.concatenate([first, second + passed], axis=-2)
        after = jnp.concatenate([first_after + second[0, ..., -1:, :], second_after], axis=-2)
        size *= 2
    enter, leave = jnp.exp(until), jnp.exp(after)
    total = enter[0, ..., -1:, :]
    if local is not None:
        keep = lambda seen, x: jnp.where(jnp.broadcast_to(seen, x.shape), x, 0)
        first, last = (local == 0)[..., None], (local == local[..., -1:])[..., None]
        scores = keep(local[..., :, None] == local[..., None, :], scores)
        enter, leave, total = keep(first, enter), keep(last, leave), keep(first[..., -1:, :], total)
    reads, writes = rows * enter, columns * leave[None]
    (qk, qa), (bk, ba) = scores
    return _Pairs(qk, qa, bk, ba, *reads, *writes, jnp.swapaxes(total, -1, -2))


def _advance(pairs: _Pairs, value, state):
    """(out [B, h, n, C, V], the state that leaves the last chunk) of a group's value and the state that enters it."""
    inverse, seen = _inverse(pairs.ba), dot("...ij,...jv->...iv", pairs.bk, value)
    added = dot("...ck,...cv->...kv", pairs.k_writes, value)
    parts = (inverse, seen, added, pairs.b_reads, pairs.a_writes, pairs.total)

    def chunk(state, parts):
        inverse, seen, added, b_reads, a_writes, total = parts
        erased = dot("...ij,...jv->...iv", inverse, seen + dot("...ck,...kv->...cv", b_reads, state))
        left = total * state + added - dot("...ck,...cv->...kv", a_writes, erased)
        return left, (state, erased)

    final, entered = lax.scan(chunk, state, jax.tree.map(lambda x: jnp.moveaxis(x, 2, 0), parts))
    states, erased = (jnp.moveaxis(x, 0, 2) for x in entered)
    out = dot("...ck,...kv->...cv", pairs.q_reads, states) + dot("...ij,...jv->...iv", pairs.qk, value)
    return out - dot("...ij,...jv->...iv", pairs.qa, erased), final


@jax.custom_jvp
def _inverse(a):
    """(I + A)⁻¹ of strictly lower triangular A [..., C, C]."""
    return invert_blocks(a)


@_inverse.defjvp
def _inverse_tangent(primals, tangents):
    """−(I + A)⁻¹ dA (I + A)⁻¹, so that the steps of the inversion are not differentiated one by one."""
    inverse = _inverse(*primals)
    return inverse, -dot("...ij,...jk->...ik", dot("...ij,...jk->...ik", inverse, *tangents), inverse)
