"""Part "times": whole calls, beside cuDNN's flash attention (delta) or the form "chunked" and fla (gated).

All programs of a case run in one process, in turns. A ratio is the median over rounds of two times in one round.
"""

from __future__ import annotations

import dataclasses
import statistics
import time

import jax
import numpy as np
from cases import Case
from measure import Compiled, median_ratio

from on_gpu import delta, fla, gated, rival
from on_gpu.compare import with_gradients
from on_gpu.delta import use_tiles
from on_gpu.plans import planned
from pallas_kernels.triton.gated.table import PLANS, chosen_plan

DIRECTIONS = ("forward", "forward+backward")
STRETCH = 0.04  # seconds of the calls that are timed together

LARGE = dict(batch=2, heads=32, kv_heads=32)
# Form -> (shape, causal passes of two products each, or None where documents make it less; times to reach on an H100,
# ms forward and ms forward and backward, or None). The length is an option unless the shape is a "short" one.
DELTA = {
    "untied": (delta.Shape(**LARGE, write_query="heads"), 2, (5.0, 20.0)),
    "w = k": (delta.Shape(**LARGE), 2, (5.0, 20.0)),
    "tied": (delta.Shape(**LARGE, write_query="query"), 1, (3.0, 10.5)),
    "w = k, 8 queries a key": (delta.Shape(**LARGE | {"kv_heads": 4}), 1 + 1 / 8, (2.6, 11.0)),
    "w = k, linear": (
        # Keys have length √K: with this scale the delta rule forgets and u stays finite.
        delta.Shape(**LARGE, write="linear", read="linear", write_scale=1 / 128, read_scale=1 / 128),
        2,
        (8.0, 28.0),
    ),
    "untied, eight documents": (delta.Shape(**LARGE, write_query="heads", documents=8), None, (2.5, 8.0)),
    "untied, 4 rows, heads of 64": (
        delta.Shape(batch=4, heads=32, kv_heads=32, width=64, value_width=64, write_query="heads"),
        2,
        (6.5, 25.0),
    ),
    "short, w = k, 64 rows, 16 heads of 64": (
        delta.Shape(batch=64, time=2048, heads=16, kv_heads=16, width=64, value_width=64),
        2,
        None,
    ),
    "chunked, untied": (delta.Shape(**LARGE, write_query="heads"), 2, None),
}
GATED = {
    "delta rule, a decay a head": (gated.Shape(), (1.3, 5.0)),
    "delta rule, a decay a channel": (gated.Shape(decay="channel"), (3.0, 11.0)),
    "linear attention, a decay a head": (gated.Shape(delta=False), None),
    "linear attention, a decay a channel": (gated.Shape(delta=False, decay="channel"), None),
}
GATED_SIZES = dict(batch=4, heads=32, value_heads=32, initial_state=False)


def cases(op: str, length: int, rounds: int, tiles: dict) -> list[Case]:
    settings = lambda form: {"form": form, "length": length, "rounds": rounds, "tiles": tiles}
    function = {"delta": "on_gpu.times:time_delta", "gated": "on_gpu.times:time_gated"}[op]
    return [Case("times", op, form, function, settings(form)) for form in {"delta": DELTA, "gated": GATED}[op]]


class Timed(Compiled):
    """A program that is compiled before it may run. `seconds` is the mean of calls in a row, among which the device
    does not wait for the host."""

    calls = 1

    def on_device(self, arguments) -> None:
        """Use these arguments, which are on the device, and choose how many calls are timed together."""
        self.arguments = arguments
        for _ in range(2):  # the first call also loads the program
            once = self.seconds()
        self.calls = max(1, min(5, round(STRETCH / once)))

    def seconds(self) -> float:
        start = time.perf_counter()
        jax.block_until_ready([self.program(*self.arguments) for _ in range(self.calls)])
        return (time.perf_counter() - start) / self.calls


def in_turns(programs: dict[str, Timed], rounds: int) -> dict[str, list[float]]:
    """Seconds of each program in each round, after a call that warms the caches for it."""
    times = {name: [] for name in programs}
    for _ in range(rounds):
        for name, program in programs.items():
            jax.block_until_ready(program.program(*program.arguments))
            times[name].append(program.seconds())
    return times


def both_directions(call, arrays, segments, cotangents) -> dict[str, Timed]:
    """`call` of an op's module, compiled forward and forward and backward."""
    return {
        "forward": Timed(call, arrays, segments),
        "forward+backward": Timed(with_gradients(call), arrays, segments, cotangents),
    }


def flash_attention(implementation: str):
    """Softmax attention in the place of a call of an op."""

    def call(arrays, segments):
        return {"out": jax.nn.dot_product_attention(**arrays, is_causal=True, implementation=implementation)}

    return call


def flash_arrays(given):
    """The yardstick's arrays, made of the call's: every query head has a key of its own, and nothing is packed. What
    numbers they are makes no difference to its time."""
    arrays, _, cotangents = given
    wide = cotangents["out"]
    return {"query": arrays["query"], "key": wide, "value": wide}, None, {"out": arrays["query"]}


def flops(shape: delta.Shape, passes: float, direction: str) -> float:
    """Floating-point operations of causal passes of two products; a backward pass has five products."""
    one = 2 * shape.time**2 * shape.width * shape.batch * shape.heads
    return one * passes * (1 if direction == "forward" else 3.5)


def time_delta(worker, form, length, rounds, tiles, kernels="triton", yardstick="cudnn", sizes=()) -> None:
    """`sizes`: as in long.check."""
    use_tiles(tiles)
    shape, passes, aims = DELTA[form]
    shape = dataclasses.replace(shape, time=shape.time if form.startswith("short") else length, **dict(sizes))
    given = delta.inputs(shape, np.random.default_rng(0))
    call = delta.call(shape, "chunked" if form.startswith("chunked") else kernels)
    ours = both_directions(call, *given)
    flash = both_directions(flash_attention(yardstick), *flash_arrays(given))
    with worker.alone():
        there = jax.device_put(given)
        for programs, arguments in ((flash, flash_arrays(there)), (ours, there)):
            programs["forward"].on_device(arguments[:2])
            programs["forward+backward"].on_device(arguments)
        times = in_turns({f"cuDNN, {x}": flash[x] for x in DIRECTIONS} | ours, rounds)
    for number, direction in enumerate(DIRECTIONS):
        milliseconds, beside = (1e3 * statistics.median(times[x]) for x in (direction, f"cuDNN, {direction}"))
        ratio = median_ratio(times, direction, f"cuDNN, {direction}")
        rate = passes and flops(shape, passes, direction) / milliseconds / 1e9
        row = {
            "direction": direction,
            "ms": milliseconds,
            "cuDNN ms": beside,
            "× cuDNN": ratio,
            "aim ms": aims[number] if aims and length == 8192 else None,
            "TFLOP/s": rate,
            "temporaries GB": ours[direction].temporary_bytes / 1e9,
        }
        said = f"{direction} {milliseconds:.2f} ms, {ratio:.2f} × cuDNN's {beside:.2f}"
        worker.result(f"{said}, {rate:.0f} TFLOP/s" if rate else said, **row)


def _rival(worker, shape: gated.Shape, given) -> tuple[dict, dict]:
    """(its programs, or none; what its column says without them)."""
    column = "jax-linear-attention ms"
    if reason := rival.lacks(shape):
        return {}, {column: reason}
    worker.at("jax-linear-attention's kernel")
    try:
        return {column.removesuffix(" ms"): both_directions(rival.call(shape), *given)}, {}
    except Exception as error:  # whatever it does, it is no fault of the kernels measured here
        return {}, {column: type(error).__name__}


def time_gated(worker, form, length, rounds, tiles, kernels="triton", sizes=()) -> None:
    """`tiles`: as in use_tiles. `sizes`: as in long.check."""
    use_tiles(tiles)
    shape, aims = GATED[form]
    shape = dataclasses.replace(shape, time=length, **GATED_SIZES | dict(sizes))
    given = gated.inputs(shape, np.random.default_rng(0))
    compiled = {name: both_directions(gated.call(shape, name), *given) for name in (kernels, "chunked")}
    if kernels == "triton":
        for plan in PLANS:
            if plan != chosen_plan(90, shape.width, True):
                with planned(plan):
                    compiled[f"plan {plan}"] = both_directions(gated.call(shape, kernels), *given)
    beside, said_of_rival = _rival(worker, shape, given)
    compiled |= beside
    programs = {
        f"{name}, {direction}": program for name, both in compiled.items() for direction, program in both.items()
    }
    with worker.alone():
        there = jax.device_put(given)
        for name, program in programs.items():
            program.on_device(there if "backward" in name else there[:2])
        times = in_turns(programs, rounds)
        median = {name: 1e3 * statistics.median(seconds) for name, seconds in times.items()}
        for number, direction in enumerate(DIRECTIONS):
            ours, portable = (f"{name}, {direction}" for name in (kernels, "chunked"))
            ratio = median_ratio(times, portable, ours)
            others = {f"{name} ms": median[f"{name}, {direction}"] for name in list(compiled)[2:]}
            said = f"{direction} {median[ours]:.2f} ms; chunked {median[portable]:.2f} ms, {ratio:.1f} times as long"
            worker.result(
                said + "".join(f"; {name.removesuffix(' ms')} {x:.2f} ms" for name, x in others.items()),
                **{
                    "direction": direction,
                    "ms": median[ours],
                    "chunked ms": median[portable],
                    "chunked / ours": ratio,
                    "aim ms": aims[number] if aims and length == 8192 else None,
                    "temporaries GB": programs[ours].temporary_bytes / 1e9,
                    **others,
                    **said_of_rival,
                },
            )
        if fla.missing(shape):
            return
        worker.at("fla's kernel")
        try:
            for direction, milliseconds in fla.milliseconds(shape, given, rounds):
                ratio = median[f"{kernels}, {direction}"] / milliseconds
                said = f"{direction}: fla {milliseconds:.2f} ms, ours {ratio:.2f} × that"
                worker.result(said, **{"direction": direction, "fla ms": milliseconds, "× fla": ratio})
        except Exception as error:  # whatever fla does, it is no fault of the kernels measured here
            worker.result(f"no time of fla's kernel: {type(error).__name__}: {str(error).partition(chr(10))[0]}")
