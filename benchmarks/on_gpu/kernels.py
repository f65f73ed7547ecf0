"""Part "kernels": single kernels of `delta_attention`, softmax, batch 2, 32 heads of 128, bfloat16, w = k.

A kernel runs on the arrays that a real forward (and backward) pass gives it. Its time includes setting to 0 the arrays
that must begin at 0. It is compared with a pass of cuDNN's flash attention in the same rounds; the time of a backward
pass is that of forward and backward minus that of forward.
"""

from __future__ import annotations

import dataclasses
import statistics

import jax
import jax.numpy as jnp
import numpy as np
from cases import Case

from on_gpu import delta
from on_gpu.delta import use_tiles
from on_gpu.times import LARGE, Timed, both_directions, flash_arrays, flash_attention, flops, in_turns

KERNELS = ("write_forward", "read_forward", "tied_forward", "write_backward", "read_backward", "tied_backward")


def cases(length: int, rounds: int, tiles: dict) -> list[Case]:
    settings = lambda name: {"kernel": name, "length": length, "rounds": rounds, "tiles": tiles}
    return [Case("kernels", "delta", name, "on_gpu.kernels:time_kernel", settings(name)) for name in KERNELS]


def captured(kernel: str, arrays: dict, dout):
    """(the kernel's Launch, its tile, a function (arrays, dout) -> the arrays that it reads).

    The function runs the passes of the op up to this kernel. The launch's own arrays are not to be used.
    """
    from pallas_kernels.triton import launch as launching
    from pallas_kernels.triton.delta import api
    from pallas_kernels.triton.delta.launches import tile_of

    kappa, tied = api.Kappa("softmax", arrays["key"].shape[3] ** -0.5), kernel.startswith("tied")
    settings = api.Settings(kappa, None if tied else kappa, tied)
    launches = {}

    def run(launch):
        launches[launch.kernel.__name__] = launch
        return launching.run(launch)

    name = kernel.replace("tied", "write")

    def inputs(arrays, dout):
        given = (arrays["query"], None, arrays["key"], arrays["value"], None, arrays["beta"], None)
        _, u, residuals = api.forward(settings, *given, run=run)
        if kernel.endswith("backward"):
            api.backward(settings, residuals, dout, jnp.zeros_like(u), run=run)
        return launches[name].arrays

    jax.eval_shape(inputs, arrays, dout)
    return launches[name], tile_of(settings, name, arrays["key"], arrays["value"]), inputs


def time_kernel(worker, kernel, length, rounds, tiles, yardstick="cudnn", sizes=()) -> None:
    """`sizes`: as in long.check."""
    from pallas_kernels.triton import launch as launching

    use_tiles(tiles)
    form = {"write_query": "query"} if kernel.startswith("tied") else {}
    shape = dataclasses.replace(delta.Shape(**LARGE, **form), time=length, **dict(sizes))
    given = delta.inputs(shape, np.random.default_rng(0))
    arrays, _, cotangents = given
    launch, tile, inputs = captured(kernel, arrays, cotangents["out"])
    prepare = Timed(inputs, arrays, cotangents["out"])
    reads = jax.eval_shape(inputs, arrays, cotangents["out"])
    alone = Timed(lambda *arrays: launching.run(dataclasses.replace(launch, arrays=arrays)), *reads)
    flash = both_directions(flash_attention(yardstick), *flash_arrays(given))
    with worker.alone():
        arrays, _, cotangents = there = jax.device_put(given)
        alone.on_device(prepare.program(arrays, cotangents["out"]))
        flash["forward"].on_device(flash_arrays(there)[:2])
        flash["forward+backward"].on_device(flash_arrays(there))
        times = in_turns(flash | {kernel: alone}, rounds)
    forward, both = times["forward"], times["forward+backward"]
    if kernel.endswith("forward"):
        products, beside = 1, forward
    else:
        products, beside = 2.5, [all - one for all, one in zip(both, forward)]
    ratio = statistics.median(a / b for a, b in zip(times[kernel], beside))
    milliseconds = 1e3 * statistics.median(times[kernel])
    rate = products * flops(shape, 1, "forward") / milliseconds / 1e9
    chosen = ", ".join(map(str, dataclasses.astuple(tile)))
    worker.result(
        f"{milliseconds:.2f} ms, {ratio:.2f} × cuDNN's, {rate:.0f} TFLOP/s, tile {chosen}",
        **{"ms": milliseconds, "× cuDNN": ratio, "TFLOP/s": rate, "tile": chosen},
    )
