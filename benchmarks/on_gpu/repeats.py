"""Part "repeats": the same call many times, forward and backward. Different results would show a race.

Results without additions in arbitrary order must be the same bit for bit: all of the gated ops', and the output and the
gradient of the value of `delta_attention`. Its other gradients are added up by several programs, and must agree within
rounding.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from cases import Case
from measure import Compiled

from on_gpu import OPS, delta, gated
from on_gpu.compare import with_gradients
from on_gpu.delta import use_tiles

FORMS = {
    "delta": {
        "untied": delta.Shape(heads=8, kv_heads=8, write_query="heads"),
        "tied": delta.Shape(heads=8, kv_heads=8, write_query="query"),
        "linear, three documents": delta.Shape(
            heads=8, kv_heads=8, write="linear", read="linear", write_scale=1 / 128, read_scale=1 / 128, documents=3
        ),
    },
    "gated": {
        f"{rule}, a decay a {decay}": gated.Shape(heads=8, value_heads=8, delta=rule == "delta rule", decay=decay)
        for rule in ("delta rule", "linear attention")
        for decay in ("head", "channel")
    },
}
EXACT = {"delta": ("out", "dvalue"), "gated": None}  # None: all
BOUND = 2.0**-6  # of the others' largest number


def cases(op: str, count: int, tiles: dict) -> list[Case]:
    """Each form `count` times at 2000 tokens, and a quarter as often at 8192."""
    runs = [[2, 2000, count], [1, 8192, -(-count // 4)]]
    settings = lambda form: {"op": op, "form": form, "runs": runs, "tiles": tiles}
    return [Case("repeats", op, form, "on_gpu.repeats:check", settings(form)) for form in FORMS[op]]


def check(worker, op: str, form: str, runs: list, tiles: dict, kernels: str = "triton", sizes=()) -> None:
    """runs: (batch, tokens, how many times) each. `sizes`: as in long.check."""
    use_tiles(tiles)
    module = OPS[op]
    for batch, length, count in runs:
        worker.at(f"T = {length}")
        shape = dataclasses.replace(FORMS[op][form], batch=batch, time=length, **dict(sizes))
        given = module.inputs(shape, np.random.default_rng(0))
        call = with_gradients(module.call(shape, kernels))
        program = Compiled(call, *given).program
        result = jax.eval_shape(call, *given)
        exact = EXACT[op] or tuple(result)
        compare = Compiled(lambda first, again, exact=exact: _compared(first, again, exact), result, result).program
        with worker.alone():
            there = jax.device_put(given)
            first = program(*there)
            compared = jax.device_get([compare(first, program(*there)) for _ in range(count)])
        same, apart = (np.asarray(x) for x in zip(*compared))
        wrong = not same.all() or not apart.max() <= BOUND
        said = f"T = {length}, {count} runs: "
        if wrong:
            said += f"{int((~same).sum())} differ; what need not be the same bits, by {apart.max():.2g}"
        else:
            rest = sorted(set(result) - set(exact))
            near = f", {', '.join(rest)} within {apart.max():.1e}" if rest else ""
            said += f"{', '.join(exact)} the same bits{near}"
        worker.result(said, wrong, T=length, runs=count, differ=int((~same).sum()), apart=float(apart.max()))


def _compared(first: dict, again: dict, exact: tuple[str, ...]):
    """(whether the arrays `exact` are the same, the largest difference of the others over their largest number)."""
    same = [jnp.array_equal(first[name], again[name]) for name in exact]
    wide = lambda x: x.astype(jnp.float32)
    apart = [
        jnp.max(jnp.abs(wide(x) - wide(again[name]))) / jnp.max(jnp.abs(wide(x)))
        for name, x in first.items()
        if name not in exact
    ]
    return jnp.stack(same).all(), jnp.max(jnp.stack([jnp.float32(0), *apart]))
