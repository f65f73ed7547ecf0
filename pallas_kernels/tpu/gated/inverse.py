"""(I + A)⁻¹ of a strictly lower triangular tile, for products with many right-hand sides in both passes.

Diagonal blocks of 16 rows are inverted by substitution on the vector unit, all of them side by side in one [16, C]
tile: X ← X − A_·j X_j, column after column. Then blocks of b rows are joined to blocks of 2b by X ← X − X L X, L the
part of A between them, on the matrix unit. No power of A is ever formed.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.tpu.gated.differentiable import block_of, dot_exact, place_in_block

BLOCK = 16
SUBLANES = 8


# Of a jitted function there is one trace, however many kernels call it.
@functools.partial(jax.jit, static_argnums=1)
def inverses(tiles, dtype):
    """A list of [C, C] float32 of one of [C, C], C a power of two of at least 16; what is not below the diagonal must
    be 0. Step by step for all at once: one tile's products wait for each other.

    `dtype`: of the call's inputs; products are as accurate as `dot_exact` says.
    """
    size = tiles[0].shape[0]
    row = lax.broadcasted_iota(jnp.int32, (size, size), 0)
    column = lax.broadcasted_iota(jnp.int32, (size, size), 1)
    apart = lambda b: block_of(row, b) != block_of(column, b)
    blocks = [_inverse_blocks(jnp.where(apart(BLOCK), 0.0, a)) for a in tiles]
    found = [jnp.where(apart(BLOCK), 0.0, jnp.concatenate([x] * (size // BLOCK))) for x in blocks]
    b = BLOCK
    while b < size:
        joins = [jnp.where(apart(b) & ~apart(2 * b), a, 0.0) for a in tiles]
        steps = [dot_exact(l, x, dtype) for l, x in zip(joins, found)]
        found = [x - dot_exact(x, step, dtype) for x, step in zip(found, steps)]
        b *= 2
    return found


@jax.jit
def _inverse_blocks(blocks):
    """[16, C]: the inverses of I + each diagonal block, side by side; blocks [C, C] with 0 elsewhere."""
    size = blocks.shape[0]
    packed = sum(blocks[i : i + BLOCK] for i in range(0, size, BLOCK))
    parts = [packed[i : i + SUBLANES] for i in range(0, BLOCK, SUBLANES)]
    lane = lax.broadcasted_iota(jnp.int32, (SUBLANES, size), 1)
    row = lax.broadcasted_iota(jnp.int32, (SUBLANES, size), 0)
    first = lane - place_in_block(lane, BLOCK)
    x = [jnp.where(place_in_block(lane, BLOCK) == row + i, 1.0, 0.0) for i in range(0, BLOCK, SUBLANES)]
    for j in range(BLOCK - 1):
        done = x[j // SUBLANES][j % SUBLANES : j % SUBLANES + 1]
        for t in range((j + 1) // SUBLANES, BLOCK // SUBLANES):
            # Column j of each block, in all of the block's lanes; 0 in the rows up to j.
            x[t] = x[t] - _lanes(parts[t], first + j) * done
    return jnp.concatenate(x)


@jax.jit
def _lanes(x, index):
    return jnp.take_along_axis(x, index, axis=1)
