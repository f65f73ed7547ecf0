"""Compiles the launches of DeltaFormer's Triton kernels at training shapes to machine code, without a GPU.

The tests compile every tile for an H100. For other architectures they compile the tiles of one width in each precision.
After changing a tile, run

    python tests/support/triton_compile.py [CAPABILITY ...]

It compiles every tile of the table for its architecture and prints its shared memory and register spills. This takes
some minutes.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import multiprocessing
import re
import subprocess
import sys
import tempfile

import jax
import jax.numpy as jnp
from triton import knobs

from pallas_kernels.triton.delta import api as delta
from pallas_kernels.triton.delta import form
from pallas_kernels.triton.delta import launches as delta_launches
from pallas_kernels.triton.delta.table import SHARED_MEMORY, TABLE
from pallas_kernels.triton.launch import compile_for
from pallas_kernels.triton.limits import WIDTHS

CONFIGURATIONS = [
    (kernel, operands, width)
    for (kernel, operands), tiles in TABLE[90].items()
    for width, tile in zip(WIDTHS, tiles)
    if tile is not None
] + [(kernel, "pair", width) for kernel in ("forward_inverses", "backward_inverses") for width in WIDTHS]
# For architectures other than the H100's: they differ in instructions, which do not depend on the width.
ONE_WIDTH = [(*x, width) for *x, width in CONFIGURATIONS if width == (64 if x[1] == "exact" else 128)]


def launch_of(kernel, capability, width, operands, similarity=None, segments=False):
    """The launch of a kernel of the table at batch 2, 8192 tokens, 32 query heads and 8 key/value heads.

    The similarity is softmax, or linear if operands is "pair", unless `similarity` names another.
    """
    similarity = similarity or ("linear" if operands == "pair" else "softmax")
    dtype = jnp.float32 if operands == "exact" else jnp.bfloat16
    array = lambda heads, dtype: jax.ShapeDtypeStruct((2, 8192, heads, width), dtype)
    x, kv, exact = array(32, dtype), array(8, dtype), array(32, jnp.float32)
    gate, row = jax.ShapeDtypeStruct((2, 8192, 32), dtype), jax.ShapeDtypeStruct((2, 32, 8192), jnp.float32)
    tied = kernel.startswith("tied")
    kappa = delta.Kappa(similarity, 0.1)
    settings = delta.Settings(kappa, None if tied else kappa, tied, capability)
    u = {"narrow": (x, None), "pair": (x, x), "exact": (exact, None)}[operands]
    assert form.operands(kappa, dtype) == operands
    found = []

    def build(gate, ids):
        ids = ids if segments else None
        inverse = (x, x) if operands == "pair" else (None, None)
        if kernel.endswith("_inverses"):
            write = "write_" + kernel.removesuffix("_inverses")
            launch = delta_launches.invert_blocks_launch(settings, write, x, kv, kv, gate, ids)
        elif kernel in ("write_forward", "tied_forward"):
            launch = delta_launches.write_forward_launch(settings, x, kv, kv, gate, gate, ids, inverse)
        elif kernel == "read_forward":
            launch = delta_launches.read_forward_launch(settings, x, kv, *u, ids)
        elif kernel == "read_backward":
            launch = delta_launches.read_backward_launch(settings, x, kv, *u, x, row, row, ids)
        else:
            both = (x, row, row) if tied else None
            saved = (exact, *u, x, row)
            launch = delta_launches.write_backward_launch(
                settings, x, kv, kv, gate, gate, ids, inverse, *saved, exact, both
            )
        shapes = tuple(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in launch.arrays)
        found.append(dataclasses.replace(launch, arrays=shapes))

    jax.eval_shape(build, gate, jax.ShapeDtypeStruct((2, 8192), jnp.int32))
    return found[0]


def compiled(launch, capability):
    """(PTX, bytes of shared memory, bytes of registers that a thread spills to memory)."""
    kernel = compile_for(launch, capability)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [knobs.nvidia.cuobjdump.path, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    return kernel.asm["ptx"], kernel.metadata.shared, int(re.search(r"STACK:(\d+)", usage)[1])


def _report(configuration):
    kernel, operands, width, capability = configuration
    if (kernel, operands) in TABLE[capability] and TABLE[capability][kernel, operands][WIDTHS.index(width)] is None:
        return configuration, "no tile"
    _, shared, spilled = compiled(launch_of(kernel, capability, width, operands), capability)
    return configuration, f"{shared} bytes shared of {SHARED_MEMORY[capability]}, {spilled} spilled"


if __name__ == "__main__":
    wanted = [int(x) for x in sys.argv[1:]] or list(TABLE)
    with concurrent.futures.ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        for answer in pool.map(_report, [(*x, capability) for capability in wanted for x in CONFIGURATIONS]):
            print(*answer, flush=True)
