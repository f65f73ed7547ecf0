"""Measuring times as ratios.

All candidates run in one process, in rounds. The reported ratio is the median over rounds of a candidate's time divided
by the yardstick's time in the same round. So whatever slows down the machine affects both.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table


class Compiled:
    """A function compiled for its arguments: seconds of compilation, bytes of temporaries, seconds of a call."""

    def __init__(self, function: Callable, *arguments):
        start = time.perf_counter()
        self.program = jax.jit(function).lower(*arguments).compile()
        self.compile_seconds = time.perf_counter() - start
        self.arguments = arguments

    @property
    def temporary_bytes(self) -> int:
        return self.program.memory_analysis().temp_size_in_bytes

    def seconds(self) -> float:
        start = time.perf_counter()
        jax.block_until_ready(self.program(*self.arguments))
        return time.perf_counter() - start


def in_rounds(candidates: dict[str, Compiled], rounds: int) -> dict[str, list[float]]:
    """Seconds of each candidate in each round.

    A candidate runs twice, and the second run is timed. The first run is slowed by the program before it, whose half
    gigabyte of temporaries must leave the caches and be returned to the system.
    """
    times = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, candidate in candidates.items():
            candidate.seconds()
            times[name].append(candidate.seconds())
    return times


def median_ratio(times: dict[str, list[float]], name: str, yardstick: str) -> float:
    return statistics.median(a / b for a, b in zip(times[name], times[yardstick]))


def matrix_product_flops_per_second(size: int = 2048, rounds: int = 7) -> float:
    """The best rate of several float32 products of size × size matrices, as a measure of the machine's arithmetic."""
    rng = np.random.default_rng(0)
    a, b = (jnp.asarray(rng.standard_normal((size, size)), jnp.float32) for _ in range(2))
    product = Compiled(jnp.matmul, a, b)
    return 2 * size**3 / min(product.seconds() for _ in range(rounds))


def machine() -> dict:
    device = jax.devices()[0]
    return {"platform": device.platform, "device": device.device_kind, "jax": jax.__version__}


def report(title: str, rows: list[dict], path: str | None, **more):
    """Print the rows as a table. If `path` is given, also write them and `more` as JSON."""
    table = Table(title=title, title_justify="left")
    names = list(dict.fromkeys(name for row in rows for name in row))
    for name in names:
        table.add_column(name, justify="left" if name == names[0] else "right")
    for row in rows:
        table.add_row(*(_text(row.get(name)) for name in names))
    Console(width=140).print(table)
    if path:
        text = json.dumps({"title": title, "machine": machine(), **more, "rows": rows}, indent=1, ensure_ascii=False)
        Path(path).write_text(text + "\n", encoding="utf-8")


def _text(value) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)
