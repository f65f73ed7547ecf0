"""Products of tiles that `jax.vjp` can differentiate inside a kernel, and a few operations that Pallas lacks.

The gradients are written by hand, so that their products have explicit operand dtypes too (matrix_unit.py).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.tpu.matrix_unit import NN, NT, TN, dot


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def product(a, b, dtype):
    """a bᵀ. Operands are rounded to `dtype`, in the product and in its gradients."""
    return dot(a, b, dtype, NT)


product.defvjp(
    lambda a, b, dtype: (dot(a, b, dtype, NT), (a, b)),
    lambda dtype, kept, c: (dot(c, kept[1], dtype, NN), dot(c, kept[0], dtype, TN)),
)


def _parts(x, number):
    """`number` bfloat16 arrays whose sum is the float32 array x; exactly x if `number` is 3. Each part has the next 8
    bits of x, truncated, not rounded."""
    parts = []
    for _ in range(number - 1):
        # Truncated by its bits, because a compiler may replace x.astype(bfloat16).astype(float32) by x.
        high = lax.bitcast_convert_type(lax.bitcast_convert_type(x, jnp.int32) & -65536, jnp.float32)
        parts.append(high.astype(jnp.bfloat16))
        x = x - high
    return [*parts, x.astype(jnp.bfloat16)]


def _add(a_parts, b_parts, dimensions):
    return sum(dot(a, b, jnp.bfloat16, dimensions) for a in a_parts for b in b_parts)


def _ones(where):
    return jnp.where(where, 1.0, 0.0).astype(jnp.bfloat16)


def dot_exact(a, b, dtype, dimensions=NN):
    """The product of float32 a and b, as accurate as a call with inputs of `dtype` needs: for float32, as accurate as a
    float32 product; for bfloat16, to 2^-15 |a||b|, with three passes instead of six."""
    if dtype == jnp.float32:
        return dot(a, b, jnp.float32, dimensions)
    (a, a_rest), (b, b_rest) = _parts(a, 2), _parts(b, 2)
    return _add([a], [b, b_rest], dimensions) + _add([a_rest], [b], dimensions)


@jax.custom_vjp
def sums_of_columns(x, where):
    """Σ_l x_il [where_lj] of float32 x, as accurate as float32 sums, with three passes of the matrix unit."""
    return _add(_parts(x, 3), [_ones(where)], NN)


sums_of_columns.defvjp(
    lambda x, where: (sums_of_columns(x, where), where),
    lambda where, c: (_add(_parts(c, 3), [_ones(where)], NT), None),
)


@jax.custom_vjp
def sums_of_rows(where, x):
    """Σ_l [where_il] x_lj of float32 x, as accurate as float32 sums, with three passes of the matrix unit."""
    return _add([_ones(where)], _parts(x, 3), NN)


sums_of_rows.defvjp(
    lambda where, x: (sums_of_rows(where, x), where),
    lambda where, c: (None, _add([_ones(where)], _parts(c, 3), TN)),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def down(x, rows):
    """x [C, W] with row i moved to row i + rows, modulo C."""
    return pltpu.roll(x, rows % x.shape[0], 0)


down.defvjp(
    lambda x, rows: (down(x, rows), None),
    lambda rows, _, c: (down(c, -rows),),
)


def block_of(index, size: int):
    """index // size of non-negative integers, size a power of two. A shift, because a division takes many
    instructions."""
    return index >> (size.bit_length() - 1)


def place_in_block(index, size: int):
    """index % size of non-negative integers, size a power of two."""
    return index & (size - 1)
