"""Part "shapes": values and all gradients at random small shapes, in float32 and bfloat16, against the definition.

The definition is `implementation="recurrent"` in float64 on the CPU. A case is several shapes, whose kernels its
process compiles one after the other. Each shape is a result.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from cases import Case
from measure import Compiled

from on_gpu import OPS
from on_gpu.compare import differences, with_gradients, worst
from on_gpu.delta import use_tiles

DTYPES = ("float32", "bfloat16")
PROCESSES = 10  # for each op, at most; a process has two shapes or more


def cases(op: str, count: int, tiles: dict) -> list[Case]:
    """`count` shapes, shared out in runs of neighbours."""
    parts = [[int(x) for x in part] for part in np.array_split(np.arange(count), min(-(-count // 2), PROCESSES))]
    name = lambda part: f"{part[0]}" if len(part) == 1 else f"{part[0]} to {part[-1]}"
    settings = lambda part: {"op": op, "numbers": part, "tiles": tiles}
    return [Case("shapes", op, name(part), "on_gpu.shapes:check", settings(part)) for part in parts]


def check(worker, op: str, numbers: list[int], tiles: dict, kernels: str = "triton", longest: int = 400) -> None:
    use_tiles(tiles)
    module = OPS[op]
    for number in numbers:
        shape = module.draw(np.random.default_rng(number), longest)
        definition = jax.jit(with_gradients(module.call(shape, "recurrent")))
        errors, off = {}, []
        for dtype in DTYPES:
            worker.at(f"shape {number} in {dtype}: {shape}")
            given = module.inputs(shape, np.random.default_rng([1, number]), dtype)
            program = Compiled(with_gradients(module.call(shape, kernels)), *given).program
            expected = _in_float64(definition, given)
            with worker.alone():
                found = jax.device_get(program(*jax.device_put(given)))
            name, error = worst(differences(found, expected))
            errors[dtype] = error
            # Not `error > bound`, so that NaN fails too.
            if not error <= (bound := module.bound(shape, dtype)):
                off.append(f"{name} in {dtype} is off by {error:.2g}, more than {bound}")
        agrees = "agrees, " + ", ".join(f"{dtype} to {error:.1e}" for dtype, error in errors.items())
        said = f"{'; '.join(off) or agrees}: shape {number}, {shape}"
        worker.result(said, wrong=bool(off), shape=number, errors=errors)


def _in_float64(definition, given) -> dict:
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        arrays, segments, cotangents = given
        wide = lambda arrays: {name: jnp.asarray(x, jnp.float64) for name, x in arrays.items()}
        return jax.device_get(definition(wide(arrays), segments, wide(cotangents)))
