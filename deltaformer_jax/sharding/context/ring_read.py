"""The read of a memory whose rows and columns are spread over devices: ring attention, forward and backward.

    o_t = Σ_{i≤t} κ(q_t, k_i) u_i

Rows stay, columns (k, u) travel: at each step a device sees another device's columns, takes them into the running sums
of its rows as flash attention does, and passes them on. In the backward pass, the gradients of the columns travel with
them and arrive home after the last step. The tiles are those of `ops/common/chunked_read.py`, and the equations too.
Each step moves T/P tokens' columns; no device holds more than its own and those. A tile is computed only if the causal
order, the window and the documents leave something to see in it.

Arrays are one device's blocks (`Blocks`): q [B, h, t·r, K], k [B, h, t, K], u [B, h, t, V], segments [B, 1 or h, t] or
None, log_decay [B, h, t, r] or None, for t tokens and r query heads per key head. `first` [N] (`tiles.first_chunks`) is
the number of the first block that each of the row's N blocks can see.
Source: Liu, Zaharia, Abbeel, Ring Attention, arXiv 2310.01889; the zig-zag order as in Brandon et al., Striped
Attention, arXiv 2311.09431, and in later implementations.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from deltaformer_jax.ops.common import tiles
from deltaformer_jax.ops.common.chunked_read import backward_tile
from deltaformer_jax.ops.common.score_decay import decay_inside, totals_between
from deltaformer_jax.ops.common.similarity import Similarity
from deltaformer_jax.sharding.context.axis import rotated
from deltaformer_jax.sharding.context.blocks import Blocks


@dataclasses.dataclass(frozen=True)
class Ring:
    """The static arguments: the similarity and its scale, the window or None, where the blocks are, and how many
    devices' columns a device sees, its own included: P, or fewer with a window over contiguous blocks."""

    similarity: Similarity
    scale: float
    window: int | None
    blocks: Blocks
    steps: int


class Columns(NamedTuple):
    """What travels: keys, values u, segment ids, and the decay from each token to the end of its block."""

    k: jax.Array
    u: jax.Array
    segments: jax.Array | None
    suffix: jax.Array | None


class _Rows(NamedTuple):
    """What stays: queries, segment ids, log decays, their sums from a block's start, and the sums between blocks."""

    q: jax.Array
    segments: jax.Array | None
    log_decay: jax.Array | None
    prefix: jax.Array | None
    between: jax.Array | None


class _Tiles:
    """The tiles of one device: scores and masks of own row block i with column block j of `device`'s blocks."""

    def __init__(self, ring: Ring, q, k, u, segments, log_decay, first):
        self.ring, self.first, self.chunk = ring, first, ring.blocks.rows
        self.group = q.shape[2] // k.shape[2]
        self.key_dtype, self.dtype = k.dtype, tiles.accumulation_dtype(k.dtype)
        self.operand = k.dtype if ring.similarity.normalised else self.dtype
        self.me = lax.axis_index(ring.blocks.axis_name)
        self.own = ring.blocks.numbers(self.me)
        prefix = suffix = between = None
        if log_decay is not None:
            cut = log_decay.reshape(*log_decay.shape[:2], -1, self.chunk, log_decay.shape[3])
            sums = jnp.cumsum(cut, axis=3)
            prefix, after = sums.reshape(log_decay.shape), lax.cumsum(cut, axis=3, reverse=True) - cut
            suffix = after.reshape(log_decay.shape)
            between = totals_between(ring.blocks.in_order(sums[:, :, :, -1]))
        self.rows = _Rows(q, segments, log_decay, prefix, between)
        self.columns = Columns(k, u.astype(self.operand), segments, suffix)
        column = jnp.arange(self.chunk, dtype=jnp.int32)
        self.ago = (jnp.repeat(column, self.group)[:, None] - column[None, :])[None, None]

    def bounds(self, i, device):
        """(start, end) of the column blocks of `device` that row block i sees, its own block not included."""
        numbers, row = self.ring.blocks.numbers(device), self.own[i]
        count = lambda which: jnp.sum(which, dtype=jnp.int32)
        return count(numbers < self.first[row]), count(numbers < row)

    def take_rows(self, x, i):
        """Row block i of x [B, h, t·r, ...]; None stays None."""
        return tiles.take(x, i, self.chunk * self.group)

    def scores(self, columns: Columns, i, j, device):
        """(scores, visible) of row block i with column block j; `device` None: with the block itself, i = j."""
        rows, keys = self.take_rows(self.rows.q, i), tiles.take(columns.k, j, self.chunk)
        scores = tiles.dot(rows, keys.mT, self.key_dtype) * self.ring.scale
        diagonal = device is None
        blocks_ago = 0 if diagonal else self.own[i] - self.ring.blocks.numbers(device)[j]
        visible = self.ago >= 0 if diagonal else None
        if self.ring.window is not None:
            visible = tiles.both(visible, self.ago < self.ring.window - blocks_ago * self.chunk)
        if self.rows.segments is not None:
            row_segments = jnp.repeat(tiles.take(self.rows.segments, i, self.chunk), self.group, axis=2)
            same = tiles.same_segment(row_segments, tiles.take(columns.segments, j, self.chunk))
            visible = tiles.both(visible, same)
        if self.rows.log_decay is not None:
            scores = scores + self._decay(columns, i, j, device).reshape(scores.shape)
        return scores, visible

    def _decay(self, columns, i, j, device):
        if device is None:
            return jnp.swapaxes(decay_inside(tiles.take(self.rows.log_decay, i, self.chunk)), 3, 4)
        at = lambda x, index: lax.dynamic_index_in_dim(x, index, axis=2, keepdims=False)
        column = self.ring.blocks.numbers(device)[j]
        rows = tiles.take(self.rows.prefix, i, self.chunk) + at(at(self.rows.between, self.own[i]), column)[:, :, None]
        suffix = tiles.take(columns.suffix, j, self.chunk)
        return rows[..., None] + jnp.swapaxes(suffix, 2, 3)[:, :, None]

    def over_steps(self, see, travelling, carry):
        """see(travelling, carry, device) -> (travelling, carry) for the devices whose columns this one sees, nearest
        first. `travelling` is passed on after each; it is returned where it is after the last."""
        travelling, carry = see(travelling, carry, self.me)

        def step(state, ago):
            travelling, carry = state
            travelling = rotated(travelling, self.ring.blocks.axis_name)
            return see(travelling, carry, (self.me - ago) % self.ring.blocks.devices), None

        ago = jnp.arange(1, self.ring.steps, dtype=jnp.int32)
        return lax.scan(step, (travelling, carry), ago)[0]


def ring_read_forward(ring: Ring, q, k, u, segments, log_decay, first):
    """(o [B, h, t·r, V], lse [B, h, t·r]) of the device's rows, both in the accumulation dtype."""
    tile = _Tiles(ring, q, k, u, segments, log_decay, first)
    whole = (*q.shape[:3], u.shape[3])

    def absorb(columns, running, i, j, device):
        scores, visible = tile.scores(columns, i, j, device)
        values = tiles.take(columns.u, j, tile.chunk)
        now = tuple(tile.take_rows(x, i) for x in running)
        now = tiles.absorb(ring.similarity, now, scores, visible, values, tile.operand)
        return tuple(tiles.put(x, part, i) for x, part in zip(running, now))

    def see(columns, running, device):
        def row(i, running):
            start, end = tile.bounds(i, device)
            return lax.fori_loop(start, end, lambda j, running: absorb(columns, running, i, j, device), running)

        return columns, lax.fori_loop(0, ring.blocks.number, row, running)

    own = lambda i, running: absorb(tile.columns, running, i, i, None)
    running = lax.fori_loop(0, ring.blocks.number, own, tiles.start_sum(whole, tile.dtype, u))
    running = tile.over_steps(see, tile.columns, running)[1]
    out = running[2] * tiles.inverse_normaliser(ring.similarity, running)[..., None]
    return out, tiles.log_normaliser(ring.similarity, running)


def ring_read_backward(ring: Ring, q, k, u, segments, log_decay, first, out, lse, dout, dlse=None):
    """The gradients (dq, dk, du, dlog_decay) for the cotangents dout [B, h, t·r, V] and dlse [B, h, t·r] (None: 0).

    All in the accumulation dtype; dlog_decay is [B, h, t, r] or None. `out` is used for softmax only.
    """
    tile = _Tiles(ring, q, k, u, segments, log_decay, first)
    batch, heads, dtype, chunk = *k.shape[:2], tile.dtype, tile.chunk
    row_dot = None
    if ring.similarity.normalised:
        row_dot = jnp.sum(dout.astype(dtype) * out.astype(dtype), axis=-1)
        row_dot = row_dot if dlse is None else row_dot - dlse

    def retreat(columns, grads, dq, i, j, device):
        dk, du, column_sums = grads
        scores, visible = tile.scores(columns, i, j, device)
        keys, values = (tiles.take(x, j, chunk) for x in (columns.k, columns.u))
        rows, grad, lses, dots = (tile.take_rows(x, i) for x in (q, dout, lse, row_dot))
        weights, dscores = backward_tile(ring.similarity, scores, values, visible, lses, grad, dots, tile.operand)
        if column_sums is not None:
            by_token = jnp.sum(dscores.reshape(batch, heads, chunk, tile.group, chunk), axis=2)
            column_sums = tiles.add_to(column_sums, jnp.swapaxes(by_token, 2, 3), j)
        dscores = dscores * ring.scale
        du = tiles.add_to(du, tiles.dot(weights.mT, grad, tile.operand), j)
        dk = tiles.add_to(dk, tiles.dot(dscores.mT, rows, tile.operand), j)
        return (dk, du, column_sums), tiles.add_to(dq, tiles.dot(dscores, keys, tile.operand), i)

    def see(travelling, dq, device):
        columns, grads = travelling

        def row(i, carry):
            start, end = tile.bounds(i, device)
            return lax.fori_loop(start, end, lambda j, carry: retreat(columns, *carry, i, j, device), carry)

        grads, dq = lax.fori_loop(0, ring.blocks.number, row, (grads, dq))
        return (columns, grads), dq

    zeros = lambda x: tiles.zeros(x.shape, dtype, u)
    grads = (zeros(k), zeros(u), None if log_decay is None else zeros(log_decay))
    own = lambda i, carry: retreat(tile.columns, *carry, i, i, None)
    grads, dq = lax.fori_loop(0, ring.blocks.number, own, (grads, zeros(q)))
    (_, grads), dq = tile.over_steps(see, (tile.columns, grads), dq)
    dk, du, column_sums = rotated(grads, ring.blocks.axis_name, 1 - ring.steps)
    if log_decay is None:
        return dq, dk, du, None
    # A softmax row of dS sums to dlse_i, as in chunked_read.
    row_sums = jnp.zeros_like(column_sums) if dlse is None else dlse.reshape(column_sums.shape)
    return dq, dk, du, _log_decay_gradient(ring.blocks, row_sums, column_sums)


def _log_decay_gradient(blocks: Blocks, row_sums, column_sums):
    """`score_decay.log_decay_gradient` over the tokens of all devices: its sums over later tokens inside a block, and
    over later blocks."""
    cut = lambda x: x.reshape(*x.shape[:2], blocks.number, blocks.rows, x.shape[3])
    difference = cut(row_sums) - cut(column_sums)
    totals = blocks.in_order(jnp.sum(difference, axis=3))
    later = lax.cumsum(totals, axis=2, reverse=True) - totals
    own = jnp.take(later, blocks.numbers(lax.axis_index(blocks.axis_name)), axis=2)
    inside = lax.cumsum(difference, axis=3, reverse=True)
    return (inside + own[:, :, :, None]).reshape(row_sums.shape)
