"""A loop over tiles of arrays in HBM. Each tile is copied to VMEM one step before its use, and copied back after it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu


@dataclasses.dataclass(frozen=True)
class HbmTiles:
    """The tiles `array.at[index(n)]` of an array in HBM, with two buffers in VMEM, `buffer` [2, ...], and `semaphores`
    [2, 2]. `writes`: after `step`, the tile is copied back to HBM."""

    array: jax.Array
    index: Callable
    buffer: jax.Array
    semaphores: jax.Array
    writes: bool = False

    def tile(self, n):
        return self.buffer.at[lax.rem(n, 2)]

    def fetch(self, n):
        return pltpu.make_async_copy(self.array.at[self.index(n)], self.tile(n), self.semaphores.at[0, lax.rem(n, 2)])

    def store(self, n):
        return pltpu.make_async_copy(self.tile(n), self.array.at[self.index(n)], self.semaphores.at[1, lax.rem(n, 2)])


def over_tiles(start, stop, arrays: dict[str, HbmTiles], step: Callable, carry):
    """carry = step(n, {name: tile n}, carry) for n = start … stop − 1. All copies are complete when it returns."""
    writers = [array for array in arrays.values() if array.writes]

    @pl.when(start < stop)
    def _():
        for array in arrays.values():
            array.fetch(start).start()

    def body(n, carry):
        for array in arrays.values():
            array.fetch(n).wait()

        @pl.when(n + 1 < stop)
        def _():
            for array in arrays.values():
                if array.writes:
                    # Tile n + 1 uses the buffer of tile n − 1, so that tile's copy back must be complete.
                    pl.when(n > start)(array.store(n - 1).wait)
                array.fetch(n + 1).start()

        carry = step(n, {name: array.tile(n) for name, array in arrays.items()}, carry)
        for array in writers:
            array.store(n).start()
        return carry

    carry = lax.fori_loop(start, stop, body, carry)
    for array in writers:
        pl.when(stop - start > 1)(array.store(stop - 2).wait)
        pl.when(stop > start)(array.store(stop - 1).wait)
    return carry


def copy(source, target, semaphore):
    """Copies source to target and waits for the copy."""
    transfer = pltpu.make_async_copy(source, target, semaphore)
    transfer.start()
    transfer.wait()
