"""Solves I + A for strictly lower triangular A, given in transposed form: a = Aᵀ, [columns, rows].

Diagonal blocks of 16 rows are inverted by substitution on the vector unit, all blocks side by side, from the last row
to the first: X_i ← X_i − a_ij X_j. Then pairs of blocks of b rows are joined to blocks of 2b rows by X ← X − X L X, on
the matrix unit, up to tiles of 128 rows; L is the part of Aᵀ between the two blocks. The rest is block substitution,
tile by tile. No power of A is formed. The run time depends on the number of products that wait for one another: six for
the joins, and two per tile.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax

from pallas_kernels.tpu.matrix_unit import NN, NT, TILE, dot, tiles

BLOCK = 16
SUBLANES = 8


def tile_inverses(a, dtype):
    """The inverses of the diagonal 128 × 128 tiles of I + a, as a list of [128, 128].

    a is [C, C], C a multiple of 128, and 0 on and below the diagonal. Products take operands of `dtype`. Each step is
    done for all tiles before the next step, so that the tiles' products overlap.
    """
    diagonal = [a[i, i] for i in tiles(a.shape[0])]
    row = lax.broadcasted_iota(jnp.int32, (TILE, TILE), 0)
    column = lax.broadcasted_iota(jnp.int32, (TILE, TILE), 1)
    # The highest bit in which an entry's row and column differ is the size of the blocks that the entry joins.
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
    """[16, 128]: the inverses of I + b for each diagonal 16 × 16 block b of a tile [128, 128], side by side."""
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
            # The gather puts column j of each block into all lanes of the block. It is 0 in rows j and later.
            x[t] = x[t] - jnp.take_along_axis(parts[t], lane - place + j, axis=1) * done
    return jnp.concatenate(x)


def solve_across(a, b, dtype):
    """x [V, C] with x (I + a) = b, b [V, C]; that is, (I + A) xᵀ = bᵀ. From the first tile to the last."""
    inverses = tile_inverses(a, dtype)
    own = tiles(a.shape[0])
    rest, found = [b[:, i] for i in own], []
    for n, i in enumerate(own):
        found.append(dot(rest[n], inverses[n], dtype, NN))
        for m in range(n + 1, len(own)):
            rest[m] = rest[m] - dot(found[n], a[i, own[m]], dtype, NN)
    return jnp.concatenate(found, axis=1)


def solve_across_transposed(a, b, dtype):
    """x [V, C] with (I + a) xᵀ = bᵀ, b [V, C]; that is, (I + A)ᵀ xᵀ = bᵀ. From the last tile to the first."""
    inverses = tile_inverses(a, dtype)
    own = tiles(a.shape[0])
    rest, found = [b[:, i] for i in own], [None] * len(own)
    for n in reversed(range(len(own))):
        found[n] = dot(rest[n], inverses[n], dtype, NT)
        for m in range(n):
            rest[m] = rest[m] - dot(found[n], a[own[m], own[n]], dtype, NT)
    return jnp.concatenate(found, axis=1)
