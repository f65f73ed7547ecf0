"""Times as ratios: every candidate runs once a round, in one process, and what is reported is the median over rounds of
its time over the yardstick's in the same round. What slows the machine down then slows both."""

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
    """A function compiled for its arguments: seconds it took, bytes of temporaries, and a call that waits."""

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
    """Seconds of each candidate in each round. It runs twice and the second counts: the first pays for what ran before
    it, whose half gigabyte of temporaries must leave the caches and go back to the system."""
    times = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, candidate in candidates.items():
            candidate.seconds()
            times[name].append(candidate.seconds())
    return times


def median_ratio(times: dict[str, list[float]], name: str, yardstick: str) -> float:
    return statistics.median(a / b for a, b in zip(times[name], times[yardstick]))


def matrix_product_flops_per_second(size: int = 2048, rounds: int = 7) -> float:
    """The best of several float32 products of size × size matrices: what this machine's arithmetic can do."""
    rng = np.random.default_rng(0)
    a, b = (jnp.asarray(rng.standard_normal((size, size)), jnp.float32) for _ in range(2))
    product = Compiled(jnp.matmul, a, b)
    return 2 * size**3 / min(product.seconds() for _ in range(rounds))


def machine() -> dict:
    device = jax.devices()[0]
    return {"platform": device.platform, "device": device.device_kind, "jax": jax.__version__}


def report(title: str, rows: list[dict], path: str | None, **more):
    """Print the rows as a table and, with a path, write them and `more` as JSON."""
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
