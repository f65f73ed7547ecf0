"""Parameters that the devices of the mesh axis "fsdp" hold in shards, and gather where they use them.

    W = all_gather(W_shard),        dL/dW_shard = reduce_scatter(dL/dW)

Inside a `shard_map` over the rows of a batch (`training/over_rows.py`), a parameter's array is the device's shard. A
parameter that is cut says so by its metadata `cut`, the dimension counted from the last one: −1, −2, ... Outside, no
parameter has it, and every function here returns its argument.

Written by hand because XLA, told only how arrays are cut, sums whole gradients on every device where shards are small.
Source: Rajbhandari et al., "ZeRO", arXiv 1910.02054, stage 3.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
from flax import nnx
from jax import lax

SHARD_AXIS = "fsdp"

# What makes a gathered parameter, and what changes how its numbers are laid out or written on the way to a product.
_NOT_KEPT = {"all_gather", "convert_element_type", "reshape", "transpose", "squeeze", "broadcast_in_dim"}


def cut_of(parameter) -> int | None:
    """The dimension along which a parameter's array is a shard, counted from the last one; None: it is whole."""
    return parameter.get_metadata("cut", None) if isinstance(parameter, nnx.Variable) else None


def is_cut(module) -> bool:
    """Whether any parameter of the module is a shard."""
    return any(cut_of(part) is not None for part in jax.tree.leaves(module, is_leaf=_is_parameter))


def gathered(module, dtype, *, all_in_dtype: bool = False):
    """`module` with the whole arrays of its parameters, in their own dtypes.

    Parameters that are only used in the compute dtype (metadata `compute`) are sent, and their gradients summed, in
    `dtype`, which halves the bytes for bfloat16; with `all_in_dtype` all are. Cost: a device sends (n − 1) times its
    shards, and as much for the gradients.
    """

    def whole(parameter):
        cut = cut_of(parameter)
        if cut is None:
            return parameter
        numbers = parameter[...]
        sent = numbers.astype(dtype) if all_in_dtype or parameter.get_metadata("compute", False) else numbers
        return parameter.replace(all_shards(sent, cut).astype(numbers.dtype), cut=None)

    return jax.tree.map(whole, module, is_leaf=_is_parameter)


def all_shards(shard, cut: int):
    """The whole array of which each device has a shard along dimension `cut`; its gradient is reduce-scattered."""
    return lax.all_gather(shard, SHARD_AXIS, axis=shard.ndim + cut, tiled=True)


def look_up_columns(look_up: Callable, rows):
    """look_up(rows) [B, T, D] for a device's own rows [B, T], where look_up gives only the device's D / n columns.

    Each device looks up its columns for all rows and sends every other device the numbers of that one's rows. The
    gradient goes back the same way: a device has the whole gradient of its columns, and nothing is summed over devices.
    Cost: a device sends (n − 1) / n · B T D numbers, and as many for the gradient; the table's size has no influence.
    """
    columns = look_up(lax.all_gather(rows, SHARD_AXIS, axis=0, tiled=True))
    return lax.all_to_all(columns, SHARD_AXIS, split_axis=0, concat_axis=2, tiled=True)


def keep_all_but_gathered(primitive, *_, **__) -> bool:
    """A policy for `jax.checkpoint`: gathered parameters are gathered again in the backward pass, all else is kept.

    Copies in another dtype or layout are made again too, since a copy of a parameter is as large as the parameter.
    """
    return primitive.name not in _NOT_KEPT


def _is_parameter(part) -> bool:
    return isinstance(part, nnx.Variable)
