"""Part "long": lengths that the float64 recurrence cannot reach, beside the form "chunked" on the same device.

Values and all gradients by both implementations, from the same bfloat16 arrays. Each block of 64 tokens is compared by
itself (compare.block_differences). The two forms differ by roundings to bfloat16; a tile of 64 columns that is left out
of the rows at 32768 tokens changes them by √(64/32768), 0.044. A case is one form; each length is a result.
"""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
from cases import Case
from measure import Compiled

from on_gpu import OPS, delta, gated
from on_gpu.compare import block_differences, with_gradients, worst
from on_gpu.delta import use_tiles

LENGTHS = (8192, 32768)
# Keys have length √K: with a scale of 1/K the delta rule forgets and u stays finite.
LINEAR = dict(write="linear", read="linear", write_scale=1 / 128, read_scale=1 / 128)
FORMS = {
    "delta": {
        "w = k": delta.Shape(),
        "tied": delta.Shape(write_query="query"),
        "w = k, eight documents": delta.Shape(documents=8),
        "untied": delta.Shape(write_query="heads"),
        "w = k, 8 queries a key": delta.Shape(heads=8, kv_heads=1),
        "w = k, linear": delta.Shape(**LINEAR),
        "tied, eight documents": delta.Shape(write_query="query", documents=8),
        "untied, eight documents": delta.Shape(write_query="heads", documents=8),
        "linear, eight documents": delta.Shape(**LINEAR, documents=8),
    },
    "gated": {
        "delta rule, a decay a head": gated.Shape(),
        "delta rule, a decay a channel": gated.Shape(decay="channel"),
        "delta rule, a head, eight documents": gated.Shape(documents=8),
        "delta rule, a channel, eight documents": gated.Shape(decay="channel", documents=8),
        "linear attention, a decay a head": gated.Shape(delta=False),
        "linear attention, a decay a channel": gated.Shape(delta=False, decay="channel"),
    },
}
QUICK = {"delta": 3, "gated": 3}  # the first forms, at the first length
# Rounding makes 0.006 of it: the largest over these forms at 1024 tokens, with the kernels interpreted on a CPU.
BOUND = 0.03


def cases(op: str, quick: bool, tiles: dict) -> list[Case]:
    forms = list(FORMS[op])[: QUICK[op] if quick else None]
    lengths = LENGTHS[: 1 if quick else None]
    settings = lambda form: {"op": op, "form": form, "lengths": lengths, "tiles": tiles}
    return [Case("long", op, form, "on_gpu.long:check", settings(form)) for form in forms]


def check(worker, op: str, form: str, lengths: list[int], tiles: dict, kernels: str = "triton", sizes=()) -> None:
    """`sizes`: fields of the shape to replace, to try the function at a small size."""
    use_tiles(tiles)
    module = OPS[op]
    for length in lengths:
        worker.at(f"T = {length}")
        shape = dataclasses.replace(FORMS[op][form], time=length, **dict(sizes))
        given = module.inputs(shape, np.random.default_rng(0))
        programs = [Compiled(with_gradients(module.call(shape, name)), *given).program for name in (kernels, "chunked")]
        with worker.alone():
            there = jax.device_put(given)
            found, expected = (jax.device_get(program(*there)) for program in programs)
        apart = block_differences(found, expected, length)
        name, error = worst(apart)
        # Not `error > BOUND`, so that NaN fails too.
        wrong = not error <= BOUND
        said = f"{name} is off by {error:.2g}, more than {BOUND}" if wrong else f"agrees, {name} to {error:.1e}"
        worker.result(f"T = {length}: {said}", wrong, T=length, differences=apart)
