"""The chain of DeltaFormer's write over devices, with the read in the same steps: forward.

    u_t = α_t v_t − β_t Σ_{i<t} κ₁(w_t, k_i) u_i,      o_t = Σ_{i≤t} κ₂(q_t, k_i) u_i

`schedule.py` says which block is solved when. Rows stay on their device with their running sums, for the write and for
the read. At each step every device solves at most one block, all devices exchange the solved blocks' keys and u, and
each takes them into the sums of its own later blocks: both sums from the same message. The tiles are those of
`ops/deltaformer/chunked_write.py`.

Arrays are [g, n, t, ...]: g groups of n streams (a stream is a batch row's write head), t tokens on a device, whose
blocks are dealt (`Blocks`); q has r rows per token.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from deltaformer_jax.ops.common import tiles
from deltaformer_jax.ops.common.similarity import Similarity
from deltaformer_jax.ops.deltaformer.chunked_write import product_dtype, solve_chunk, times
from deltaformer_jax.sharding.context.blocks import Blocks
from deltaformer_jax.sharding.context.exchange import Exchange, Turn


@dataclasses.dataclass(frozen=True)
class Chain:
    """The static arguments: both similarities and scales, where the blocks are, and the number of groups."""

    write_similarity: Similarity
    write_scale: float
    read_similarity: Similarity
    read_scale: float
    blocks: Blocks
    groups: int


class Streams(NamedTuple):
    """The arrays of a device, 0 at padding: q [g, n, t·r, K], w, k [g, n, t, K], v [g, n, t, V], alpha, beta and
    segments [g, n, t] or None."""

    q: jax.Array
    w: jax.Array
    k: jax.Array
    v: jax.Array
    alpha: jax.Array | None
    beta: jax.Array | None
    segments: jax.Array | None


def take(x, j, i, size):
    """Rows i·size … (i+1)·size of group j of x [g, n, t, ...]: [1, n, size, ...]; None stays None."""
    if x is None:
        return None
    return lax.dynamic_slice(x, _start(x, j, i * size), (1, x.shape[1], size, *x.shape[3:]))


def put(x, tile, j, i):
    """x with these rows replaced by `tile` [1, n, size, ...]."""
    return lax.dynamic_update_slice(x, tile.astype(x.dtype), _start(x, j, i * tile.shape[2]))


def _start(x, group, row):
    # In one dtype: with 64-bit integers enabled, a plain 0 would be an int64 beside the int32 counters.
    return tuple(jnp.asarray(index, jnp.int32) for index in (group, 0, row, *[0] * (x.ndim - 3)))


class Dealt:
    """Which blocks meet at a step. `forward` False: the blocks are taken from the last to the first."""

    def __init__(self, chain: Chain, forward: bool):
        self.blocks, self.groups, self.forward = chain.blocks, chain.groups, forward
        self.devices, self.all = chain.blocks.devices, chain.blocks.devices * chain.blocks.number
        self.me = lax.axis_index(chain.blocks.axis_name)
        self.exchange = Exchange(chain.blocks.axis_name, self.devices, chain.groups)
        self.steps = jnp.arange(self.all + chain.groups - 1, dtype=jnp.int32)

    def block(self, step, j):
        """(number, live) of the block of group j at this step."""
        index = step - j
        live = (index >= 0) & (index < self.all)
        return jnp.where(live, index if self.forward else self.all - 1 - index, 0), live

    def turn(self, step) -> Turn:
        # The group whose block of this step is one of this device's: P divides N.
        j = (step - self.me if self.forward else step + 1 + self.me) % self.devices
        number, live = self.block(step, j)
        live = live & (j < self.groups)
        return Turn(jnp.where(live, j, 0), jnp.where(live, number // self.devices, 0), live)

    def own_before(self, number):
        """How many of this device's blocks have a smaller number."""
        return (number - self.me + self.devices - 1) // self.devices

    def message(self, messages, j, number):
        """The message about the block `number` of group j."""
        slot = self.exchange.slot(j, number)
        return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, slot, keepdims=False), messages)

    def over_groups(self, step, function, carry):
        """function(j, number, carry) for the groups that have a block at this step."""

        def group(j, carry):
            number, live = self.block(step, j)
            return lax.cond(live, lambda carry: function(j, number, carry), lambda carry: carry, carry)

        return lax.fori_loop(0, self.groups, group, carry)


def strictly_earlier(size, segments):
    """The mask of a block with its own columns in the write: strictly causal, of one document."""
    return tiles.both(tiles.strictly_below(size), tiles.same_segment(segments, segments))


def chain_forward(chain: Chain, streams: Streams, last):
    """(o [g, n, t·r, V], u [g, n, t, V], log-sum-exps of the write [g, n, t] and of the read [g, n, t·r]), all in the
    accumulation dtype. `last` [N] (`tiles.last_chunks`): the last block of rows that can see each block of columns."""
    q, w, k, v, alpha, beta, segments = streams
    size, group = chain.blocks.rows, q.shape[2] // k.shape[2]
    dtype, dealt = tiles.accumulation_dtype(k.dtype), Dealt(chain, forward=True)
    write, read = chain.write_similarity, chain.read_similarity
    operands = product_dtype(write, k.dtype), product_dtype(read, k.dtype)
    column = jnp.arange(size, dtype=jnp.int32)
    causal = (jnp.repeat(column, group)[:, None] >= column[None, :])[None, None]

    def scores(x, keys, j, i, rows, scale):
        return tiles.dot(take(x, j, i, rows), keys.mT, k.dtype) * scale

    def take_in(similarity, running, scores, visible, values, operand, j, i, rows):
        """The running sums with one more tile in block i of group j."""
        now = tiles.absorb(similarity, tuple(take(x, j, i, rows) for x in running), scores, visible, values, operand)
        return tuple(put(x, part, j, i) for x, part in zip(running, now))

    def read_tile(reads, keys, values, ids, j, i, diagonal):
        rows = size * group
        ids_of_rows = None if segments is None else jnp.repeat(take(segments, j, i, size), group, axis=2)
        visible = tiles.both(causal if diagonal else None, tiles.same_segment(ids_of_rows, ids))
        found = scores(q, keys, j, i, rows, chain.read_scale)
        return take_in(read, reads, found, visible, values, operands[1], j, i, rows)

    def step(carry, s):
        u, lse, sums, reads = carry
        turn = dealt.turn(s)
        j, i, live = turn
        at = lambda x: take(x, j, i, size)
        keys, ids = at(k), at(segments)

        def solve(u, lse, reads):
            target = times(at(alpha), at(v).astype(dtype))
            own = scores(w, keys, j, i, size, chain.write_scale)
            running = tuple(map(at, sums))
            solved, normaliser = solve_chunk(write, running, own, strictly_earlier(size, ids), target, at(beta))
            return put(u, solved, j, i), put(lse, normaliser, j, i), read_tile(reads, keys, solved, ids, j, i, True)

        u, lse, reads = lax.cond(live, solve, lambda *unchanged: unchanged, u, lse, reads)
        # u travels in the dtype in which it is multiplied.
        travels = jnp.promote_types(*operands)
        messages = dealt.exchange.to_all((keys, at(u).astype(travels), ids), turn)

        def absorb(j, number, carry):
            keys, values, ids = dealt.message(messages, j, number)

            def rows(i, carry):
                sums, reads = carry
                visible = tiles.same_segment(take(segments, j, i, size), ids)
                found = scores(w, keys, j, i, size, chain.write_scale)
                sums = take_in(write, sums, found, visible, values, operands[0], j, i, size)
                return sums, read_tile(reads, keys, values, ids, j, i, False)

            return lax.fori_loop(dealt.own_before(number + 1), dealt.own_before(last[number] + 1), rows, carry)

        return (u, lse, *dealt.over_groups(s, absorb, (sums, reads))), None

    whole, folded = (*k.shape[:3], v.shape[3]), (*q.shape[:3], v.shape[3])
    start = (
        tiles.zeros(whole, dtype, v),
        tiles.zeros(whole[:3], dtype, v),
        tiles.start_sum(whole, dtype, v),
        tiles.start_sum(folded, dtype, v),
    )
    (u, lse, _, reads), _ = lax.scan(step, start, dealt.steps)
    out = reads[2] * tiles.inverse_normaliser(read, reads)[..., None]
    return out, u, lse, tiles.log_normaliser(read, reads)
