"""The gated ops in chunks, with a backward of their own: the form that trains on every platform.

T is cut into chunks of C tokens, and the n = T/C chunks into groups of G ≈ √(n/3). A scan over the groups does, for
all chunks of a group at once, what needs no state (chunked_pairs), and lets the state through them one by one
(chunked_state).

What is kept for the backward is the arguments and the state at the start of each group. The backward goes through the
groups from the last to the first, makes a group's states again and then its gradients. So beside the arguments and
their gradients there are, for each of the B·Hv heads,

    (n/G + 3 G) K V numbers, about 3.5 √(T/C) K V,     and 8 G C (C + K + V), or less, of what is inside a group

(12 with a decay of each channel): nothing of T×C, and no state for each chunk.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from deltaformer_jax.ops.common import heads as H
from deltaformer_jax.ops.common.hand_written import hand_written
from deltaformer_jax.ops.common.tiles import accumulation_dtype
from deltaformer_jax.ops.gated import chunked_state as gated_state
from deltaformer_jax.ops.gated.chunked_pairs import channel_pairs, head_pairs


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is known while tracing: the read's scale, rows of a chunk (a power of two), the delta rule or not."""

    scale: float
    chunk: int
    delta: bool


class Inputs(NamedTuple):
    """The arrays of a call: query, key [B,T,H,K], value [B,T,Hv,V], beta [B,T,Hv] or None, log_decay [B,T,Hv],
    [B,T,Hv,K] or None, state [B,Hv,K,V]; real and resets [B,T] booleans, or None for all and none: what is not real is
    skipped, and before a reset the state is emptied."""

    query: jax.Array
    key: jax.Array
    value: jax.Array
    beta: jax.Array | None
    log_decay: jax.Array | None
    state: jax.Array
    real: jax.Array | None
    resets: jax.Array | None


def chunk_rows(chunk_size: int, length: int) -> int:
    """The power of two that is at least min(chunk_size, length)."""
    return 1 << (min(chunk_size, length) - 1).bit_length()


def chunks_of_a_group(chunks: int) -> int:
    """About √(n/3), which makes n/G + 3 G least, with as little as possible to pad at the end."""
    root = math.sqrt(chunks / 3)
    sizes = range(max(1, math.ceil(root / 1.5)), max(1, math.floor(root * 1.5)) + 1)
    return min(sizes, key=lambda size: (-(-chunks // size) * size, abs(size - root)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def gated_chunked(plan: Plan, inputs: Inputs):
    """(output [B,T,Hv,V] in value's dtype, final state [B,Hv,K,V] in the accumulation dtype)."""
    return _forward(plan, inputs)[0]


class _Groups:
    """The arguments cut into groups of chunks. Group i's part of an array is sliced, cast and, at padding, zeroed."""

    def __init__(self, plan, value, log_decay, real, resets):
        self.plan = plan
        self.time, self.heads = value.shape[1:3]
        self.size = chunks_of_a_group(-(-self.time // plan.chunk))
        self.rows = self.size * plan.chunk
        self.number = -(-self.time // self.rows)
        self.length = self.number * self.rows
        self.dtype = accumulation_dtype(value.dtype)
        self.per_channel = log_decay is not None and log_decay.ndim == 4
        self.real, self.resets = (self.whole(x) for x in (real, resets))
        self.indices = jnp.arange(self.number, dtype=jnp.int32)

    def whole(self, x):
        """Padded to whole groups; None stays None."""
        return H.pad_time(x, self.length)

    def _cut(self, x, i):
        return lax.dynamic_slice_in_dim(x, i * self.rows, self.rows, axis=1)

    def _clean(self, x, i):
        """Group i of x, 0 at padding: there a token decays by e^0 and writes 0 at the key 0."""
        if self.real is None:
            return x
        real = self._cut(self.real, i)
        return jnp.where(real.reshape(*real.shape, *[1] * (x.ndim - 2)), x, jnp.zeros((), x.dtype))

    def load(self, x, i):
        """[B, length, h, ...] -> [B, Hv, n, C, ...] in the accumulation dtype; None stays None."""
        if x is None:
            return None
        x = H.repeat_heads(self._clean(self._cut(x, i), i).astype(self.dtype), self.heads)
        x = H.heads_first(x)
        return x.reshape(*x.shape[:2], self.size, self.plan.chunk, *x.shape[3:])

    def store(self, out, x, i):
        """`out` [B, length, h, ...] with group i replaced by x [B, Hv, n, C, ...]; None stays None."""
        if out is None:
            return None
        x = H.heads_last(x.reshape(*x.shape[:2], self.rows, *x.shape[4:]))
        x = self._clean(H.sum_heads(x, out.shape[2]), i)
        return lax.dynamic_update_slice_in_dim(out, x.astype(out.dtype), i * self.rows, axis=1)

    def pairs(self, i):
        """The function (k, q, log decay) -> Pairs of group i."""
        local = None
        if self.resets is not None:
            resets = self._cut(self.resets, i).reshape(-1, 1, self.size, self.plan.chunk)
            local = jnp.cumsum(resets, axis=-1, dtype=jnp.int32)
        form = channel_pairs if self.per_channel else head_pairs
        return lambda k, q, log_decay: form(k, q * self.plan.scale, log_decay, local, self.plan.delta)


# Jitted, as _backward is, so that what was traced once is not traced again.
@functools.partial(jax.jit, static_argnums=0)
def _forward(plan, inputs):
    *arrays, state, real, resets = inputs
    groups = _Groups(plan, inputs.value, inputs.log_decay, real, resets)
    query, key, value, beta, log_decay = map(groups.whole, arrays)
    advance = gated_state.delta_advance if plan.delta else gated_state.linear_advance

    def group(carry, i):
        state, out = carry
        k, q, v, b, g = (groups.load(x, i) for x in (key, query, value, beta, log_decay))
        o, left = advance(groups.pairs(i)(k, q, g), v, b, state)
        return (left, groups.store(out, o, i)), state

    start = (state.astype(groups.dtype), jnp.zeros_like(value))
    (final, out), states = lax.scan(group, start, groups.indices)
    return (out[:, : groups.time], final), (inputs, states)


@hand_written("chunked", "implementation='recurrent'")
@functools.partial(jax.jit, static_argnums=0)
def _backward(plan, residuals, cotangents):
    inputs, states = residuals
    *arrays, state, real, resets = inputs
    groups = _Groups(plan, inputs.value, inputs.log_decay, real, resets)
    query, key, value, beta, log_decay = arrays = [groups.whole(x) for x in arrays]
    dout, dfinal = cotangents
    dout = groups.whole(dout)
    retreat = gated_state.delta_retreat if plan.delta else gated_state.linear_retreat

    def group(carry, inputs):
        dstate, gradients = carry
        i, state = inputs
        k, q, v, b, g, do = (groups.load(x, i) for x in (key, query, value, beta, log_decay, dout))
        pairs, pull = jax.vjp(groups.pairs(i), k, q, g)
        dpairs, dv, db, dstate = retreat(pairs, v, b, state, do, dstate)
        dk, dq, dg = pull(dpairs)
        return (dstate, [groups.store(out, x, i) for out, x in zip(gradients, (dq, dk, dv, db, dg))]), None

    start = (dfinal, jax.tree.map(jnp.zeros_like, arrays))
    (dstate, gradients), _ = lax.scan(group, start, (groups.indices, states), reverse=True)
    gradients = jax.tree.map(lambda x: x[:, : groups.time], gradients)
    return (Inputs(*gradients, dstate.astype(state.dtype), real=None, resets=None),)


gated_chunked.defvjp(_forward, _backward)
