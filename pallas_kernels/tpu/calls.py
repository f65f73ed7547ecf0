"""A pallas_call with named arrays: a kernel gets a dictionary of refs, and an absent array is absent there."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.tpu.lowered import traced_when_lowered


@dataclasses.dataclass(frozen=True)
class Input:
    """An input array and its blocks: the block's shape, and the function (head, step, prefetched) -> block index. With
    the block () the array stays in HBM."""

    array: jax.Array
    block: tuple[int, ...] = ()
    index: Callable | None = None


@dataclasses.dataclass(frozen=True)
class Output:
    """An output's shape and dtype, and its blocks, as in Input. With the block () the array stays in HBM."""

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
    """Runs kernel(prefetched, refs) over the grid (heads, steps) and returns {name: output}.

    The steps of a head run in order; heads are independent. Inputs and outputs that are None are left out. `prefetched`
    is a small integer array for the kernel and the index functions. `scratch` (pltpu.VMEM and semaphores) keeps its
    content from step to step. `interpret`: False, True or a pltpu.InterpretParams.
    """
    inputs = {key: x for key, x in inputs.items() if x is not None}
    outputs = {key: x for key, x in outputs.items() if x is not None}
    names = [*inputs, *outputs, *scratch]

    def body(prefetched, *refs):
        kernel(prefetched, dict(zip(names, refs, strict=True)))

    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in outputs.values()]
    run = pl.pallas_call(
        body,
        out_shape=shapes,
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
    )
    arrays = prefetched, *(x.array for x in inputs.values())
    # The interpreter's callbacks are effects, which a primitive must declare: an interpreted kernel is traced here.
    results = run(*arrays) if interpret else traced_when_lowered(run, shapes, *arrays)
    return dict(zip(outputs, results, strict=True))


def _spec(x: Input | Output) -> pl.BlockSpec:
    return pl.BlockSpec(x.block, x.index) if x.block else pl.BlockSpec(memory_space=pl.ANY)
