"""Passes the state through a group of chunks, forward and backward, given the group's `Pairs` (chunked_pairs).

With S the state that enters a chunk and V' the values that the chunk writes,

    gated linear attention    V' = V
    gated delta rule          V' = (I + diag(β) A)⁻¹ diag(β) (V − k_reads S),      A = kk, strictly lower
    both                      O = q_reads S + qk V',      S ← total ⊙ S + writesᵀ V'

The inverse is multiplied by the right-hand side, which has V columns, inside the scan. The matrix W = T diag(β e^γ) K
of the usual WY form is not computed. Its K columns, forward and backward, would be most of the work inside a chunk.

The backward pass takes the chunks from the last to the first. With dS the cotangent of the state that leaves a chunk,

    dV' = qkᵀ dO + writes dS,      Y = (I + diag(β) A)⁻ᵀ dV',      dV = β Y,      dA = −diag(β) Y V'ᵀ, strictly lower
    dS ← total ⊙ dS + q_readsᵀ dO − k_readsᵀ dV

All other gradients are products over all chunks of the group at once. Sources: Yang et al., Gated Delta Networks, arXiv
2412.06464; Yang et al., DeltaNet, arXiv 2406.06484. The backward pass is derived here.

Shapes, for n chunks: v, out [B, h, n, C, V], beta [B, h, n, C], state [B, h, K, V].
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax

from deltaformer_jax.ops.common.triangular import invert_blocks
from deltaformer_jax.ops.gated.chunked_pairs import Pairs, dot, row_dots


def _times(factor, x):
    """x times one factor per row; None means 1."""
    return x if factor is None else factor[..., None] * x


def _left(total, state):
    """The state after a chunk's decay; `total` None means no decay."""
    return state if total is None else total * state


def _chunk(x, i):
    """Chunk i of x [B, h, n, ...]."""
    return lax.dynamic_index_in_dim(x, i, axis=2, keepdims=False)


def _put(x, part, i):
    return lax.dynamic_update_index_in_dim(x, part, i, axis=2)


def linear_advance(pairs: Pairs, v, beta, state):
    """(out, the state that leaves the group) of gated linear attention."""
    states, state = _linear_states(pairs, v, state)
    return _out(pairs, v, states), state


def _out(pairs, written, states):
    """O = q_reads S + qk V' of all chunks, given the states before each."""
    read = _times(pairs.enter, dot("...ck,...kv->...cv", pairs.q_reads, states))
    return read + dot("...ij,...jv->...iv", pairs.qk, written)


def _sum_states(total, added, state, *, reverse=False):
    """Scan S ← total ⊙ S + added over the chunks: (S before each chunk [B, h, n, K, V], the last S [B, h, K, V])."""
    chunks = added.shape[2]

    def chunk(carry, i):
        states, state = carry
        now = _left(None if total is None else _chunk(total, i), state) + _chunk(states, i)
        return (_put(states, state, i), now), None

    index = jnp.arange(chunks, dtype=jnp.int32)
    return lax.scan(chunk, (added, state), index, reverse=reverse)[0]


def _linear_states(pairs, v, state):
    return _sum_states(pairs.total, dot("...ck,...cv->...kv", pairs.writes, _times(pairs.leave, v)), state)


def linear_retreat(pairs: Pairs, v, beta, state, dout, dstate):
    """The gradients of `linear_advance`: (dpairs, dv, None, cotangent of the state that enters the group)."""
    states, _ = _linear_states(pairs, v, state)
    read = dot("...ck,...cv->...kv", pairs.q_reads, _times(pairs.enter, dout))
    dstates, dstate = _sum_states(pairs.total, read, dstate, reverse=True)
    dv = dot("...ij,...iv->...jv", pairs.qk, dout)
    dv = dv + _times(pairs.leave, dot("...ck,...kv->...cv", pairs.writes, dstates))
    return _pairs_gradient(pairs, None, None, dout, v, states, dstates), dv, None, dstate


def _delta_inverse(pairs, beta):
    return invert_blocks(_times(beta, pairs.kk))


def _delta_states(pairs, inverse, v, beta, state):
    """((S before each chunk, V − k_reads S, V'), the state that leaves the last chunk)."""

    def chunk(carry, i):
        states, rests, written, state = carry
        at = lambda x: None if x is None else _chunk(x, i)
        rest = at(v) - _times(at(pairs.enter), dot("...ck,...kv->...cv", at(pairs.k_reads), state))
        new = dot("...ij,...jv->...iv", at(inverse), _times(at(beta), rest))
        now = _left(at(pairs.total), state) + dot("...ck,...cv->...kv", at(pairs.writes), _times(at(pairs.leave), new))
        return (_put(states, state, i), _put(rests, rest, i), _put(written, new, i), now), None

    chunks = v.shape[2]
    # full_like instead of zeros: inside shard_map the states must vary over the same mesh axes as v.
    states = lax.full_like(v, 0, shape=(*v.shape[:3], *state.shape[2:]))
    start = (states, jnp.zeros_like(v), jnp.zeros_like(v), state)
    (*parts, state), _ = lax.scan(chunk, start, jnp.arange(chunks, dtype=jnp.int32))
    return parts, state


def delta_advance(pairs: Pairs, v, beta, state):
    """(out, the state that leaves the group) of the gated delta rule."""
    (states, _, written), state = _delta_states(pairs, _delta_inverse(pairs, beta), v, beta, state)
    return _out(pairs, written, states), state


def delta_retreat(pairs: Pairs, v, beta, state, dout, dstate):
    """The gradients of `delta_advance`: (dpairs, dv, dbeta, cotangent of the state that enters the group)."""
    inverse = _delta_inverse(pairs, beta)
    (states, rest, written), _ = _delta_states(pairs, inverse, v, beta, state)
    from_out = dot("...ij,...iv->...jv", pairs.qk, dout)
    from_reads = dot("...ck,...cv->...kv", pairs.q_reads, _times(pairs.enter, dout))

    def chunk(carry, i):
        dstates, solved, dstate = carry
        at = lambda x: None if x is None else _chunk(x, i)
        back = _times(at(pairs.leave), dot("...ck,...kv->...cv", at(pairs.writes), dstate))
        y = dot("...ji,...jv->...iv", at(inverse), _chunk(solved, i) + back)
        deleted = _times(at(pairs.enter), _times(at(beta), y))
        now = _left(at(pairs.total), dstate) + _chunk(dstates, i)
        now = now - dot("...ck,...cv->...kv", at(pairs.k_reads), deleted)
        return (_put(dstates, dstate, i), _put(solved, y, i), now), None

    index = jnp.arange(v.shape[2], dtype=jnp.int32)
    (dstates, solved, dstate), _ = lax.scan(chunk, (from_reads, from_out, dstate), index, reverse=True)
    dv = _times(beta, solved)
    row = jnp.arange(v.shape[3], dtype=jnp.int32)
    strict = jnp.broadcast_to(row[:, None] > row[None, :], inverse.shape)
    da = jnp.where(strict, -dot("...iv,...jv->...ij", solved, written), jnp.zeros((), v.dtype))
    dbeta = row_dots(solved, rest) + row_dots(da, pairs.kk)
    dpairs = _pairs_gradient(pairs, _times(beta, da), dv, dout, written, states, dstates)
    return dpairs, dv, dbeta, dstate


def _pairs_gradient(pairs: Pairs, dkk, deleted, dout, written, states, dstates) -> Pairs:
    """The cotangents of `pairs`. `deleted` is dV, which is minus the cotangent of k_reads S; None without the delta
    rule."""
    dq_reads = dot("...cv,...kv->...ck", dout, states)
    dk_reads = None if deleted is None else -dot("...cv,...kv->...ck", deleted, states)
    dwrites = dot("...cv,...kv->...ck", written, dstates)
    denter = dleave = dtotal = None
    if pairs.enter is not None:
        denter = row_dots(dq_reads, pairs.q_reads)
        dq_reads = _times(pairs.enter, dq_reads)
        if deleted is not None:
            denter = denter + row_dots(dk_reads, pairs.k_reads)
            dk_reads = _times(pairs.enter, dk_reads)
        dleave = row_dots(dwrites, pairs.writes)
        dwrites = _times(pairs.leave, dwrites)
    if pairs.total is not None:
        dtotal = row_dots(dstates, states)
        dtotal = (jnp.sum(dtotal, axis=-1) if pairs.total.shape[-2] == 1 else dtotal).reshape(pairs.total.shape)
    dqk = dot("...iv,...jv->...ij", dout, written)
    return Pairs(dkk, dqk, dk_reads, dq_reads, dwrites, denter, dleave, dtotal)
