"""Times of flash-linear-attention's kernels, if torch and fla are installed (`pip install flash-linear-attention`)."""

from __future__ import annotations

import importlib
import importlib.util
import statistics
import time
from collections.abc import Iterator

import numpy as np

# (delta rule or not, decay) -> (module, function).
KERNELS = {
    (True, "head"): ("fla.ops.gated_delta_rule", "chunk_gated_delta_rule"),
    (True, "channel"): ("fla.ops.kda", "chunk_kda"),
    (False, "channel"): ("fla.ops.gla", "chunk_gla"),
}


def missing(shape) -> bool:
    """Whether there is no such kernel, or a package is not installed."""
    installed = all(importlib.util.find_spec(name) for name in ("torch", "fla"))
    return (shape.delta, shape.decay) not in KERNELS or not installed


def milliseconds(shape, given, rounds: int) -> Iterator[tuple[str, float]]:
    """(direction, the median) of fla's kernel for a call of on_gpu/gated.py. Torch runs in this process too.

    Raises what fla raises: on Hopper it refuses some backward passes with Triton 3.4 to 3.7.
    """
    import torch

    module, name = KERNELS[shape.delta, shape.decay]
    kernel = getattr(importlib.import_module(module), name)
    arrays, _, cotangents = given
    there = lambda x: torch.tensor(np.asarray(x, np.float32), device="cuda", dtype=torch.bfloat16)
    arguments = {to: there(arrays[ours]) for to, ours in (("q", "query"), ("k", "key"), ("v", "value"))}
    arguments["g"] = torch.tensor(arrays["log_decay"], device="cuda")
    if shape.delta:
        arguments["beta"] = there(arrays["beta"])
    cotangent = there(cotangents["out"])

    def forward():
        with torch.no_grad():
            return kernel(**arguments)[0]

    leaves = {name: x.clone().requires_grad_() for name, x in arguments.items()}

    def both():
        torch.autograd.grad(kernel(**leaves)[0], list(leaves.values()), cotangent)

    yield "forward", _median(forward, rounds)
    yield "forward+backward", _median(both, rounds)


def _median(call, rounds: int, calls: int = 5) -> float:
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
