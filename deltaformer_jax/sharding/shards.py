"""Parameters that the devices of the mesh axis "fsdp" hold in shards, and gather where they use them.

    W = all_gather(W_shard),        dL/dW_shard = reduce_scatter(dL/dW)

Inside a `shard_map` over the rows of a batch (`training/on_mesh/over_rows.py`), a parameter's array is the device's
shard. A parameter that is cut says so by its metadata `cut`, the dimension counted from the last one: −1, −2, ..., and
by `columns` along which one the mesh axis "tensor" cuts it. Outside, no parameter has them, and `gathered` returns its
argument.

Written by hand because XLA, told only how arrays are cut, sums whole gradients on every device where shards are small.
For the same reason the arrays are sent as lines of numbers, one buffer after another: a TPU's compiler turns a
reduce-scatter along a dimension that its memory is tiled over, and several small ones at once, into sums of everything
on every device.
Source: Rajbhandari et al., "ZeRO", arXiv 1910.02054, stage 3.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec

from deltaformer_jax.sharding.activations import left_to_the_compiler

SHARD_AXIS = "fsdp"

# What makes a gathered parameter, and what changes how its numbers are laid out or written on the way to a product.
_NOT_KEPT = {"all_gather", "convert_element_type", "reshape", "transpose", "squeeze", "broadcast_in_dim", "slice"}

# Shards with fewer numbers are sent together. A buffer's length is a multiple of _LINE, the numbers in a TPU's tile.
_SMALL = 2**16
_LINE = 1024


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

    leaves, structure = jax.tree.flatten(module, is_leaf=_is_parameter)
    cut = [i for i, part in enumerate(leaves) if cut_of(part) is not None]
    if not cut:
        return module
    in_dtype = [all_in_dtype or leaves[i].get_metadata("compute", False) for i in cut]
    shards = [leaves[i][...].astype(dtype if narrow else leaves[i].dtype) for i, narrow in zip(cut, in_dtype)]
    columns = [leaves[i].get_metadata("columns", None) for i in cut]
    for i, whole in zip(cut, all_shards(shards, [cut_of(leaves[i]) for i in cut], columns)):
        leaves[i] = leaves[i].replace(whole.astype(leaves[i].dtype), cut=None)
    return jax.tree.unflatten(structure, leaves)


def all_shards(shards: list[jax.Array], cuts: list[int], columns: list[int | None]) -> list[jax.Array]:
    """The whole arrays, of which each device has shards along the dimensions `cuts`, counted from the last one.

    Their gradients are reduce-scattered: a device gets its shards of the sums over devices. `columns`: the dimensions
    that the mesh axis "tensor" cuts, so counted too, or None.
    """
    return _by_columns(_gather, shards, [x.ndim + cut for x, cut in zip(shards, cuts, strict=True)], columns)


def sums_in_shards(
    wholes: list[jax.Array], axes: list[int], mesh_axis: str, columns: list[int | None]
) -> list[jax.Array]:
    """The sums of arrays over the devices of a mesh axis, of which a device gets its shards along dimensions `axes`.

    `columns`: as for `all_shards`.
    """
    return _by_columns(lambda axes, wholes: _scatter(axes, wholes, mesh_axis), wholes, axes, columns)


def _by_columns(function: Callable, arrays: list[jax.Array], axes: list[int], columns: list[int | None]) -> list:
    """function(axes, arrays), each device of the mesh axis "tensor" for its own columns.

    Left to the compiler, an array that "tensor" cuts would be gathered before it is written as a line.
    """
    done = [None] * len(arrays)
    devices = left_to_the_compiler().get("tensor", 1)
    split = [i for i, column in enumerate(columns) if column is not None and devices > 1]
    for own, is_split in (([i for i in range(len(arrays)) if i not in split], False), (split, True)):
        if not own:
            continue
        apply = functools.partial(function, tuple(axes[i] for i in own))
        if is_split:
            specs = [PartitionSpec(*[None] * (arrays[i].ndim + columns[i]), "tensor") for i in own]
            apply = jax.shard_map(apply, in_specs=(specs,), out_specs=specs, axis_names={"tensor"}, check_vma=False)
        for i, result in zip(own, apply([arrays[i] for i in own])):
            done[i] = result
    return done


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gather(axes: tuple[int, ...], shards: list[jax.Array]) -> list[jax.Array]:
    devices, whole = lax.axis_size(SHARD_AXIS), [None] * len(shards)
    for members in _buffers(shards):
        line = _padded(jnp.concatenate([shards[i].reshape(-1) for i in members]))
        lines = lax.all_gather(line, SHARD_AXIS, tiled=True).reshape(devices, -1)
        start = 0
        for i in members:
            shape, axis = shards[i].shape, axes[i]
            stack = lines[:, start : start + shards[i].size].reshape(devices, *shape)
            whole[i] = jnp.moveaxis(stack, 0, axis).reshape(*shape[:axis], -1, *shape[axis + 1 :])
            start += shards[i].size
    return whole


def _gather_forward(axes, shards):
    return _gather(axes, shards), None


def _gather_backward(axes, _, gradients):
    return (_scatter(axes, gradients, SHARD_AXIS),)


_gather.defvjp(_gather_forward, _gather_backward)


def _scatter(axes: tuple[int, ...], wholes: list[jax.Array], mesh_axis: str) -> list[jax.Array]:
    devices, sums, before = lax.axis_size(mesh_axis), [None] * len(wholes), ()
    shapes = [(*x.shape[:axis], x.shape[axis] // devices, *x.shape[axis + 1 :]) for x, axis in zip(wholes, axes)]
    for members in _buffers([jax.ShapeDtypeStruct(shape, x.dtype) for shape, x in zip(shapes, wholes)]):
        stacks = []
        for i in members:
            shape, axis = shapes[i], axes[i]
            stack = wholes[i].reshape(*shape[:axis], devices, *shape[axis:])
            stacks.append(jnp.moveaxis(stack, axis, 0).reshape(devices, -1))
        lines = _padded(jnp.concatenate(stacks, axis=1)).reshape(-1)
        # One buffer waits for the last, or a TPU's compiler would sum both at once and whole. So it would if what
        # follows were part of the same fusion.
        lines, _ = lax.optimization_barrier((lines, before))
        line = before = lax.optimization_barrier(lax.psum_scatter(lines, mesh_axis, tiled=True))
        start = 0
        for i in members:
            size = math.prod(shapes[i])
            sums[i] = line[start : start + size].reshape(shapes[i])
            start += size
    return sums


def _buffers(shards) -> list[list[int]]:
    """The numbers of the arrays that are sent together: each large one alone, the small ones of a dtype as one."""
    buffers: dict = {}
    for i, x in enumerate(shards):
        buffers.setdefault(i if x.size >= _SMALL else x.dtype, []).append(i)
    return list(buffers.values())


def _padded(x):
    """x with zeros after it along its last axis, up to a multiple of _LINE."""
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % _LINE)])


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
