"""The chunked delta_attention against jax.nn.dot_product_attention on a CPU: time, arithmetic, memory.

    uv run python benchmarks/ops.py [--length 4096] [--rounds 9] [--json FILE]
    uv run python benchmarks/ops.py --windows                windows, and what lasts behind them, alone
    taskset -c 0,1 ...                                       on two cores

Takes three minutes on two cores, --windows one.

ratio           time divided by the yardstick's in the same direction: median over rounds in one process (measure.py)
of the product  closed-form floating-point operations per second, divided by those of a large float32 matrix product
                in the same process

One causal pass of two products takes F = 2 T² K B H floating-point operations. The untied form takes 2 F forward and
7 F forward and backward. The one-pass form takes 1 F and 3.5 F, as flash attention does.
"""

from __future__ import annotations

import argparse
import functools

import jax
import jax.numpy as jnp
import numpy as np
from measure import Compiled, in_rounds, machine, matrix_product_flops_per_second, median_ratio, report

from deltaformer_jax import causal_attention, delta_attention

YARDSTICK = "jax.nn.dot_product_attention"

# Name -> (the function, passes over the keys, which is how many F a forward pass takes).
FORMS = {
    YARDSTICK: (lambda q, k, v, b: jax.nn.dot_product_attention(q, k, v, is_causal=True), 1),
    "delta_attention, w = k": (lambda q, k, v, b: delta_attention(q, k, v, beta=b), 2),
    "delta_attention, w = q (one pass)": (lambda q, k, v, b: delta_attention(q, k, v, beta=b, write_query="query"), 1),
    "delta_attention, w = k, linear": (
        lambda q, k, v, b: delta_attention(q, k, v, beta=b, write_similarity="linear", write_scale=1 / 64),
        2,
    ),
    "causal_attention": (lambda q, k, v, b: causal_attention(q, k, v), 1),
}


def draw(length, heads=4, width=64, batch=1, seed=0):
    rng = np.random.default_rng(seed)
    q, k, v = (jnp.asarray(rng.standard_normal((batch, length, heads, width)), jnp.float32) for _ in range(3))
    return q, k, v, jnp.asarray(1 / (1 + np.exp(-rng.standard_normal((batch, length, heads)))), jnp.float32)


def with_gradient(function):
    """Forward and the gradients of all inputs, for a cotangent of ones."""
    return lambda *inputs: jax.value_and_grad(lambda *x: function(*x).sum(), argnums=(0, 1, 2, 3))(*inputs)


def times_table(length: int, rounds: int, peak: float) -> list[dict]:
    inputs = draw(length)
    batch, _, heads, width = inputs[0].shape
    one_pass = 2 * length**2 * width * batch * heads
    rows = []
    for direction in ("forward", "forward+backward"):
        wrap = (lambda f: f) if direction == "forward" else with_gradient
        compiled = {name: Compiled(wrap(function), *inputs) for name, (function, _) in FORMS.items()}
        times = in_rounds(compiled, rounds)
        for name, (_, passes) in FORMS.items():
            median = float(np.median(times[name]))
            # The yardstick computes the whole T×T square and masks it: twice the causal count.
            flops = one_pass * passes * (1 if direction == "forward" else 3.5) * (2 if name == YARDSTICK else 1)
            rows.append(
                {
                    "form": name,
                    "direction": direction,
                    "ms": 1e3 * median,
                    "ratio": median_ratio(times, name, YARDSTICK),
                    "of the product": flops / median / peak,
                    "temporaries MB": compiled[name].temporary_bytes / 1e6,
                    "compiled in s": compiled[name].compile_seconds,
                }
            )
    return rows


def recurrent_row(length: int, rounds: int) -> dict:
    """Time of the definition (recurrent) divided by that of chunked, forward."""
    *inputs, beta = draw(length)
    call = lambda name: Compiled(lambda *x: delta_attention(*x[:3], beta=x[3], implementation=name), *inputs, beta)
    times = in_rounds({"chunked": call("chunked"), "recurrent": call("recurrent")}, rounds)
    return {
        "form": f"recurrent over chunked, T = {length}",
        "direction": "forward",
        "ms": 1e3 * float(np.median(times["recurrent"])),
        "ratio": median_ratio(times, "recurrent", "chunked"),
    }


def memory_rows() -> list[dict]:
    rows = []
    for length in (4096, 8192, 16384, 32768):
        for name in ("delta_attention, w = k", "delta_attention, w = q (one pass)"):
            shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in draw(length)]
            program = Compiled(with_gradient(FORMS[name][0]), *shapes)
            rows.append(
                {
                    "form": name,
                    "T": length,
                    "temporaries MB": program.temporary_bytes / 1e6,
                    "compiled in s": program.compile_seconds,
                }
            )
    return rows


def window_rows(length: int, rounds: int, window: int = 64, share: float = 0.05) -> list[dict]:
    """Attention to a window, and to a window, four first tokens and a share of tokens that last, over that to all."""
    q, k, v, beta = draw(length)
    keep = jnp.asarray(np.random.default_rng(1).random((1, length)) < share)
    sees = {
        "all": {},
        f"window {window}": dict(window=window),
        f"window {window}, first 4, {share:.0%} last": dict(window=window, initial=4, keep=keep),
    }
    ops = {"causal_attention": lambda q, k, v, b, **see: causal_attention(q, k, v, **see)}
    ops["delta_attention, w = k"] = lambda q, k, v, b, **see: delta_attention(q, k, v, beta=b, **see)
    rows = []
    for name, op in ops.items():
        for direction, wrap in (("forward", lambda f: f), ("forward+backward", with_gradient)):
            calls = {what: functools.partial(op, **see) for what, see in sees.items()}
            compiled = {what: Compiled(wrap(call), q, k, v, beta) for what, call in calls.items()}
            times = in_rounds(compiled, rounds)
            rows += [
                {
                    "form": name,
                    "sees": what,
                    "direction": direction,
                    "ms": 1e3 * float(np.median(times[what])),
                    "ratio": median_ratio(times, what, "all"),
                    "temporaries MB": compiled[what].temporary_bytes / 1e6,
                }
                for what in sees
            ]
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--windows", action="store_true", help="time windows and what lasts behind them, alone")
    parser.add_argument("--json", help="also write the tables here")
    flags = parser.parse_args()
    if flags.windows:
        print(machine())
        report(f"[1, {flags.length}, 4, 64] float32", window_rows(flags.length, flags.rounds), flags.json)
        return
    peak = matrix_product_flops_per_second()
    times = times_table(flags.length, flags.rounds, peak)
    times.append(recurrent_row(flags.length, max(3, flags.rounds // 3)))
    memory = memory_rows()
    more = {"product_flops_per_second": peak, "memory": memory}
    print(f"{machine()}, float32 product {peak / 1e9:.0f} GFLOP/s")
    report(f"[1, {flags.length}, 4, 64] float32", times, flags.json, **more)
    report("forward+backward, [1, T, 4, 64] float32: memory and compilation against T", memory, None)


if __name__ == "__main__":
    main()
