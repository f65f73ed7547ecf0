"""Refuses a generation whose caches cannot fit in memory, before anything is allocated."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
from flax import nnx

from deltaformer_jax.decoding.chosen.layers import Slots, empty_cache
from deltaformer_jax.sharding.device_memory import limits_of, machine_bytes


@partial(jax.jit, static_argnames=("graphdef", "rows", "slots", "chosen"))
def _cache(graphdef, params, rows: int, slots: Slots, chosen):
    return empty_cache(nnx.merge(graphdef, params), rows, slots, chosen)


def check_memory(
    name: str, value: int, graphdef: Any, params: Any, *, rows: int, slots: Slots, fix: str, chosen: Any = None
) -> None:
    """Raise ValueError, naming the argument, if the caches of `rows` rows with `slots` exceed the memory.

    It is that of all devices which hold the parameters; of a CPU, the machine's. Nothing is said where it is unknown.
    """
    shapes = _cache.eval_shape(graphdef, params, rows=rows, slots=slots, chosen=chosen)
    needed = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))
    there = _memory(params)
    if there is not None and needed > there:
        raise ValueError(
            f"{name} = {value}: the caches of {rows} rows of {slots.text:,} tokens (a power of two) take "
            f"{needed / 2**30:,.1f} GiB, there are {there / 2**30:,.1f} GiB; give {fix}"
        )


def _memory(params: Any) -> int | None:
    devices = {device for leaf in jax.tree.leaves(params) if isinstance(leaf, jax.Array) for device in leaf.devices()}
    if devices and all(device.platform == "cpu" for device in devices):
        return machine_bytes()
    return sum(limits_of(devices)) or None
