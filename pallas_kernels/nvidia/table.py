"""Sizes of tiles by kernel, width and architecture: chosen offline, looked up while tracing, not tried at run time."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Tile:
    """One configuration of a kernel.

    rows × columns: the tile of scores. In `write_forward` the rows are the block that is solved, in `write_backward`
    and `read_backward` the columns are the block. halves: a block is solved as one triangular system or as two halves.
    group: heads at work at the same time (order.py).
    """

    rows: int
    columns: int
    warps: int
    stages: int
    halves: int = 1
    group: int = 16


def choose(kernel: str, compute_capability: int, width: int, narrow: bool) -> Tile:
    return Tile(64, 32, 4, 2)
