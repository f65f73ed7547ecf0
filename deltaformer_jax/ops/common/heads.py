"""Layout of heads: an op's arguments are [B, T, H, …]; its inner functions take one head, with time first.

Query heads h·r … h·r + r − 1 share key/value head h (r = H/G), as in grouped-query attention. u has the heads of the
write query: Hu = G or H. If Hu = H > G, the keys and values are repeated for each write head. If Hu = G < H, the r
query heads of a group are folded into rows, [T·r, K].
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def over_heads(function, *, shared):
    """`function` of one head, mapped over batch and heads.

    Arguments have leading axes [B, h]. `shared` lists the positions of arguments that all heads of a batch row share,
    for example segment ids; these have the leading axis [B] only.
    """

    def mapped(*arguments):
        inner = tuple(None if i in shared else 0 for i in range(len(arguments)))
        return jax.vmap(jax.vmap(function, in_axes=inner), in_axes=0)(*arguments)

    return mapped


def heads_first(x):
    """[B, T, h, …] -> [B, h, T, …]; None stays None."""
    return None if x is None else jnp.moveaxis(x, 2, 1)


def heads_last(x):
    """[B, h, T, …] -> [B, T, h, …]; None stays None."""
    return None if x is None else jnp.moveaxis(x, 1, 2)


def repeat_heads(x, heads):
    """[B, T, G, …] -> [B, T, heads, …], each head repeated `heads`/G times; None stays None."""
    if x is None or x.shape[2] == heads:
        return x
    return jnp.repeat(x, heads // x.shape[2], axis=2)


def sum_heads(x, heads):
    """The transpose of `repeat_heads`: [B, T, H, …] -> [B, T, heads, …]."""
    if x.shape[2] == heads:
        return x
    return x.reshape(*x.shape[:2], heads, x.shape[2] // heads, *x.shape[3:]).sum(axis=3)


def fold_queries(x, heads):
    """[B, T, H, …] -> [B, heads, T·r, …]: row t·r + i is query head h·r + i of token t."""
    b, t, h, *rest = x.shape
    return jnp.moveaxis(x.reshape(b, t, heads, h // heads, *rest), 2, 1).reshape(b, heads, t * (h // heads), *rest)


def unfold_queries(x, group):
    """The inverse of `fold_queries`: [B, heads, T·r, …] -> [B, T, H, …]."""
    b, heads, rows, *rest = x.shape
    return jnp.moveaxis(x.reshape(b, heads, rows // group, group, *rest), 1, 2).reshape(
        b, rows // group, heads * group, *rest
    )


def pad_time(x, length):
    """Zeros after the last token, up to `length` tokens; None stays None. Time is axis 1."""
    if x is None or x.shape[1] == length:
        return x
    return jnp.pad(x, [(0, 0), (0, length - x.shape[1])] + [(0, 0)] * (x.ndim - 2))
