"""The chunked gated ops against a plain scan over chunks on a CPU: time and memory.

    uv run python benchmarks/gated.py [--rounds 9] [--json FILE]
    taskset -c 0,1 ...                                       on two cores
    JAX_PLATFORMS=cpu uv run --extra cuda --group kernels python benchmarks/gated.py --launches

The last of these compiles the Triton kernels' calls for an H100 instead, without one, and counts what they move
(counted/gated.py).

Takes three minutes on two cores. The yardstick is the gated delta rule with one decay per head: a `lax.scan` over
chunks with W and U from `jax.scipy.linalg.solve_triangular`, products at HIGHEST precision, and automatic
differentiation. For each shape and direction the fastest of its chunk sizes is used.

speed   the yardstick's time divided by the form's, so 2 is twice as fast: the median over rounds in one process
        (measure.py)
memory  the form's temporaries divided by the yardstick's
"""

from __future__ import annotations

import argparse
import os
import statistics

# Both are set before the first import of jax, and only the yardstick needs them. Its backward pass runs two batched
# triangular solves at once, which deadlock in a pool of two threads (jaxlib 0.10.2). OpenBLAS's own threads inside each
# solve make it slower.
os.environ.setdefault("PJRT_NPROC", str(max(4, os.cpu_count())))
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from measure import Compiled, in_rounds, machine, median_ratio, report

from deltaformer_jax import gated_delta_rule, gated_linear_attention

SHAPES = ((1, 4096, 8, 128), (1, 4096, 4, 64))
YARDSTICK_CHUNKS = (16, 32, 64, 128)
HIGHEST = lax.Precision.HIGHEST


def yardstick(query, key, value, beta, log_decay, *, chunk):
    """The gated delta rule [B, T, H, ...], T a multiple of the chunk, by scan, triangular solve and autodiff."""
    batch, time, heads, width = query.shape
    index = jnp.arange(chunk)
    causal, strict = index[:, None] >= index[None, :], index[:, None] > index[None, :]
    einsum = lambda equation, *arrays: jnp.einsum(equation, *arrays, precision=HIGHEST)

    def chunks(x):
        """[B, T, H, ...] -> [T/C, B, H, C, ...]"""
        return jnp.moveaxis(x.reshape(batch, time // chunk, chunk, heads, *x.shape[3:]), (1, 3), (0, 2))

    def step(state, inputs):
        q, k, v, b, g = inputs
        total = jnp.cumsum(g, axis=-1)
        between = total[..., :, None] - total[..., None, :]
        decay = jnp.where(causal, jnp.exp(jnp.where(causal, between, 0)), 0)
        a = jnp.where(strict, einsum("bhik,bhjk->bhij", k, k) * decay * b[..., None], 0)
        right = jnp.concatenate([(b * jnp.exp(total))[..., None] * k, b[..., None] * v], axis=-1)
        solved = jax.scipy.linalg.solve_triangular(a + jnp.eye(chunk), right, lower=True, unit_diagonal=True)
        written = solved[..., width:] - einsum("bhck,bhkv->bhcv", solved[..., :width], state)
        out = einsum("bhck,bhkv->bhcv", q * jnp.exp(total)[..., None], state)
        out = out + einsum("bhij,bhjv->bhiv", einsum("bhik,bhjk->bhij", q, k) * decay, written)
        last = total[..., -1:]
        state = jnp.exp(last)[..., None] * state
        return state + einsum("bhck,bhcv->bhkv", k * jnp.exp(last - total)[..., None], written), out

    state = jnp.zeros((batch, heads, width, value.shape[-1]), query.dtype)
    state, out = lax.scan(step, state, tuple(map(chunks, (query * width**-0.5, key, value, beta, log_decay))))
    return jnp.moveaxis(out, (0, 2), (1, 3)).reshape(value.shape), state


def draw(shape, seed=0):
    """query, key of unit length, value, beta, log_decay with one per head, log_decay with one per channel."""
    rng = np.random.default_rng(seed)
    normal = lambda *sizes: rng.standard_normal(sizes)
    key = normal(*shape)
    softplus = lambda x: np.log1p(np.exp(x))
    arrays = (
        normal(*shape),
        key / np.linalg.norm(key, axis=-1, keepdims=True),
        normal(*shape),
        1 / (1 + np.exp(-normal(*shape[:3]))),
        -softplus(normal(*shape[:3]) - 3),
        -softplus(normal(*shape) - 3),
    )
    return [jnp.asarray(x, jnp.float32) for x in arrays]


def forms(inputs):
    """name -> (function, its arguments)."""
    q, k, v, beta, head, channel = inputs
    delta = lambda q, k, v, b, g=None: gated_delta_rule(q, k, v, beta=b, log_decay=g)
    linear = lambda q, k, v, g=None: gated_linear_attention(q, k, v, log_decay=g)
    named = {
        f"yardstick, chunks of {chunk}": (
            lambda *x, chunk=chunk: yardstick(*x, chunk=chunk),
            (q, k, v, beta, head),
        )
        for chunk in YARDSTICK_CHUNKS
    }
    return named | {
        "gated_delta_rule, a head's decay": (delta, (q, k, v, beta, head)),
        "gated_delta_rule, no decay": (delta, (q, k, v, beta)),
        "gated_delta_rule, a channel's": (delta, (q, k, v, beta, channel)),
        "gated_linear_attention, a head's": (linear, (q, k, v, head)),
        "gated_linear_attention, none": (linear, (q, k, v)),
        "gated_linear_attention, a channel's": (linear, (q, k, v, channel)),
    }


def program(function, arguments, direction) -> Compiled:
    """The compiled form: its outputs and, for "forward+backward", the gradients of all arguments.

    The cotangents are arguments, so that they do not count as temporaries.
    """
    if direction == "forward":
        return Compiled(function, *arguments)

    def run(cotangents, *arguments):
        outputs, pullback = jax.vjp(function, *arguments)
        return outputs, pullback(cotangents)

    cotangents = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), jax.eval_shape(function, *arguments))
    return Compiled(run, cotangents, *arguments)


def table(shape, direction, rounds) -> list[dict]:
    compiled = {name: program(*call, direction) for name, call in forms(draw(shape)).items()}
    times = in_rounds(compiled, rounds)
    median = {name: statistics.median(seconds) for name, seconds in times.items()}
    best = min((name for name in median if name.startswith("yardstick")), key=median.get)
    return [
        {
            "form": name,
            "[B, T, H, K]": str(list(shape)),
            "direction": direction,
            "ms": 1e3 * median[name],
            "speed": 1 / median_ratio(times, name, best),
            "temporaries MB": form.temporary_bytes / 1e6,
            "memory": form.temporary_bytes / compiled[best].temporary_bytes,
            "compiled in s": form.compile_seconds,
        }
        for name, form in compiled.items()
        if name == best or not name.startswith("yardstick")
    ]


def length_rows(rounds) -> list[dict]:
    """Time and temporaries against T, forward and backward, for a batch of 1 with 4 heads of width 64."""
    rows = []
    for length in (4096, 16384, 65536):
        for name, call in forms(draw((1, length, 4, 64))).items():
            if "head's" not in name and "channel's" not in name:
                continue
            form = program(*call, "forward+backward")
            seconds = statistics.median(in_rounds({name: form}, max(2, rounds // 3))[name])
            rows.append(
                {
                    "form": name,
                    "T": length,
                    "ns a token and head": 1e9 * seconds / length / 4,
                    "temporaries MB": form.temporary_bytes / 1e6,
                }
            )
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", help="also write the tables here")
    parser.add_argument("--launches", action="store_true", help="count the launches of an H100 instead")
    flags = parser.parse_args()
    if flags.launches:
        from counted import gated

        return gated.show()
    rows = [
        row
        for shape in SHAPES
        for direction in ("forward", "forward+backward")
        for row in table(shape, direction, flags.rounds)
    ]
    lengths = length_rows(flags.rounds)
    print(machine())
    report("The gated ops, float32, chunks of 64", rows, flags.json, lengths=lengths)
    report("forward+backward against T, [1, T, 4, 64] float32", lengths, None)


if __name__ == "__main__":
    main()
