"""Checks and times the Triton kernels on an NVIDIA GPU. One command, a few minutes:

    uv run --extra cuda --group kernels python benchmarks/gpu.py --json gpu.json

1. shapes: values and all gradients at random shapes, in float32 and bfloat16, against the definition (`recurrent` in
   float64 on the CPU).
2. long: 8192 and 32768 tokens beside "chunked" on the device, values and gradients, seven forms (gpu_long.py). Each
   case is a process with a time limit: one that hangs or does not fit is reported, and the others go on.
3. repeats: one shape a thousand times. Results without additions in arbitrary order must be the same bit for bit, the
   others within rounding. This would show a race between thread blocks.
4. times: medians at batch 2, 32 heads, 8192 tokens, width 128, bfloat16, beside cuDNN's flash attention in the same
   process. One causal pass of two products takes F = 2 T² K B H floating-point operations. Flash attention and the tied
   form take 1 F forward and 3.5 F forward and backward. The untied form takes twice that, and w = k with r query heads
   per key head 1 + 1/r times that.

The gated ops are checked and timed in the same way, by gpu_gated.py, beside fla's kernels.

--op delta|gated            only one of the two families
--only shapes|long|repeats|times
                            only one of the four parts
--tile KERNEL=SIZES         another tile of delta_attention, for example write_forward=128,64,8,3,2,16: rows, columns,
                            warps, stages, halves, group (pallas_kernels/triton/delta/table.py)

A disagreement of shapes or repeats ends the program with exit code 1 and without a table.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time

# Leaves GPU memory for fla's kernels, which torch runs in this process.
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.6")

import gpu_gated
import gpu_long
import jax
import jax.numpy as jnp
import numpy as np
from measure import report

from deltaformer_jax import delta_attention
from pallas_kernels.triton.delta import api as delta
from pallas_kernels.triton.delta.table import Tile

NAMES = ("query", "write_query", "key", "value", "alpha", "beta")

# The times to reach, in milliseconds on an H100.
AIMS = {
    ("untied", "forward"): 5.5,
    ("tied", "forward"): 3.3,
    ("w = k, 8 queries a key", "forward"): 2.8,
    ("untied", "forward+backward"): 22.0,
    ("tied", "forward+backward"): 11.0,
}


def draw(rng):
    """The settings and shapes of one random call."""
    kv_heads = int(rng.integers(1, 3))
    heads = kv_heads * int(rng.integers(1, 4))
    write = str(rng.choice(["softmax", "softmax", "linear", "relu", "exp"]))
    width, value_width = (int(x) for x in rng.choice([16, 24, 32, 64, 80, 128], 2))
    return dict(
        batch=int(rng.integers(1, 3)),
        time=int(rng.integers(1, 400)),
        heads=heads,
        kv_heads=kv_heads,
        width=width,
        value_width=value_width,
        write=write,
        read=str(rng.choice(["softmax", "softmax", write, "linear"])),
        write_query=str(rng.choice(["key", "query", "heads"])),
        alpha=bool(rng.integers(2)),
        beta=bool(rng.integers(2)) or write != "softmax",
        segments=bool(rng.integers(2)),
    )


def inputs_of(shape, rng, dtype):
    b, t, h, g, k, v = (shape[x] for x in ("batch", "time", "heads", "kv_heads", "width", "value_width"))
    write_heads = g if shape["write_query"] == "key" else h
    normal = lambda *sizes: np.asarray(jnp.asarray(rng.standard_normal(sizes), dtype))
    arrays = {"query": normal(b, t, h, k), "key": normal(b, t, g, k), "value": normal(b, t, g, v)}
    if shape["write_query"] == "heads":
        arrays["write_query"] = normal(b, t, h, k)
    if shape["alpha"]:
        arrays["alpha"] = normal(b, t, write_heads)
    if shape["beta"]:
        gates = 1 / (1 + np.exp(-rng.standard_normal((b, t, write_heads))))
        arrays["beta"] = np.asarray(jnp.asarray(gates, dtype))
    segments = np.sort(rng.integers(1, 4, (b, t)), axis=1).astype(np.int32) if shape["segments"] else None
    return arrays, segments, normal(b, t, h, v)


def scales(shape):
    # For similarities other than softmax the scores are kept small enough that u does not grow over 400 tokens.
    return shape["width"] ** -0.5 * (1 if shape["write"] == "softmax" else 0.05), shape["width"] ** -0.5


def expected(shape, arrays, segments, dout):
    write_scale, read_scale = scales(shape)
    tied_scale = read_scale if shape["read"] == "softmax" else write_scale
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        wide = {name: jnp.asarray(x, jnp.float64) for name, x in arrays.items()}

        @jax.jit
        def both(wide, dout):
            def call(x):
                named = {} if "write_query" in x else {"write_query": shape["write_query"]}
                return delta_attention(
                    **x,
                    **named,
                    write_similarity=shape["write"],
                    read_similarity=shape["read"],
                    write_scale=write_scale,
                    read_scale=tied_scale,
                    segment_ids=segments,
                    implementation="recurrent",
                )

            out, pull = jax.vjp(call, wide)
            return out, pull(dout)[0]

        out, gradients = both(wide, jnp.asarray(dout, jnp.float64))
        return np.asarray(out), {name: np.asarray(x) for name, x in gradients.items()}


def settings_of(shape, tiles):
    write_scale, read_scale = scales(shape)
    read_scale = read_scale if shape["read"] == "softmax" else write_scale
    tied = shape["write_query"] == "query" and shape["write"] == shape["read"] == "softmax"
    read = None if tied else delta.Kappa(shape["read"], read_scale)
    return delta.Settings(delta.Kappa(shape["write"], write_scale), read, tied, tiles=tiles)


def forward_and_backward(settings):
    """A jitted function (arrays in the order of NAMES, segments, dout) -> (out, u, gradients)."""

    @jax.jit
    def call(arrays, segments, dout):
        out, u, residuals = delta.forward(settings, *arrays, segments)
        return out, u, delta.backward(settings, residuals, dout, jnp.zeros_like(u))

    return call


def by_kernels(shape, arrays, segments, dout, tiles):
    settings = settings_of(shape, tiles)
    given = dict(arrays)
    if shape["write_query"] == "query" and not settings.tied:
        given["write_query"] = arrays["query"]
    out, _, gradients = forward_and_backward(settings)([given.get(name) for name in NAMES], segments, dout)
    found = {name: np.asarray(x, np.float64) for name, x in zip(NAMES, gradients) if x is not None}
    if "write_query" in found and "write_query" not in arrays:
        found["query"] = found["query"] + found.pop("write_query")
    return np.asarray(out, np.float64), found


def check_shapes(count, tiles):
    """The largest error for each dtype, relative to the largest number of the array."""
    rng = np.random.default_rng(0)
    # The rounding unit times its growth over a few hundred rows of a softmax with sigmoid gates. For bfloat16 arrays,
    # other similarities split the operands of products, so that only inputs and results are rounded.
    bounds = {"float32": 2e-4, "bfloat16": 0.15}
    worst = dict.fromkeys(bounds, 0.0)
    for number in range(count):
        shape = draw(rng)
        parted = "softmax" not in (shape["write"], shape["read"])
        for dtype in bounds:
            bound = 0.03 if dtype == "bfloat16" and parted else bounds[dtype]
            arrays, segments, dout = inputs_of(shape, np.random.default_rng(number), dtype)
            out, gradients = expected(shape, arrays, segments, dout)
            found, found_gradients = by_kernels(shape, arrays, segments, dout, tiles)
            pairs = {"out": (found, out)} | {name: (found_gradients[name], x) for name, x in gradients.items()}
            for name, (a, b) in pairs.items():
                error = float(np.max(np.abs(a - b)) / max(np.max(np.abs(b)), 1e-3))
                # Not `error > bound`, so that NaN fails too.
                if not error <= bound:
                    sys.exit(f"{name} of {shape} in {dtype} is off by {error:.2g}, more than {bound}")
                worst[dtype] = max(worst[dtype], error)
    print(f"{count} random shapes agree with the recurrence; largest relative errors {worst}")
    return {"shapes": count, "largest relative error": worst}


def check_repeats(count, tiles):
    """Runs one shape repeatedly, forward and backward, and compares the results."""
    results = {}
    for form, similarity in (("heads", "softmax"), ("query", "softmax"), ("key", "linear")):
        shape = dict(
            batch=2,
            time=2000,
            heads=8,
            kv_heads=8,
            width=128,
            value_width=128,
            write=similarity,
            read=similarity,
            write_query=form,
            alpha=False,
            beta=True,
            segments=form == "key",
        )
        arrays, segments, dout = inputs_of(shape, np.random.default_rng(0), "bfloat16")
        call = forward_and_backward(settings_of(shape, tiles))
        arguments = jax.device_put(([arrays.get(name) for name in NAMES], segments, dout))
        first = call(*arguments)
        exact, near = (first[0], first[1], first[2][3]), (first[2][0], first[2][2])

        @jax.jit
        def compare(result, exact=exact, near=near):
            out, u, gradients = result
            same = [jnp.array_equal(a, b) for a, b in zip(exact, (out, u, gradients[3]))]
            apart = [
                jnp.max(jnp.abs(a.astype(jnp.float32) - b.astype(jnp.float32)))
                / jnp.max(jnp.abs(a)).astype(jnp.float32)
                for a, b in zip(near, (gradients[0], gradients[2]))
            ]
            return jnp.stack(same).all(), jnp.max(jnp.stack(apart))

        checks = [compare(call(*arguments)) for _ in range(count)]
        same, apart = (np.asarray(x) for x in zip(*jax.device_get(checks)))
        if not same.all() or not apart.max() <= 2.0**-6:
            differ = f"{int((~same).sum())} of {count} runs differ; dq, dk by {apart.max():.2g}"
            sys.exit(f"{similarity}, write_query={form}: {differ}")
        results[f"{similarity}, {form}"] = {"runs": count, "dq and dk apart by": float(apart.max())}
        print(
            f"{similarity}, write_query={form}: {count} runs; out, u and dv are the same bit for bit, dq and dk within "
            f"{apart.max():.2g}"
        )
    return results


def device_milliseconds(call, arguments, rounds=15, calls=5):
    """The median over rounds of the mean time in a row of calls, in which the device never waits for the host."""
    jax.block_until_ready([call(*arguments) for _ in range(2)])
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        jax.block_until_ready([call(*arguments) for _ in range(calls)])
        times.append((time.perf_counter() - start) / calls * 1e3)
    return statistics.median(times)


def time_table(length, tiles):
    batch, heads, width = 2, 32, 128
    one_pass = 2 * length**2 * width * batch * heads
    rng = np.random.default_rng(0)
    normal = lambda h: jnp.asarray(rng.standard_normal((batch, length, h, width)), jnp.bfloat16)
    gate = lambda h: jnp.asarray(1 / (1 + np.exp(-rng.standard_normal((batch, length, h)))), jnp.bfloat16)
    q, w, k, v, dout = (normal(heads) for _ in range(5))
    few_k, few_v = normal(heads // 8), normal(heads // 8)
    kappa, linear = delta.Kappa("softmax", width**-0.5), delta.Kappa("linear", 1 / width)
    separate, tied = delta.Settings(kappa, kappa, tiles=tiles), delta.Settings(kappa, None, True, tiles=tiles)
    forms = {
        "untied": (separate, (q, w, k, v, None, gate(heads), None), 2),
        "tied": (tied, (q, None, k, v, None, gate(heads), None), 1),
        # Keys have length √width: with this scale the delta rule forgets and u stays finite.
        "linear, w = k": (delta.Settings(linear, linear, tiles=tiles), (q, None, k, v, None, gate(heads), None), 2),
        "w = k, 8 queries a key": (separate, (q, None, few_k, few_v, None, gate(heads // 8), None), 1 + 1 / 8),
    }

    def flash(q, k, v):
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")

    def flash_both(q, k, v, dout):
        out, pull = jax.vjp(flash, q, k, v)
        return out, pull(dout)

    yardstick = {
        "forward": device_milliseconds(jax.jit(flash), (q, k, v)),
        "forward+backward": device_milliseconds(jax.jit(flash_both), (q, k, v, dout)),
    }
    rows = []

    def add(form, direction, passes, milliseconds):
        flops = passes * (1 if direction == "forward" else 3.5) * one_pass
        rows.append(
            {
                "form": form,
                "direction": direction,
                "ms": milliseconds,
                "aim ms": AIMS.get((form, direction)) if length == 8192 else None,
                "of cuDNN's": milliseconds / yardstick[direction],
                "TFLOP/s": flops / milliseconds / 1e9,
            }
        )

    for direction, milliseconds in yardstick.items():
        add("cuDNN flash attention", direction, 1, milliseconds)
    for form, (settings, arguments, passes) in forms.items():
        forward = jax.jit(lambda *arrays, settings=settings: delta.forward(settings, *arrays)[0])
        add(form, "forward", passes, device_milliseconds(forward, arguments))
        both = forward_and_backward(settings)
        arguments = (list(arguments[:6]), None, dout)
        add(form, "forward+backward", passes, device_milliseconds(both, arguments))
    return rows


def parse_tile(text):
    name, sizes = text.split("=")
    return name, Tile(*map(int, sizes.split(",")))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["shapes", "long", "repeats", "times"])
    parser.add_argument("--op", choices=["delta", "gated"])
    parser.add_argument("--shapes", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=1000)
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--tile", type=parse_tile, action="append", default=[])
    parser.add_argument("--json")
    options = parser.parse_args()
    if jax.default_backend() != "gpu":
        sys.exit("no NVIDIA GPU found: this program needs one")
    tiles = tuple(options.tile)
    more = {"tiles": [str(x) for x in tiles]}
    wanted = lambda op, name: options.op in (None, op) and options.only in (None, name)
    if wanted("delta", "shapes"):
        more["correct"] = check_shapes(options.shapes, tiles)
    if wanted("gated", "shapes"):
        more["gated correct"] = gpu_gated.check_shapes(options.shapes)
    if wanted("delta", "long"):
        more["long"] = gpu_long.check_long()
    if wanted("delta", "repeats"):
        more["repeats"] = check_repeats(options.repeats, tiles)
    if wanted("gated", "repeats"):
        more["gated repeats"] = gpu_gated.check_repeats(options.repeats)
    if wanted("gated", "times"):
        more["gated"] = gpu_gated.time_table(options.length, device_milliseconds)
        report("gated ops, bfloat16, batch 4, 32 heads, width 128", more["gated"], None)
    rows = time_table(options.length, tiles) if wanted("delta", "times") else []
    report("delta_attention by Triton kernels, bfloat16, batch 2, 32 heads, width 128", rows, options.json, **more)


if __name__ == "__main__":
    main()
