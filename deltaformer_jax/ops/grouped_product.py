"""Rows in groups, each group times a matrix of its own: the product of a mixture of experts.

    y_i = x_i W_{e(i)},     rows sorted by group: the first sizes[0] rows belong to W_0, the next sizes[1] to W_1, ...

On accelerators this is `jax.lax.ragged_dot`. On a CPU, XLA would make of it one product of all rows with every matrix.
There the rows are cut into blocks, each of one group, and a loop multiplies one block after another: the cost is that
of one matrix, whatever the number of groups, and half a block a group for what does not fill its last one.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from deltaformer_jax.ops.common.checks import as_int32

BLOCK = 128  # rows of a block: enough for a product of the CPU's speed


def grouped_product(x: jax.Array, matrices: jax.Array, sizes: jax.Array) -> jax.Array:
    """y [n, out], y_i = x_i W_e for the rows i of group e, 0 for rows after the last group.

    Args:
      x: [n, in], its rows sorted by group. Rows after the last group may hold anything finite; they have no influence,
        and their gradient is 0.
      matrices: W [E, in, out] in x's dtype.
      sizes: int [E], the number of rows in each group, 0 allowed; their sum is at most n.

    Raises ValueError for shapes that do not fit, TypeError for dtypes (while tracing).
    Cost: 2 n in out FLOPs. Memory on a CPU: beside the result one block of rows; in the backward pass W's gradient.
    """
    if x.ndim != 2 or matrices.ndim != 3 or x.shape[1] != matrices.shape[1] or sizes.shape != matrices.shape[:1]:
        raise ValueError(
            f"grouped_product takes x [n, in], matrices [E, in, out] and sizes [E]; it was given {list(x.shape)}, "
            f"{list(matrices.shape)} and {list(sizes.shape)}"
        )
    if x.dtype != matrices.dtype or not jnp.issubdtype(sizes.dtype, jnp.integer):
        raise TypeError(
            f"grouped_product takes x and matrices of one dtype and integer sizes; it was given {x.dtype}, "
            f"{matrices.dtype} and {sizes.dtype}"
        )
    sizes = as_int32(sizes)
    if len(matrices) == 1:
        return jnp.where(jnp.arange(len(x))[:, None] < sizes, x @ matrices[0], 0)
    return jax.lax.platform_dependent(x, matrices, sizes, cpu=_by_blocks, default=jax.lax.ragged_dot)


@jax.custom_vjp
def _by_blocks(x, matrices, sizes):
    blocks = _Blocks(sizes, len(x))

    def one(place):
        expert, rows = place
        return blocks.taken(x, rows) @ matrices[expert]

    return blocks.put(jax.lax.map(one, (blocks.group, blocks.rows)))


def _forward(x, matrices, sizes):
    return _by_blocks(x, matrices, sizes), (x, matrices, sizes)


def _backward(residuals, dy):
    x, matrices, sizes = residuals
    blocks = _Blocks(sizes, len(x))

    def one(d_matrices, place):
        group, rows = place
        d_rows = blocks.taken(dy, rows)
        # An update in place: as a sum over the blocks' gradients, each turn would add an array of all matrices.
        d_matrices = d_matrices.at[group].add(blocks.taken(x, rows).T @ d_rows)
        return d_matrices, d_rows @ matrices[group].T

    d_matrices, dx = jax.lax.scan(one, jnp.zeros_like(matrices), (blocks.group, blocks.rows))
    return blocks.put(dx), d_matrices, None


_by_blocks.defvjp(_forward, _backward)


class _Blocks:
    """n rows sorted by group, cut into blocks of BLOCK rows of one group each; the last one of a group is not full.

    group [blocks]: the group of each. rows [blocks, BLOCK]: the row at each place, n where there is none.
    """

    def __init__(self, sizes: jax.Array, rows: int):
        self.count, groups = rows, len(sizes)
        block = min(BLOCK, max(rows, 1))
        number = -(-rows // block) + groups  # at least as many as there can be
        ends = jnp.cumsum(sizes)
        last = jnp.cumsum(-(-sizes // block))  # the number of blocks up to each group
        at = jnp.arange(number)
        self.group = jnp.minimum(jnp.searchsorted(last, at, side="right"), groups - 1)
        first = (ends - sizes)[self.group] + (at - jnp.append(0, last)[self.group]) * block
        found = first[:, None] + jnp.arange(block)
        self.rows = jnp.where((found < ends[self.group][:, None]) & (at < last[-1])[:, None], found, rows)

    def taken(self, x, rows):
        return x.at[rows].get(mode="fill", fill_value=0)

    def put(self, blocks):
        """[blocks, BLOCK, width] -> [n, width]."""
        empty = jnp.zeros((self.count, blocks.shape[-1]), blocks.dtype)
        return empty.at[self.rows].set(blocks, mode="drop")
