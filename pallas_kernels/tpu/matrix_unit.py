"""Products of tiles on the matrix unit (MXU), with explicit operand dtypes.

By default, a TPU multiplies float32 operands in one bfloat16 pass, but the interpreter multiplies them exactly. A
kernel that relied on the default would be tested with another precision than it runs with. Here, bfloat16 operands
take one pass, float32 operands take the six passes that float32 accuracy needs, and sums are float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu

# The dimension numbers of a product: which dimension of each operand is summed over.
NN = (((1,), (0,)), ((), ()))  # a b
NT = (((1,), (1,)), ((), ()))  # a bᵀ
TN = (((0,), (0,)), ((), ()))  # aᵀ b


# The lanes of a vector register. Also the rows and columns of a matrix unit before v6e.
TILE = 128


def tiles(size: int, side: int = TILE):
    """The slices that cut an axis of length `size` into pieces of `side`; the last piece may be shorter."""
    return [slice(i, min(i + side, size)) for i in range(0, size, side)]


def tile_numbers(size: int):
    """(row, column) indices, int32 [size, size], of the entries of a tile that is laid out columns × rows."""
    shape = (size, size)
    return lax.broadcasted_iota(jnp.int32, shape, 1), lax.broadcasted_iota(jnp.int32, shape, 0)


def unit_side() -> int:
    """The rows and columns of a matrix unit: 256 since v6e; 128 before, and if the device is not known."""
    return pltpu.get_tpu_info().mxu_column_size if pltpu.is_tpu_device() else TILE


def quotient(a, b: int):
    """a // b of non-negative integers. `//` handles signs, which Mosaic lowers only if the device is known, but a
    program may be lowered on a machine without a device."""
    return lax.div(a, jnp.asarray(b, jnp.asarray(a).dtype))


def dot(a, b, dtype, dimensions=NN):
    """The product of a and b with operands rounded to `dtype` (bfloat16 or float32) and a float32 result."""
    precision = lax.Precision.HIGHEST if dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot_general(
        a.astype(dtype), b.astype(dtype), dimensions, precision=precision, preferred_element_type=jnp.float32
    )


def product_in_tiles(a, b, dtype):
    """a bᵀ of arrays or refs [A, W] and [B, W], as products of the size of a matrix unit, one column of tiles after
    another. All units work on the same column, so that the first columns are done early. In one large product, each
    unit would take columns of its own, and all columns would be done only at the end."""
    side = unit_side()
    columns = [[dot(a[i, :], b[j, :], dtype, NT) for i in tiles(a.shape[0], side)] for j in tiles(b.shape[0], side)]
    return jnp.concatenate([jnp.concatenate(column, axis=0) for column in columns], axis=1)


def upper_product(a, b, dtype):
    """a bᵀ of a and b [C, W], with 0 in the 128 × 128 tiles below the diagonal, which are not computed."""
    own = tiles(a.shape[0])
    below = jnp.zeros((TILE, TILE), jnp.float32)
    columns = [[dot(a[i, :], b[j, :], dtype, NT) if i.start <= j.start else below for i in own] for j in own]
    return jnp.concatenate([jnp.concatenate(column, axis=0) for column in columns], axis=1)


def times_upper(x, upper, dtype):
    """x [V, C] · upper [C, C]. The tiles of `upper` below the diagonal are 0 and are skipped."""
    parts = [dot(x[:, : i.stop], upper[: i.stop, i], dtype) for i in tiles(upper.shape[0])]
    return jnp.concatenate(parts, axis=1)


def upper_times(upper, x, dtype):
    """upper [C, C] · x [C, V]. The tiles of `upper` below the diagonal are 0 and are skipped."""
    parts = [dot(upper[i, i.start :], x[i.start :], dtype) for i in tiles(upper.shape[0])]
    return jnp.concatenate(parts, axis=0)


class TileProducts(NamedTuple):
    """The three products for a tile [columns, rows]: a bᵀ, which computes the tile, tile · x, and x · tile."""

    outer: Callable
    tile_times: Callable
    times_tile: Callable


WHOLE = TileProducts(lambda a, b, dtype: dot(a, b, dtype, NT), dot, dot)
UPPER = TileProducts(upper_product, upper_times, times_upper)
