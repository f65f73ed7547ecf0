"""Part "tiles": single kernels of `delta_attention` with other tiles than the table's, to choose the table by.

A case is a kernel at a shape. Its first tile is the table's. The others are timed beside it in the same process, and
their results are compared with its: a tile changes the order of sums and nothing else. Arrays are drawn on the device.
"""

from __future__ import annotations

import dataclasses
import statistics

import jax
import jax.numpy as jnp
from cases import Case

from on_gpu import delta
from on_gpu.delta import use_tiles
from on_gpu.kernels import captured
from on_gpu.times import LARGE, Timed, flops

SHAPES = {
    "8192 tokens, heads of 128": delta.Shape(**LARGE),
    "2048 tokens, heads of 64": delta.Shape(batch=64, time=2048, heads=16, kv_heads=16, width=64, value_width=64),
    "2048 tokens, heads of 128": delta.Shape(batch=16, time=2048, heads=16, kv_heads=16),
    "8192 tokens, 8 queries a key": delta.Shape(**LARGE | {"kv_heads": 4}),
}
LONG, SHORT, SHORT_WIDE, GROUPED = SHAPES
# (kernel, shape, tiles: rows, columns, warps, stages, halves, group). Those that spill much or do not fit are left out.
CANDIDATES = (
    (
        "write_forward",
        SHORT,
        ((64, 64, 4, 3, 1, 16), (128, 64, 8, 3, 2), (64, 32, 4, 3), (32, 64, 4, 3), (64, 128, 4, 2)),
    ),
    ("write_backward", SHORT, ((32, 128, 8, 2, 2, 16), (64, 128, 8, 2, 2), (64, 64, 4, 2), (32, 64, 4, 2))),
    ("read_forward", SHORT, ((64, 64, 4, 3), (128, 64, 4, 3), (64, 128, 4, 3), (128, 128, 8, 3))),
    ("read_backward", SHORT, ((64, 64, 4, 2), (64, 128, 8, 3))),
    ("write_forward", SHORT_WIDE, ((64, 64, 4, 3), (128, 64, 8, 3, 2, 32))),
    ("write_backward", SHORT_WIDE, ((32, 128, 8, 2, 2), (64, 128, 8, 2, 2, 32))),
    ("write_forward", GROUPED, ((64, 64, 4, 3), (32, 64, 4, 3))),
    ("read_backward", LONG, ((64, 64, 4, 2), (64, 128, 8, 1))),
)
# The arrays [B, T, heads, ·] among a kernel's outputs that are results. The others are scratch, or one of these again.
RESULTS = {"write_forward": (1,), "read_forward": (0,), "write_backward": (0, 1, 2), "read_backward": (0, 1, 2)}
# Two orders of summing numbers that are rounded to bfloat16 afterwards, or whose factors are.
BOUND = 2.0**-6


def cases() -> list[Case]:
    settings = lambda kernel, shape, tiles: {"kernel": kernel, "shape": shape, "tiles": [list(x) for x in tiles]}
    return [Case("tiles", "delta", f"{x[0]}, {x[1]}", "on_gpu.tiles:time_tiles", settings(*x)) for x in CANDIDATES]


def time_tiles(worker, kernel: str, shape: str, tiles: list, rounds: int = 5, sizes=()) -> None:
    """`sizes`: as in long.check."""
    from pallas_kernels.triton import launch as launching

    call = dataclasses.replace(SHAPES[shape], **dict(sizes))
    arrays, dout, draw = arrays_of(call)
    programs, reads = {}, None
    for tile in [None, *tiles]:
        worker.at(f"compiling {tile or 'the tile of the table'}")
        if tile:
            use_tiles({kernel: tile})
        launch, used, inputs = captured(kernel, arrays, dout)
        if reads is None:
            prepare, reads = jax.jit(inputs).lower(arrays, dout).compile(), jax.eval_shape(inputs, arrays, dout)
        alone = lambda *arrays, launch=launch: launching.run(dataclasses.replace(launch, arrays=arrays))
        programs[dataclasses.astuple(used)] = Timed(alone, *reads)
    products = 1 if kernel.endswith("forward") else 2.5
    first = None
    with worker.alone():
        given = prepare(*draw())
        for tile, program in programs.items():
            worker.at(f"tile {tile}")
            program.on_device(given)
            milliseconds = 1e3 * statistics.median(program.seconds() for _ in range(rounds))
            made = program.program(*given)
            made = [made[i] for i in RESULTS[kernel]]
            first = first or made
            apart = float(_apart(made, first))
            rate = products * flops(call, 1, "forward") / milliseconds / 1e9
            said = f"{milliseconds:.2f} ms, {rate:.0f} TFLOP/s, tile {', '.join(map(str, tile))}, apart {apart:.1e}"
            wrong = not apart <= BOUND  # NaN too
            worker.result(said, wrong, **{"ms": milliseconds, "TFLOP/s": rate, "tile": str(tile), "apart": apart})


def arrays_of(call: delta.Shape):
    """(shapes of the call's arrays, shape of dout, a compiled function () -> (arrays, dout) on the device)."""
    sizes = lambda *more: jax.ShapeDtypeStruct((call.batch, call.time, *more), jnp.bfloat16)
    arrays = {
        "query": sizes(call.heads, call.width),
        "key": sizes(call.kv_heads, call.width),
        "value": sizes(call.kv_heads, call.value_width),
        "beta": sizes(call.kv_heads),
    }
    dout = sizes(call.heads, call.value_width)

    def draw():
        normal = lambda i, x: jax.random.normal(jax.random.key(i), x.shape, x.dtype)
        drawn = {name: normal(i, x) for i, (name, x) in enumerate(arrays.items())}
        return drawn | {"beta": jax.nn.sigmoid(drawn["beta"])}, normal(len(arrays), dout)

    return arrays, dout, jax.jit(draw).lower().compile()


@jax.jit
def _apart(found, expected):
    """The largest difference of an array, over its largest number; NaN if there is one."""
    wide = lambda x: x.astype(jnp.float32)
    apart = [jnp.max(jnp.abs(wide(a) - wide(b))) / jnp.max(jnp.abs(wide(b))) for a, b in zip(found, expected)]
    return jnp.max(jnp.stack(apart))
