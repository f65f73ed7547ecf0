"""A kernel launch as data: JAX runs it, a test interprets it on the CPU, and a compiler turns it into machine code
without a GPU.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@dataclasses.dataclass(frozen=True)
class Output:
    """An array that a kernel writes. `zeroed`: the array is set to 0 before the kernel starts."""

    shape: tuple[int, ...]
    dtype: Any
    zeroed: bool = False


@dataclasses.dataclass(frozen=True)
class Launch:
    """The launch kernel[(grid,)](*arrays, *scalars, *outputs, **constants) of `grid` programs.

    Scalars are ints or np.float32. A constant may be a frozen dataclass; a kernel reads its fields and properties. If a
    field is not a number, a kernel must name it before it passes it to a function (`KEYS: tl.constexpr = FORM.keys`).
    `warps` and `stages` are Triton's num_warps and num_stages.
    """

    kernel: triton.JITFunction
    arrays: tuple
    outputs: tuple[Output, ...]
    scalars: tuple
    grid: int
    constants: Mapping[str, Any]
    warps: int
    stages: int


# Columns of tensor memory per multiprocessor (compute capability 10.0).
TENSOR_MEMORY = 512

# NumPy's name of a type -> Triton's name.
_TYPES = {
    "bfloat16": "bf16",
    "float16": "fp16",
    "float32": "fp32",
    "int32": "i32",
}


def type_name(dtype) -> str:
    """Triton's name of the dtype of an array or a scalar."""
    return _TYPES[np.dtype(dtype).name]


def run(launch: Launch, compute_capability: int | None = None) -> list[jax.Array]:
    """The outputs of the launch, as part of a JAX program for an NVIDIA GPU.

    `compute_capability` is 90 for an H100; None means `target_capability()`.
    Raises NotImplementedError under jvp and vmap. The callers handle both (api.py).
    """
    return _jax_triton().triton_call(
        *launch.arrays,
        *launch.scalars,
        kernel=launch.kernel,
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in launch.outputs],
        grid=(launch.grid,),
        name=launch.kernel.__name__,
        num_warps=launch.warps,
        num_stages=launch.stages,
        compute_capability=compute_capability or target_capability(),
        zeroed_outputs=tuple(i for i, x in enumerate(launch.outputs) if x.zeroed),
        **launch.constants,
    )


def _jax_triton():
    """The package jax_triton. Its import changes TRITON_CACHE_DIR, Triton's folder of compiled kernels; this function
    restores it."""
    before = os.environ.get("TRITON_CACHE_DIR")
    import jax_triton

    if before is None:
        os.environ.pop("TRITON_CACHE_DIR", None)
    else:
        os.environ["TRITON_CACHE_DIR"] = before
    return jax_triton


def compile_for(launch: Launch, compute_capability: int):
    """The kernel compiled by Triton for a compute capability (80, 90, 100, 120). Needs no GPU.

    The result's `.asm` has "ptx" and "cubin". `launch.arrays` may be `jax.ShapeDtypeStruct`s.
    """
    arguments = [*launch.arrays, *launch.scalars, *launch.outputs]
    names = launch.kernel.arg_names[: len(arguments)]
    signature, attributes = {}, {}
    for i, (name, x) in enumerate(zip(names, arguments)):
        if isinstance(x, int):
            signature[name] = "i32"
        elif isinstance(x, np.float32):
            signature[name] = "fp32"
        else:
            signature[name] = "*" + type_name(x.dtype)
            # JAX's arrays are aligned to 16 bytes.
            attributes[(i,)] = [["tt.divisibility", 16]]
    signature |= dict.fromkeys(launch.constants, "constexpr")
    source = ASTSource(launch.kernel, signature, constexprs=dict(launch.constants), attrs=attributes)
    options = {"num_warps": launch.warps, "num_stages": launch.stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", compute_capability, 32), options=options)
    if compiled.metadata.tmem_size > TENSOR_MEMORY:
        # Triton would compile such a kernel to a trap instruction, without an error.
        raise ValueError(
            f"{launch.kernel.__name__} takes {compiled.metadata.tmem_size} columns of tensor memory, more than a "
            "multiprocessor has: choose a smaller tile"
        )
    return compiled


def target_capability() -> int:
    """The compute capability to compile for: that of the first NVIDIA device; 90 (an H100) if there is no device.

    So a program that is compiled on a machine without a GPU is for an H100, unless Settings say otherwise.
    """
    try:
        return round(float(jax.devices("cuda")[0].compute_capability) * 10)
    except RuntimeError:
        return 90
