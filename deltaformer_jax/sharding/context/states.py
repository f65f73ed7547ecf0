"""State passing: the gated ops over a sequence that is sharded over devices.

A device's tokens map the state S that enters them to M S + N, and a token reads

    o_t = o⁰_t + Sᵀ R_t,      o⁰ the output from the state 0,     R_t = scale · M_tᵀ q_t,     M_t the map up to token t

Each device computes o⁰, N, R and M of its own tokens. One all-gather of the M and N of all devices then gives each
device the state that enters it: K² + K V numbers a head for the delta rule, K + K V for gated linear attention, however
long the sequence is. For gated linear attention M_t = Diag(e^{Σ g}). For the delta rules M_t is the state that the op
reaches from S = I with the values 0, and R is its output then; this second call is the price, about as much work again.

A document that begins on this device does not see S: M_t = 0 from its first token on.
Source: the same split over devices for linear attention: Sun et al., LASP, arXiv 2404.02882; M and N of the delta rule:
Yang et al., arXiv 2406.06484.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from deltaformer_jax.ops import gated_delta_rule, gated_linear_attention, generalized_delta_rule
from deltaformer_jax.ops.common import heads as H
from deltaformer_jax.ops.common.tiles import accumulation_dtype
from deltaformer_jax.sharding.context.axis import previous_ids

_HIGHEST = lax.Precision.HIGHEST


def delta_rule_states(
    op: Callable[..., tuple[jax.Array, jax.Array]],
    axis_name: str,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    **options,
) -> tuple[jax.Array, jax.Array]:
    """`op`, `gated_delta_rule` or `generalized_delta_rule`, of a sequence that is sharded over the mesh axis
    `axis_name`, inside shard_map.

    Arrays, options (beta, erase_key, log_decay, scale, chunk_size, implementation, ...) and errors are the op's, with
    T/P tokens on each of the P devices. `initial_state` must be the same on all devices, and so is the final state that
    is returned: (o [B, T/P, Hv, V], final_state [B, Hv, K, V]). Cost: two calls of the op on T/P tokens, one of them
    with K instead of V value channels, and an all-gather of P (K² + K V) numbers per row and head.
    """
    given = dict(segment_ids=segment_ids, **options)
    out, added = op(query, key, value, **given)
    dtype, width, heads = added.dtype, key.shape[3], value.shape[2]
    eye = jnp.broadcast_to(jnp.eye(width, dtype=dtype), (value.shape[0], heads, width, width))
    nothing = jnp.zeros((*value.shape[:3], width), value.dtype)
    reads, moved = op(query, key, nothing, initial_state=eye, **given)
    apply = lambda moved, state: jnp.matmul(moved, state, precision=_HIGHEST)
    return _passed(axis_name, out, reads, moved, added, apply, initial_state, segment_ids)


gated_delta_rule_states = functools.partial(delta_rule_states, gated_delta_rule)
generalized_delta_rule_states = functools.partial(delta_rule_states, generalized_delta_rule)


def gated_linear_attention_states(
    axis_name: str,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    log_decay: jax.Array | None = None,
    scale: float | None = None,
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    **options,
) -> tuple[jax.Array, jax.Array]:
    """`gated_linear_attention` of a sequence that is sharded over the mesh axis `axis_name`, inside shard_map.

    Arrays, options (chunk_size, implementation) and errors are the op's, with T/P tokens on each of the P devices.
    `initial_state` must be the same on all devices, and so is the final state that is returned: (o [B, T/P, Hv, V],
    final_state [B, Hv, K, V]). Cost: one call of the op on T/P tokens, and an all-gather of P (K + K V) numbers per row
    and head.
    """
    given = dict(scale=scale, segment_ids=segment_ids, **options)
    out, added = gated_linear_attention(query, key, value, log_decay=log_decay, **given)
    dtype, width, heads = added.dtype, key.shape[3], value.shape[2]
    scale = width**-0.5 if scale is None else scale
    first = _first_segment(segment_ids)
    seen = lambda x: x if first is None else jnp.where(first[..., None, None], x, 0)
    q = H.repeat_heads(seen(query), heads).astype(dtype) * scale
    if log_decay is None:
        reads, moved = q, jnp.ones((value.shape[0], heads, 1, 1), dtype)
    else:
        g = jnp.asarray(log_decay, dtype)
        g = jnp.broadcast_to(g, value.shape[:3]) if g.ndim == 0 else g
        passed = jnp.cumsum(seen(g if g.ndim == 4 else g[..., None]), axis=1)
        reads, moved = q * jnp.exp(passed), jnp.exp(passed[:, -1])[..., None]
    if first is not None:
        moved = jnp.where(jnp.any((segment_ids != 0) & ~first, axis=1)[:, None, None, None], 0, moved)
    return _passed(axis_name, out, reads, moved, added, jnp.multiply, initial_state, segment_ids)


def _first_segment(segment_ids):
    """[B, T/P] bools, True at the tokens of each row's first segment on this device; None: at all of them."""
    if segment_ids is None:
        return None
    real = segment_ids != 0
    before = jnp.pad(segment_ids, ((0, 0), (1, 0)))[:, :-1]
    return real & (jnp.cumsum(real & (segment_ids != before), axis=1, dtype=jnp.int32) == 1)


def _passed(axis_name, out, reads, moved, added, apply, state, segment_ids):
    """(o, final state) from one device's o⁰, R, M and N; apply(M, S) is M S."""
    dtype = accumulation_dtype(out.dtype)
    state = jnp.zeros_like(added) if state is None else state.astype(dtype)
    enters = has = jnp.ones(added.shape[:1], bool)
    if segment_ids is not None:
        has = jnp.any(segment_ids != 0, axis=1)
        before, any_before = previous_ids(segment_ids, axis_name)
        # The state reaches a device whose first token goes on with the document before, and the row's first document.
        enters = ((segment_ids[:, 0] == before) & (before != 0)) | ~any_before
    enters, has = (x[:, None, None, None] for x in (enters, has))
    moved = jnp.where(enters, moved, 0)
    maps = jax.tree.map(lambda x: lax.all_gather(x, axis_name), (moved, added, has))

    def device(state, maps):
        moved, added, has = maps
        return jnp.where(has, apply(moved, state) + added, state), state

    last, before = lax.scan(device, state, maps)
    start = lax.dynamic_index_in_dim(before, lax.axis_index(axis_name), keepdims=False)
    start = jnp.where(enters, start, 0)
    read = jnp.einsum("bthk,bhkv->bthv", reads.astype(dtype), start, precision=_HIGHEST)
    return (out.astype(dtype) + read).astype(out.dtype), last
