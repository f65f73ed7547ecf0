"""The chunked form of the gated ops, with a hand-written backward pass. It runs and trains on every platform.

T is cut into chunks of C tokens, and the n = T/C chunks into groups of G ≈ √(n/3) chunks. A scan runs over the groups.
For all chunks of a group at once, it computes everything that does not depend on the state (chunked_pairs). Then it
passes the state through the chunks one by one (chunked_state).

The residuals are the arguments and the state at the start of each group. The backward pass takes the groups from the
last to the first. It recomputes the states of a group and then computes the group's gradients. Besides the arguments
and their gradients, the memory for each of the B·Hv heads is

    (n/G + 3 G) K V numbers for states, about 3.5 √(T/C) K V, and at most 8 G C (C + K + V) numbers inside a group

(12 instead of 8 with a decay per channel). There is no array of T×C numbers, and no state per chunk of the sequence.
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
from deltaformer_jax.ops.common.hand_written import hand_written, made
from deltaformer_jax.ops.common.tiles import accumulation_dtype
from deltaformer_jax.ops.gated import chunked_state as gated_state
from deltaformer_jax.ops.gated.chunked_pairs import channel_pairs, head_pairs


@dataclasses.dataclass(frozen=True)
class Plan:
    """The static arguments of a call: the scale of the read, the rows of a chunk (a power of two), and whether the op
    is the gated delta rule (`delta`) or gated linear attention."""

    scale: float
    chunk: int
    delta: bool


class Inputs(NamedTuple):
    """The arrays of a call: query, key [B,T,H,K], value [B,T,Hv,V], beta [B,T,Hv] or None, log_decay [B,T,Hv],
    [B,T,Hv,K] or None, state [B,Hv,K,V], real and resets [B,T] bools or None.

    Tokens that are not real are skipped (None: all are real). The state is set to 0 before each token with a reset
    (None: no resets).
    """

    query: jax.Array
    key: jax.Array
    value: jax.Array
    beta: jax.Array | None
    log_decay: jax.Array | None
    state: jax.Array
    real: jax.Array | None
    resets: jax.Array | None


def chunk_rows(chunk_size: int, length: int) -> int:
    """The smallest power of two that is at least min(chunk_size, length)."""
    return 1 << (min(chunk_size, length) - 1).bit_length()


def chunks_of_a_group(chunks: int) -> int:
    """G, the chunks of a group: of the numbers within a factor of 1.5 of √(n/3), the one that needs the least padding
    of the last group. √(n/3) minimises n/G + 3 G."""
    root = math.sqrt(chunks / 3)
    sizes = range(max(1, math.ceil(root / 1.5)), max(1, math.floor(root * 1.5)) + 1)
    return min(sizes, key=lambda size: (-(-chunks // size) * size, abs(size - root)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def gated_chunked(plan: Plan, inputs: Inputs):
    """(output [B,T,Hv,V] in value's dtype, final state [B,Hv,K,V] in the accumulation dtype)."""
    return _forward(plan, inputs)[0]


class _Groups:
    """The arguments in groups of chunks. A group is sliced out of an array, cast, and set to 0 at padding."""

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
        """x padded with zeros to whole groups; None stays None."""
        return H.pad_time(x, self.length)

    def _cut(self, x, i):
        return lax.dynamic_slice_in_dim(x, i * self.rows, self.rows, axis=1)

    def _clean(self, x, i):
        """x, a slice of group i, set to 0 at padding. A padding token then decays by e^0 = 1 and writes 0."""
        if self.real is None:
            return x
        real = self._cut(self.real, i)
        return jnp.where(real.reshape(*real.shape, *[1] * (x.ndim - 2)), x, jnp.zeros((), x.dtype))

    def load(self, x, i):
        """Group i of x [B, length, h, ...] -> [B, Hv, n, C, ...] in the accumulation dtype; None stays None."""
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
        """The function (k, q, log_decay) -> Pairs for group i."""
        local = None
        if self.resets is not None:
            resets = self._cut(self.resets, i).reshape(-1, 1, self.size, self.plan.chunk)
            local = jnp.cumsum(resets, axis=-1, dtype=jnp.int32)
        form = channel_pairs if self.per_channel else head_pairs
        return lambda k, q, log_decay: form(k, q * self.plan.scale, log_decay, local, self.plan.delta)


# _forward and _backward are jitted, so that JAX traces each once per shape and not at every call.
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
    out, final, states = made((out[:, : groups.time], final, states))
    return (out, final), (inputs, states)


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
