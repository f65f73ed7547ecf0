"""The Triton kernels at lengths that the float64 recurrence cannot reach, beside the form "chunked" on the same device.

A part of benchmarks/gpu.py: `python benchmarks/gpu.py --only long`. For each form, length and direction: values and all
gradients of `delta_attention` by `implementation="triton"` and by "chunked", both from the same bfloat16 arrays. Each
rounds its own sums and products, so they differ by a few roundings of bfloat16, magnified by the inverse of the
triangular system; a wrong tile, a race or an index that overflows differs by as much as the numbers themselves. A case
is its own process with a time limit, so that one that hangs or runs out of memory is reported and the others go on.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time

import numpy as np

LENGTHS = (8192, 32768)
# Name -> (heads, key heads, similarity, write query, documents a row)
FORMS = {
    "w = k": (4, 4, "softmax", "key", 1),
    "tied": (4, 4, "softmax", "query", 1),
    "untied": (4, 4, "softmax", "heads", 1),
    "w = k, 8 queries a key": (8, 1, "softmax", "key", 1),
    "w = k, linear": (4, 4, "linear", "key", 1),
    "w = k, eight documents": (4, 4, "softmax", "key", 8),
    "linear, eight documents": (4, 4, "linear", "key", 8),
}
# The largest difference over the largest number. Rounding alone gives below 0.02 at 400 tokens (benchmarks/gpu.py).
BOUND = 0.05


def compare(form: str, length: int, kernels: str = "triton", width: int = 128) -> dict[str, float]:
    """The largest difference of output and gradients, relative to the largest number of each."""
    import jax
    import jax.numpy as jnp

    from deltaformer_jax import delta_attention

    heads, kv_heads, similarity, write, documents = FORMS[form]
    rng = np.random.default_rng(0)
    normal = lambda heads: jnp.asarray(rng.standard_normal((1, length, heads, width)), jnp.bfloat16)
    arrays = {"query": normal(heads), "key": normal(kv_heads), "value": normal(kv_heads)}
    write_heads = kv_heads if write == "key" else heads
    arrays["beta"] = jnp.asarray(1 / (1 + np.exp(-rng.standard_normal((1, length, write_heads)))), jnp.bfloat16)
    if write == "heads":
        arrays["write_query"] = normal(heads)
    segments = None if documents == 1 else jnp.asarray(np.sort(rng.integers(1, documents + 1, (1, length))), jnp.int32)
    cotangent = normal(heads)
    settings = dict(write_similarity=similarity, read_similarity=similarity, segment_ids=segments)
    if similarity == "linear":
        settings |= dict(write_scale=1 / width, read_scale=1 / width)  # keys of length √width: u stays finite
    if write != "heads":
        settings["write_query"] = write

    def results(implementation):
        run = lambda arrays: delta_attention(**arrays, **settings, implementation=implementation)
        call = jax.jit(lambda arrays: (lambda out, pull: (out, pull(cotangent)[0]))(*jax.vjp(run, arrays)))
        out, gradients = jax.device_get(call(arrays))
        return {"out": out, **gradients}

    expected, found = results("chunked"), results(kernels)
    difference = lambda a, b: float(np.max(np.abs(a - b)) / np.max(np.abs(a)))
    wide = lambda x: np.asarray(x, np.float32)
    return {name: difference(wide(expected[name]), wide(found[name])) for name in expected}


def check_long(limit: float = 120.0) -> list[dict]:
    """A row for each case: the largest relative difference, or what happened instead."""
    # The calling process may hold most of the device's memory already.
    environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    rows = []
    for length in LENGTHS:
        for form in FORMS:
            start = time.perf_counter()
            command = [sys.executable, __file__, "--form", form, "--length", str(length)]
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=limit, env=environment)
                lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
                said = lines[-1] if lines else f"exit code {done.returncode}"
            except subprocess.TimeoutExpired:
                said = f"no result within {limit:.0f} s"
            rows.append({"form": form, "T": length, "result": said, "s": time.perf_counter() - start})
            print(rows[-1], flush=True)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--form", choices=FORMS, required=True)
    parser.add_argument("--length", type=int, required=True)
    parser.add_argument("--kernels", default="triton", help="what is compared with chunked (default: triton)")
    options = parser.parse_args()
    differences = compare(options.form, options.length, options.kernels)
    worst = max(differences, key=differences.get)
    # Not `> BOUND`, so that NaN fails too.
    if not all(difference <= BOUND for difference in differences.values()):
        sys.exit(f"{worst} is off by {differences[worst]:.2g}, more than {BOUND}: {differences}")
    print(f"agrees, {worst} to {differences[worst]:.2g}")


if __name__ == "__main__":
    main()
