"""Blocks of rows, each times one of several matrices: the product of a mixture of experts, and how rows get there.

    y_b = x_b W_{group(b)}        x_b [block, in], the blocks sorted by group

Rows (a token and one of its experts) are laid out so that every block belongs to one expert; the last block of an
expert is filled up with rows of 0. The product then costs what its rows cost, whatever the number of experts:

* on a CPU a loop multiplies one block after another;
* on a GPU it is one batched product, of the blocks with copies of their matrices;
* on a TPU it is `jax.lax.ragged_dot`.

`ragged_dot` alone would do, but on CPUs and GPUs XLA turns it into a product of all rows with all matrices (jax 0.10.2,
0.11.2). Everything between tokens and blocks is a gather, forward and backward, so that sums have one order.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

MOST, LEAST = 512, 8  # rows of a block


class Layout(NamedTuple):
    """Where rows lie: n tokens with k experts each in `blocks` blocks of `block` rows.

    group int32 [blocks]: the expert of each block. choice int32 [blocks, block]: the row k t + j at each place, for
    token t and its j-th expert; n k where there is none. place int32 [n, k]: the inverse, blocks · block for a row that
    goes to no expert.
    """

    group: jax.Array
    choice: jax.Array
    place: jax.Array


def layout(experts: jax.Array, number: int) -> Layout:
    """The Layout of experts int [n, k], each in 0 … number − 1, or `number` for a row that goes to no expert.

    The rows of a block are about an eighth of the mean number of rows of an expert: little is filled up, and a product
    is large enough. Cost: a sort of n k integers.
    """
    rows = experts.size
    block = max(LEAST, min(MOST, 1 << max(0, (rows // (8 * number)).bit_length() - 1)))
    blocks = max(1, min(-(-rows // block) + number, rows))  # at most as many: a block has a row
    flat = experts.reshape(-1).astype(jnp.int32)
    order = jnp.argsort(flat, stable=True).astype(jnp.int32)
    sizes = jnp.sum(flat[:, None] == jnp.arange(number), axis=0, dtype=jnp.int32)
    ends, last = jnp.cumsum(sizes), jnp.cumsum(-(-sizes // block))  # of rows, of blocks
    at = jnp.arange(blocks, dtype=jnp.int32)
    group = jnp.minimum(jnp.searchsorted(last, at, side="right").astype(jnp.int32), number - 1)
    before = jnp.concatenate([jnp.zeros(1, jnp.int32), last[:-1]])
    found = ((ends - sizes)[group] + (at - before[group]) * block)[:, None] + jnp.arange(block)
    here = (found < ends[group][:, None]) & (at < last[-1])[:, None]
    choice = jnp.where(here, order.at[found].get(mode="clip"), rows)
    expert = jnp.minimum(flat[order], number - 1)
    of_sorted = before[expert] * block + jnp.arange(rows, dtype=jnp.int32) - (ends - sizes)[expert]
    of_sorted = jnp.where(flat[order] < number, of_sorted, blocks * block)
    return Layout(group, choice, of_sorted[jnp.argsort(order)].reshape(experts.shape))


def to_blocks(x: jax.Array, at: Layout) -> jax.Array:
    """x [n, width] -> [blocks, block, width]: each token's row at each of its places, 0 elsewhere."""
    return _to_blocks(x, at.choice, at.place)


def from_blocks(y: jax.Array, at: Layout) -> jax.Array:
    """y [blocks, block, width] -> [n, k, width], the inverse: 0 for a row that went to no expert."""
    return _from_blocks(y, at.choice, at.place)


@jax.custom_vjp
def _to_blocks(x, choice, place):
    return x.at[choice // place.shape[1]].get(mode="fill", fill_value=0)


@jax.custom_vjp
def _from_blocks(y, choice, place):
    return y.reshape(-1, y.shape[-1]).at[place].get(mode="fill", fill_value=0)


def _to_blocks_backward(indices, dy):
    return jnp.sum(_from_blocks(dy, *indices), axis=1), None, None


def _from_blocks_backward(indices, dx):
    choice, _ = indices
    return dx.reshape(-1, dx.shape[-1]).at[choice].get(mode="fill", fill_value=0), None, None


_to_blocks.defvjp(lambda x, *indices: (_to_blocks(x, *indices), indices), _to_blocks_backward)
_from_blocks.defvjp(lambda y, *indices: (_from_blocks(y, *indices), indices), _from_blocks_backward)


def grouped_product(x: jax.Array, matrices: jax.Array, group: jax.Array) -> jax.Array:
    """y [blocks, block, out], y_b = x_b W_{group(b)}.

    Args:
      x: [blocks, block, in], matrices: W [E, in, out], of one dtype.
      group: int [blocks], from 0 to E − 1, not falling.

    Raises ValueError for shapes that do not fit, TypeError for dtypes (while tracing).
    Cost: 2 in out FLOPs for each row. Memory beside the result: on a GPU in out numbers for each block.
    """
    if x.ndim != 3 or matrices.ndim != 3 or x.shape[2] != matrices.shape[1] or group.shape != x.shape[:1]:
        raise ValueError(
            f"grouped_product takes x [blocks, block, in], matrices [E, in, out] and group [blocks]; it was given "
            f"{list(x.shape)}, {list(matrices.shape)} and {list(group.shape)}"
        )
    if x.dtype != matrices.dtype or not jnp.issubdtype(group.dtype, jnp.integer):
        raise TypeError(
            f"grouped_product takes x and matrices of one dtype and integers group; it was given {x.dtype}, "
            f"{matrices.dtype} and {group.dtype}"
        )
    if len(matrices) == 1:
        return x @ matrices[0]
    forms = {"cpu": _in_turn, "tpu": _ragged}
    return jax.lax.platform_dependent(x, matrices, group, **forms, default=_at_once)


def _at_once(x, matrices, group):
    return jnp.einsum("bri,bio->bro", x, matrices[group])


def _ragged(x, matrices, group):
    blocks, block, width = x.shape
    sizes = block * jnp.sum(group[:, None] == jnp.arange(len(matrices)), axis=0, dtype=jnp.int32)
    return jax.lax.ragged_dot(x.reshape(blocks * block, width), matrices, sizes).reshape(blocks, block, -1)


@jax.custom_vjp
def _in_turn(x, matrices, group):
    return jax.lax.map(lambda block: block[0] @ matrices[block[1]], (x, group))


def _in_turn_backward(residuals, dy):
    x, matrices, group = residuals

    def one(d_matrices, block):
        x, dy, group = block
        # An update in place: a sum of the blocks' gradients would add an array of all matrices in each turn.
        return d_matrices.at[group].add(x.T @ dy), dy @ matrices[group].T

    d_matrices, dx = jax.lax.scan(one, jnp.zeros_like(matrices), (x, dy, group))
    return dx, d_matrices, None


_in_turn.defvjp(lambda *arguments: (_in_turn(*arguments), arguments), _in_turn_backward)
