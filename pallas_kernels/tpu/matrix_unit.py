"""Products of tiles on the matrix unit, and their operands' types said outright.

A TPU multiplies float32 operands in one bfloat16 pass unless told otherwise, and an interpreter multiplies them
exactly: a kernel that leaves it open is tested for one thing and does another. Here bfloat16 operands take one pass,
float32 ones the six that float32 accuracy costs; sums are float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu

# Which dimension of each operand is summed over.
NN = (((1,), (0,)), ((), ()))  # a b
NT = (((1,), (1,)), ((), ()))  # a bᵀ
TN = (((0,), (0,)), ((), ()))  # aᵀ b


# The lanes of a register, and rows and columns of a matrix unit before v6e.
TILE = 128


def tiles(size: int, side: int = TILE):
    """The slices of an axis of `size`, `side` numbers each and the last one the rest."""
    return [slice(i, min(i + side, size)) for i in range(0, size, side)]


def tile_numbers(size: int):
    """(Rows, columns) [size, size] int32: the number of each in a tile of columns × rows."""
    shape = (size, size)
    return lax.broadcasted_iota(jnp.int32, shape, 1), lax.broadcasted_iota(jnp.int32, shape, 0)


def unit_side() -> int:
    """Rows and columns of a matrix unit: 256 since v6e; 128 before, and where the device is not known yet."""
    return pltpu.get_tpu_info().mxu_column_size if pltpu.is_tpu_device() else TILE


def quotient(a, b: int):
    """a // b of numbers that are not negative. `//` looks at signs, which Mosaic lowers for known devices only, and a
    program may be lowered where there is none."""
    return lax.div(a, jnp.asarray(b, jnp.asarray(a).dtype))


def dot(a, b, dtype, dimensions=NN):
    """The product with operands rounded to `dtype` (bfloat16 or float32), in float32."""
    precision = lax.Precision.HIGHEST if dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot_general(
        a.astype(dtype), b.astype(dtype), dimensions, precision=precision, preferred_element_type=jnp.float32
    )


def product_in_tiles(a, b, dtype):
    """a bᵀ, of arrays or refs [A, W] and [B, W], in products as large as a matrix unit: its first columns, by all
    units, then the next. In one piece each unit takes columns of its own, and no column is done before all are."""
    side = unit_side()
    columns = [[dot(a[i, :], b[j, :], dtype, NT) for i in tiles(a.shape[0], side)] for j in tiles(b.shape[0], side)]
    return jnp.concatenate([jnp.concatenate(column, axis=0) for column in columns], axis=1)


def upper_product(a, b, dtype):
    """The same of a and b [C, W], 0 in tiles of 128 × 128 below the diagonal, which are not multiplied."""
    own = tiles(a.shape[0])
    below = jnp.zeros((TILE, TILE), jnp.float32)
    columns = [[dot(a[i, :], b[j, :], dtype, NT) if i.start <= j.start else below for i in own] for j in own]
    return jnp.concatenate([jnp.concatenate(column, axis=0) for column in columns], axis=1)


def times_upper(x, upper, dtype):
    """x [V, C] · upper [C, C], which has 0 in tiles below the diagonal: they are not multiplied."""
    parts = [dot(x[:, : i.stop], upper[: i.stop, i], dtype) for i in tiles(upper.shape[0])]
    return jnp.concatenate(parts, axis=1)


def upper_times(upper, x, dtype):
    """upper [C, C] · x [C, V], likewise."""
    parts = [dot(upper[i, i.start :], x[i.start :], dtype) for i in tiles(upper.shape[0])]
    return jnp.concatenate(parts, axis=0)


class TileProducts(NamedTuple):
    """What a tile [columns, rows] is made of and what is made of it: a bᵀ, tile · x, and x · tile."""

    outer: Callable
    tile_times: Callable
    times_tile: Callable


WHOLE = TileProducts(lambda a, b, dtype: dot(a, b, dtype, NT), dot, dot)
UPPER = TileProducts(upper_product, upper_times, times_upper)
