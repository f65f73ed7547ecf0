"""The columns that stay visible behind a window (`keep`, `initial`), gathered into tiles of their own.

A row sees two kinds of columns: those of its window, which lie in the few chunks before it, and those that last, which
may lie anywhere before. The lasting columns are put in order, C to a tile. A chunk of rows then visits

    its near chunks, and   ⌈S / C⌉   tiles of the S lasting columns before them

instead of all chunks before it. How many tiles that are follows from the data, so that no column is lost however many
last. Work per head: O(T (window + S)) instead of O(T²). Rows of one batch share the bounds of these loops.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from deltaformer_jax.ops.common import heads as H
from deltaformer_jax.ops.common import tiles


class Behind(NamedTuple):
    """The lasting columns of T tokens, for T/C chunks of rows.

    order int32 [B, T]: the columns that last, by position, and then the others. count int32 [B, T/C]: how many of them
    lie before the near chunks of a chunk of rows. start, stop int32 [T/C]: the tiles of `order` that it visits.
    segments [B, 1, T] or None.
    """

    order: jax.Array
    count: jax.Array
    start: jax.Array
    stop: jax.Array
    segments: jax.Array | None

    def visible(self, i, m, chunk: int, rows_per_token: int = 1) -> jax.Array:
        """Which columns of tile m the rows of chunk i see: bools [B, 1, 1 or C·r, C]."""
        place = m * chunk + jnp.arange(chunk, dtype=jnp.int32)
        count = lax.dynamic_index_in_dim(self.count, i, axis=1)
        visible = (place[None] < count)[:, None, None]
        if self.segments is None:
            return visible
        rows = jnp.repeat(tiles.take(self.segments, i, chunk), rows_per_token, axis=2)
        return visible & tiles.same_segment(rows, self.take(self.segments, m, chunk))

    def take(self, x, m, chunk: int):
        """The columns of tile m of x [B, h, T, …]."""
        at = self._columns(m, chunk)
        at = at.reshape(at.shape[0], 1, chunk, *[1] * (x.ndim - 3))
        return jnp.take_along_axis(x, at, axis=2, mode="promise_in_bounds")

    def add_to(self, x, tile, m):
        """x [B, h, T, …] with `tile` added to the columns of tile m."""
        add = lambda x, at, tile: x.at[:, at].add(tile.astype(x.dtype), unique_indices=True, mode="promise_in_bounds")
        return jax.vmap(add)(x, self._columns(m, tile.shape[2]), tile)

    def _columns(self, m, chunk):
        return lax.dynamic_slice_in_dim(self.order, m * chunk, chunk, axis=1)


def seen_columns(segment_ids, lasting, window: int | None, length: int, chunk: int, *, skips: bool):
    """(first [T/C], segments [B, 1, T] or None, {"lasting": ..., "behind": ...} as far as there are any) of a pass over
    the columns, for its `length` of whole chunks, from segment_ids and lasting [B, time] or None.

    skips: whether the pass knows how to pass over the chunks behind its rows' windows where tokens last. Without it
    `first` leaves none of them out, and the pass masks what does not last.
    """
    segments = H.pad_time(segment_ids, length)
    first = tiles.first_chunks(segments, window if skips or lasting is None else None, length, chunk)
    segments = None if segments is None else segments[:, None]
    if lasting is None:
        return first, segments, {}
    found = {"lasting": H.pad_time(lasting, length)[:, None]}
    if skips:
        found["behind"] = behind_window(found["lasting"], segments, first, chunk)
    return first, segments, found


def behind_window(lasting: jax.Array, segments: jax.Array | None, first: jax.Array, chunk: int) -> Behind:
    """lasting [B, 1, T] bools, segments [B, 1, T] or None, first [T/C] (`tiles.first_chunks`, with the window)."""
    lasting = lasting[:, 0]
    order = jnp.argsort(~lasting, axis=1, stable=True).astype(jnp.int32)
    before = jnp.cumsum(lasting, axis=1, dtype=jnp.int32)
    before = jnp.concatenate([jnp.zeros_like(before[:, :1]), before], axis=1)  # lasting columns before each position
    count = jnp.take(before, first * chunk, axis=1)
    start = jnp.zeros_like(first)
    if segments is not None:
        begin = tiles.segment_starts(segments[:, 0])[:, ::chunk]
        start = jnp.min(jnp.take_along_axis(before, begin, axis=1), axis=0) // chunk
    return Behind(order, count, start, -(-jnp.max(count, axis=0) // chunk), segments)
