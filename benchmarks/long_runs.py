"""The cost of checkpoints: how long an asynchronous save blocks training, and whether memory grows with every save.

    uv run python benchmarks/long_runs.py [--parameters 50] [--saves 50] [--json FILE]

Takes about one minute on two cores. First, a state of --parameters million parameters and two moments of each is saved
by training/checkpoints/store.py:

blocks  time until `save` returns, if the save before it is done
whole   time until everything is on disk, checksums included
share   blocks / whole; all three are medians over the rounds

Then a small state is saved --saves times, and a line is fitted to the resident memory of the process after each save.
"""

from __future__ import annotations

import argparse
import gc
import resource
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from measure import report

from deltaformer_jax.training.checkpoints.store import Checkpoints
from deltaformer_jax.training.guard import new_guard
from deltaformer_jax.training.state import TrainState


def make_state(parameters: int) -> TrainState:
    """A state with ten arrays of parameters, and ten of each moment."""
    draw = jax.jit(lambda key: [jax.random.normal(key, (parameters // 10,), jnp.float32) for _ in range(10)])
    params, first, second = (draw(jax.random.key(i)) for i in range(3))
    return TrainState(params, (first, second), jnp.zeros((), jnp.int32), new_guard())


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def blocking_row(parameters: int, rounds: int = 5) -> dict:
    state, blocks, wholes = make_state(parameters), [], []
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(folder, keep=1)
        for step in range(rounds + 1):
            jax.block_until_ready(state)
            start = time.perf_counter()
            checkpoints.save(state, {"step": step})
            returned = time.perf_counter()
            checkpoints.wait()
            if step:  # the first save also sets things up
                blocks.append(returned - start)
                wholes.append(time.perf_counter() - start)
        checkpoints.close()
    return {
        "what": f"a state of {12 * parameters / 1e6:.0f} MB",
        "blocks ms": 1e3 * float(np.median(blocks)),
        "whole ms": 1e3 * float(np.median(wholes)),
        "share": float(np.median(np.array(blocks) / np.array(wholes))),
    }


def memory_row(saves: int) -> dict:
    state, sizes = make_state(1_000_000), []
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(folder, keep=1)
        for step in range(saves + 10):
            checkpoints.save(state, {"step": step})
            checkpoints.wait()
            gc.collect()
            if step >= 10:  # memory pools fill up first
                sizes.append(resident_bytes())
        checkpoints.close()
    slope, _ = np.polyfit(np.arange(len(sizes)), np.array(sizes) / 1e6, 1)
    return {
        "what": f"{saves} saves of 12 MB",
        "first MB": sizes[0] / 1e6,
        "last MB": sizes[-1] / 1e6,
        "MB a save": float(slope),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--parameters", type=float, default=50, help="millions")
    parser.add_argument("--saves", type=int, default=50)
    parser.add_argument("--json", help="also write the table here")
    flags = parser.parse_args()
    rows = [blocking_row(int(flags.parameters * 1e6)), memory_row(flags.saves)]
    report("saving", rows, flags.json)


if __name__ == "__main__":
    main()
