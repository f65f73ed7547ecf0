"""The gated ops' part of benchmarks/gpu.py: the Triton kernels of gated_delta_rule and gated_linear_attention.

Compares values and all gradients with the recurrence at random shapes. Checks that a thousand runs give the same bits.
Measures times at batch 4, 32 heads, 8192 tokens, width 128, bfloat16, with one decay per head and one per channel. If
torch and flash-linear-attention are installed (`pip install flash-linear-attention`), fla's `chunk_gated_delta_rule`,
`chunk_kda` and `chunk_gla` are timed in the same process.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import itertools
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from deltaformer_jax import gated_delta_rule, gated_linear_attention


def _draw(rng):
    heads = int(rng.integers(1, 3))
    width, value_width = (int(x) for x in rng.choice([16, 24, 32, 64, 80, 128, 256], 2))
    return dict(
        batch=int(rng.integers(1, 3)),
        time=int(rng.integers(2, 400)),
        heads=heads,
        value_heads=heads * int(rng.integers(1, 4)),
        width=width,
        value_width=value_width,
        delta=bool(rng.integers(3)),
        decay=str(rng.choice(["none", "head", "channel"])),
        strength=float(rng.choice([1, 1000])),
        segments=bool(rng.integers(2)),
    )


def _inputs(shape, rng, dtype):
    """The arguments by name, segment ids or None, and the cotangents of the output and the final state."""
    b, t, h, hv, k, v = (shape[x] for x in ("batch", "time", "heads", "value_heads", "width", "value_width"))
    cast = lambda x: np.asarray(jnp.asarray(x, dtype))
    normal = lambda *sizes: rng.standard_normal((b, t, *sizes))
    key = normal(h, k)
    arrays = dict(
        query=cast(normal(h, k)),
        key=cast(key / np.linalg.norm(key, axis=-1, keepdims=True)),
        value=cast(normal(hv, v)),
        initial_state=rng.standard_normal((b, hv, k, v)).astype(np.float32),
    )
    if shape["delta"]:
        arrays["beta"] = cast(1 / (1 + np.exp(-normal(hv))))
    if shape["decay"] != "none":
        gates = normal(hv) if shape["decay"] == "head" else normal(hv, k)
        arrays["log_decay"] = (-shape["strength"] * np.exp(2 * gates - 2)).astype(np.float32)
    ids = np.sort(rng.integers(0, 4, (b, t)), axis=1).astype(np.int32) if shape["segments"] else None
    return arrays, ids, (cast(normal(hv, v)), rng.standard_normal((b, hv, k, v)).astype(np.float32))


@functools.cache
def _both(delta, implementation):
    op = gated_delta_rule if delta else gated_linear_attention

    @jax.jit
    def call(arrays, ids, cotangents):
        out, pull = jax.vjp(lambda x: op(**x, segment_ids=ids, implementation=implementation), arrays)
        return out, pull(tuple(x.astype(y.dtype) for x, y in zip(cotangents, out)))[0]

    return call


def check_shapes(count):
    """The largest error for each dtype, relative to the largest number of the array."""
    rng = np.random.default_rng(0)
    # The rounding unit times its growth over a few hundred tokens.
    bounds = {"float32": 2e-4, "bfloat16": 0.1}
    worst = dict.fromkeys(bounds, 0.0)
    for number in range(count):
        shape = _draw(rng)
        for dtype in bounds:
            given = _inputs(shape, np.random.default_rng(number), dtype)
            with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
                arrays, ids, cotangents = given
                wide = {name: jnp.asarray(x, jnp.float64) for name, x in arrays.items()}
                expected = _both(shape["delta"], "recurrent")(wide, ids, cotangents)
            found = _both(shape["delta"], "triton")(*given)
            for (path, a), b in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(expected)):
                a, b = np.asarray(a, np.float64), np.asarray(b)
                error = float(np.max(np.abs(a - b)) / max(np.max(np.abs(b)), 1e-3))
                # Not `error > bound`, so that NaN fails too.
                if not error <= bounds[dtype]:
                    where = jax.tree_util.keystr(path)
                    sys.exit(f"gated op: {where} of {shape} in {dtype} is off by {error:.2g}, over {bounds[dtype]}")
                worst[dtype] = max(worst[dtype], error)
    print(f"gated ops: {count} random shapes agree with the recurrence; largest relative errors {worst}")
    return {"shapes": count, "largest relative error": worst}


def check_repeats(count):
    """Every run must give the same bits, since nothing is added in an arbitrary order."""
    for delta, decay in itertools.product((True, False), ("head", "channel")):
        shape = dict(
            batch=2,
            time=2048,
            heads=8,
            value_heads=8,
            width=128,
            value_width=128,
            delta=delta,
            decay=decay,
            strength=1.0,
            segments=False,
        )
        given = jax.device_put(_inputs(shape, np.random.default_rng(0), "bfloat16"))
        call = _both(delta, "triton")
        first = call(*given)

        @jax.jit
        def same(result, first=first):
            return jnp.stack([jnp.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (first, result)))]).all()

        agree = np.asarray(jax.device_get([same(call(*given)) for _ in range(count)]))
        if not agree.all():
            sys.exit(f"gated op, delta={delta}, decay={decay}: {int((~agree).sum())} of {count} runs differ")
    print(f"gated ops: {count} runs are the same bit for bit, also in gradients")
    return {"runs": count}


def _torch_milliseconds(call, rounds=15, calls=5):
    import torch

    for _ in range(3):
        call()
    times = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) / calls * 1e3)
    return statistics.median(times)


# fla's kernels: (delta rule or not, one decay per head or per channel) -> (module, function).
FLA = {
    (True, "head"): ("fla.ops.gated_delta_rule", "chunk_gated_delta_rule"),
    (True, "channel"): ("fla.ops.kda", "chunk_kda"),
    (False, "channel"): ("fla.ops.gla", "chunk_gla"),
}


def _fla(delta, decay, arrays, dout):
    """{direction: milliseconds of fla's kernel}; {} if there is no such kernel or fla is not installed."""
    if (delta, decay) not in FLA or not all(importlib.util.find_spec(name) for name in ("torch", "fla")):
        return {}
    import torch

    module, name = FLA[delta, decay]
    kernel = getattr(importlib.import_module(module), name)
    there = lambda x: torch.tensor(np.asarray(x, np.float32), device="cuda", dtype=torch.bfloat16)
    given = {to: there(arrays[ours]) for to, ours in (("q", "query"), ("k", "key"), ("v", "value"))}
    given["g"] = torch.tensor(arrays["log_decay"], device="cuda")
    if delta:
        given["beta"] = there(arrays["beta"])
    cotangent = there(dout)

    def forward():
        with torch.no_grad():
            return kernel(**given)[0]

    leaves = {name: x.clone().requires_grad_() for name, x in given.items()}

    def both():
        torch.autograd.grad(kernel(**leaves)[0], list(leaves.values()), cotangent)

    return {"forward": _torch_milliseconds(forward), "forward+backward": _torch_milliseconds(both)}


def time_table(length, device_milliseconds):
    """The rows of the table of times. `device_milliseconds(call, arguments)` measures a call."""
    if not all(importlib.util.find_spec(name) for name in ("torch", "fla")):
        print("gated ops: torch or fla is not installed, so the times of fla's kernels are missing")
    rows = []
    for op, decay in itertools.product((gated_delta_rule, gated_linear_attention), ("head", "channel")):
        delta = op is gated_delta_rule
        shape = dict(
            batch=4,
            time=length,
            heads=32,
            value_heads=32,
            width=128,
            value_width=128,
            delta=delta,
            decay=decay,
            strength=1.0,
            segments=False,
        )
        arrays, _, (dout, _) = _inputs(shape, np.random.default_rng(0), "bfloat16")
        del arrays["initial_state"]
        fla = _fla(delta, decay, arrays, dout)
        given, there = jax.device_put((arrays, dout))
        for implementation in ("triton", "chunked"):
            call = lambda x, op=op, implementation=implementation: op(**x, implementation=implementation)[0]

            def both(x, dout, call=call):
                out, pull = jax.vjp(call, x)
                return out, pull(dout)

            for direction, function, more in (("forward", call, ()), ("forward+backward", both, (there,))):
                milliseconds = device_milliseconds(jax.jit(function), (given, *more))
                beside = fla.get(direction)
                rows.append(
                    {
                        "op": op.__name__,
                        "decay": decay,
                        "implementation": implementation,
                        "direction": direction,
                        "ms": milliseconds,
                        "fla ms": beside,
                        "of fla's": milliseconds / beside if beside else None,
                    }
                )
    return rows
