"""Unit triangular systems of a tile's rows, given across: a [columns, rows] = Aᵀ, A strictly lower triangular.

Diagonal blocks of 16 rows are inverted by substitution on the vector unit, all of them side by side, row after row from
the last: X_i ← X_i − a_ij X_j. Then blocks of b rows are joined to blocks of 2b by X ← X − X L X, L the part of Aᵀ
between them, on the matrix unit, up to tiles of 128; the rest is substitution, tile by tile. No power of A is ever
formed. What costs time is the number of products that wait for one another: six for the joins, two for each tile.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax

from pallas_kernels.tpu.matrix_unit import NN, NT, TILE, dot, tiles

BLOCK = 16
SUBLANES = 8


def tile_inverses(a, dtype):
    """A list of [128, 128]: the inverses of the diagonal tiles of I + a, a [C, C] with 0 in what is not above the
    diagonal, C a multiple of 128. Products take operands of `dtype`. Step by step for all tiles at once."""
    diagonal = [a[i, i] for i in tiles(a.shape[0])]
    row = lax.broadcasted_iota(jnp.int32, (TILE, TILE), 0)
    column = lax.broadcasted_iota(jnp.int32, (TILE, TILE), 1)
    # Where an entry's row and column differ in a bit is the size of the blocks it joins.
    apart = row ^ column
    found = [jnp.where(apart < BLOCK, jnp.concatenate([_blocks(x)] * (TILE // BLOCK)), 0.0) for x in diagonal]
    b = BLOCK
    while b < TILE:
        joins = (apart >= b) & (apart < 2 * b)
        steps = [dot(jnp.where(joins, l, 0.0), x, dtype) for l, x in zip(diagonal, found)]
        found = [x - dot(x, step, dtype) for x, step in zip(found, steps)]
        b *= 2
    return found


def _blocks(tile):
    """[16, 128]: the inverses of I + each diagonal block of 16 rows of a tile [128, 128], side by side."""
    lane = lax.broadcasted_iota(jnp.int32, (SUBLANES, TILE), 1)
    row = lax.broadcasted_iota(jnp.int32, (SUBLANES, TILE), 0)
    place = lane & (BLOCK - 1)
    parts, x = [], []
    for i in range(0, BLOCK, SUBLANES):
        part = tile[i : i + SUBLANES]
        for n in range(BLOCK, TILE, BLOCK):
            part = jnp.where(lane >= n, tile[n + i : n + i + SUBLANES], part)
        parts.append(part)
        x.append(jnp.where(place == row + i, 1.0, 0.0))
    for j in reversed(range(1, BLOCK)):
        done = x[j // SUBLANES][j % SUBLANES : j % SUBLANES + 1]
        for t in range((j - 1) // SUBLANES + 1):
            # Column j of each block, in all of the block's lanes; 0 in the rows from j on.
            x[t] = x[t] - jnp.take_along_axis(parts[t], lane - place + j, axis=1) * done
    return jnp.concatenate(x)


def solve_across(a, b, dtype):
    """x with x (I + a) = b, b [V, C]: xᵀ solves (I + A) xᵀ = bᵀ. From the first tile on."""
    inverses = tile_inverses(a, dtype)
    own = tiles(a.shape[0])
    rest, found = [b[:, i] for i in own], []
    for n, i in enumerate(own):
        found.append(dot(rest[n], inverses[n], dtype, NN))
        for m in range(n + 1, len(own)):
            rest[m] = rest[m] - dot(found[n], a[i, own[m]], dtype, NN)
    return jnp.concatenate(found, axis=1)


def solve_across_transposed(a, b, dtype):
    """x with (I + a) xᵀ = bᵀ, b [V, C]: xᵀ solves (I + A)ᵀ xᵀ = bᵀ. From the last tile back."""
    inverses = tile_inverses(a, dtype)
    own = tiles(a.shape[0])
    rest, found = [b[:, i] for i in own], [None] * len(own)
    for n in reversed(range(len(own))):
        found[n] = dot(rest[n], inverses[n], dtype, NT)
        for m in range(n):
            rest[m] = rest[m] - dot(found[n], a[own[m], own[n]], dtype, NT)
    return jnp.concatenate(found, axis=1)
