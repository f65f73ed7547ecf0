"""A Pallas call whose arrays have names: a kernel asks for what is there, and not by counting."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu


@dataclasses.dataclass(frozen=True)
class Input:
    """An array and how it is cut: the block's shape, and its index from (head, step, prefetched). A block () leaves it
    in HBM."""

    array: jax.Array
    block: tuple[int, ...] = ()
    index: Callable | None = None


@dataclasses.dataclass(frozen=True)
class Output:
    """A result's shape and dtype, and how it is cut; a block () leaves it in HBM."""

    shape: tuple[int, ...]
    dtype: jax.typing.DTypeLike
    block: tuple[int, ...] = ()
    index: Callable | None = None


def call(
    kernel: Callable,
    name: str,
    grid: tuple[int, int],
    prefetched: jax.Array,
    inputs: dict[str, Input | None],
    outputs: dict[str, Output | None],
    scratch: dict[str, Any],
    *,
    vmem_bytes: int,
    interpret=False,
) -> dict[str, jax.Array]:
    """Runs kernel(prefetched, refs) over `grid` (heads, steps), steps of one head in order; absent arrays are None.

    `scratch` (pltpu.VMEM and semaphores) lasts over the steps. `interpret`: False, True or a pltpu.InterpretParams.
    """
    inputs = {key: x for key, x in inputs.items() if x is not None}
    outputs = {key: x for key, x in outputs.items() if x is not None}
    names = [*inputs, *outputs, *scratch]

    def body(prefetched, *refs):
        kernel(prefetched, dict(zip(names, refs, strict=True)))

    results = pl.pallas_call(
        body,
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in outputs.values()],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=grid,
            in_specs=[_spec(x) for x in inputs.values()],
            out_specs=[_spec(x) for x in outputs.values()],
            scratch_shapes=list(scratch.values()),
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=vmem_bytes
        ),
        name=name,
        interpret=interpret,
    )(prefetched, *(x.array for x in inputs.values()))
    return dict(zip(outputs, results, strict=True))


def _spec(x: Input | Output) -> pl.BlockSpec:
    return pl.BlockSpec(x.block, x.index) if x.block else pl.BlockSpec(memory_space=pl.ANY)
