"""Sizes of tiles by kernel, width and architecture: chosen offline, looked up while tracing, never tried at run time.

Chosen among tiles that fit the shared memory of a block, by the registers that the compiler spills; not yet by time,
which takes a GPU (benchmarks/gpu.py --tile).
"""

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


# Bytes of shared memory that one block may have, by compute capability.
SHARED_MEMORY = {80: 166_912, 90: 232_448, 100: 232_448, 120: 101_376}

WIDTHS = (64, 128, 256)

# Compute capability -> (kernel, how its products take float32 operands: form.operands) -> the tiles for
# WIDTHS; None: none fits. "tied_" kernels are the write's with the read in them, which softmax alone has.
_LARGE = {
    ("write_forward", "narrow"): (Tile(64, 64, 4, 3), Tile(64, 64, 4, 3), Tile(64, 32, 8, 2, 2)),
    ("tied_forward", "narrow"): (Tile(64, 64, 4, 3), Tile(64, 64, 4, 3), Tile(64, 32, 8, 2, 2)),
    ("read_forward", "narrow"): (Tile(128, 64, 8, 3), Tile(128, 64, 8, 3), Tile(128, 32, 8, 2)),
    ("read_backward", "narrow"): (Tile(64, 128, 8, 2), Tile(32, 128, 8, 2), Tile(16, 64, 8, 2)),
    ("write_backward", "narrow"): (Tile(32, 128, 8, 2, 2), Tile(32, 128, 8, 2, 2), Tile(16, 64, 8, 2)),
    ("tied_backward", "narrow"): (Tile(32, 128, 8, 2, 2), Tile(32, 128, 8, 2, 2), Tile(16, 64, 8, 2, 2)),
    ("write_forward", "pair"): (Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), Tile(32, 32, 8, 2)),
    ("read_forward", "pair"): (Tile(128, 64, 8, 2), Tile(128, 64, 8, 2), Tile(128, 16, 8, 2)),
    ("read_backward", "pair"): (Tile(32, 128, 8, 2), Tile(32, 128, 8, 2), Tile(32, 32, 8, 1)),
    ("write_backward", "pair"): (Tile(32, 128, 8, 2, 2), Tile(32, 128, 8, 2, 2), Tile(16, 32, 8, 2)),
    ("write_forward", "exact"): (Tile(64, 32, 4, 2), Tile(64, 32, 4, 2), Tile(64, 32, 8, 1)),
    ("tied_forward", "exact"): (Tile(64, 32, 4, 2), Tile(64, 32, 4, 2), Tile(64, 32, 8, 1)),
    ("read_forward", "exact"): (Tile(64, 32, 4, 2), Tile(64, 32, 4, 2), Tile(64, 32, 8, 1)),
    ("read_backward", "exact"): (Tile(16, 64, 8, 1), Tile(16, 32, 8, 1), Tile(16, 32, 8, 1)),
    ("write_backward", "exact"): (Tile(16, 64, 8, 1), Tile(16, 64, 8, 1), Tile(16, 32, 8, 1)),
    ("tied_backward", "exact"): (Tile(16, 64, 8, 1), Tile(16, 64, 8, 1), Tile(16, 32, 8, 1)),
}
_MEDIUM = {
    ("write_forward", "narrow"): (Tile(64, 64, 4, 3), Tile(64, 64, 8, 3), Tile(32, 16, 4, 1)),
    ("tied_forward", "narrow"): (Tile(64, 64, 4, 3), Tile(64, 64, 8, 3), Tile(32, 16, 4, 1)),
    ("read_forward", "narrow"): (Tile(128, 64, 8, 3), Tile(128, 64, 8, 3), Tile(64, 32, 4, 2)),
    ("read_backward", "narrow"): (Tile(64, 128, 8, 2), Tile(32, 128, 8, 2), Tile(16, 32, 4, 1)),
    ("write_backward", "narrow"): (Tile(32, 64, 4, 1), Tile(32, 64, 4, 1), Tile(16, 32, 4, 1)),
    ("tied_backward", "narrow"): (Tile(32, 64, 4, 1), Tile(32, 64, 4, 1), Tile(16, 32, 4, 1)),
    ("write_forward", "pair"): (Tile(64, 64, 4, 2), Tile(64, 64, 8, 2), Tile(32, 32, 8, 1)),
    ("read_forward", "pair"): (Tile(128, 64, 8, 2), Tile(64, 64, 4, 2), Tile(64, 32, 8, 2)),
    ("read_backward", "pair"): (Tile(32, 64, 8, 2), Tile(16, 64, 8, 2), Tile(16, 16, 4, 1)),
    ("write_backward", "pair"): (Tile(32, 64, 8, 2), Tile(16, 64, 8, 2), Tile(16, 16, 4, 1)),
    ("write_forward", "exact"): (Tile(32, 32, 4, 1), Tile(32, 32, 4, 1), Tile(32, 16, 4, 1)),
    ("tied_forward", "exact"): (Tile(32, 32, 4, 1), Tile(32, 32, 4, 1), Tile(32, 16, 4, 1)),
    ("read_forward", "exact"): (Tile(64, 32, 4, 1), Tile(32, 32, 4, 1), Tile(16, 16, 4, 1)),
    ("read_backward", "exact"): (Tile(16, 32, 4, 1), Tile(16, 32, 8, 1), Tile(16, 16, 4, 1)),
    ("write_backward", "exact"): (Tile(16, 32, 4, 1), Tile(16, 32, 8, 1), Tile(16, 16, 4, 1)),
    ("tied_backward", "exact"): (Tile(16, 32, 4, 1), Tile(16, 32, 8, 1), Tile(16, 16, 4, 1)),
}
_SMALL = _MEDIUM | {
    ("read_forward", "narrow"): (Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(64, 32, 4, 1)),
    ("read_backward", "narrow"): (Tile(32, 64, 4, 2), Tile(32, 64, 4, 1), Tile(16, 32, 4, 1)),
    ("write_forward", "pair"): (Tile(64, 64, 4, 2), Tile(64, 32, 8, 2), Tile(32, 32, 8, 1)),
    ("read_forward", "pair"): (Tile(128, 64, 8, 2), Tile(64, 32, 4, 2), Tile(64, 32, 8, 1)),
    ("read_backward", "pair"): (Tile(16, 64, 8, 2), Tile(16, 64, 8, 2), Tile(16, 16, 8, 1)),
    ("write_backward", "pair"): (Tile(16, 64, 8, 2), Tile(16, 32, 8, 2), Tile(16, 16, 4, 1)),
    ("read_backward", "exact"): (Tile(16, 32, 4, 1), Tile(16, 16, 4, 1), None),
}
# Tiles of 64 rows or more multiply in tensor memory, of which three products of wide tiles take more than there
# is: Triton then emits a trap instead of a kernel.
_TENSOR_MEMORY = _LARGE | {
    ("read_forward", "pair"): (Tile(128, 64, 8, 2), Tile(128, 64, 8, 2), Tile(32, 32, 8, 2)),
    ("read_backward", "pair"): (Tile(32, 128, 8, 2), Tile(32, 64, 8, 2), Tile(32, 32, 8, 1)),
    ("write_backward", "pair"): (Tile(32, 64, 8, 2), Tile(32, 32, 8, 2), Tile(16, 32, 8, 2)),
    ("write_forward", "exact"): (*_LARGE["write_forward", "exact"][:2], Tile(32, 16, 4, 1)),
    ("tied_forward", "exact"): (*_LARGE["tied_forward", "exact"][:2], Tile(32, 16, 4, 1)),
    ("read_forward", "exact"): (*_LARGE["read_forward", "exact"][:2], Tile(16, 16, 4, 1)),
    ("write_backward", "exact"): (Tile(16, 64, 8, 1), Tile(16, 32, 8, 1), Tile(16, 16, 4, 1)),
    ("tied_backward", "exact"): (Tile(16, 64, 8, 1), Tile(16, 32, 8, 1), Tile(16, 16, 4, 1)),
}
TABLE = {80: _MEDIUM, 90: _LARGE, 100: _TENSOR_MEMORY, 120: _SMALL}


def choose(kernel: str, compute_capability: int, width: int, operands: str) -> Tile:
    """The tile for `width`, the larger of the keys' and the values'. Raises NotImplementedError where none fits.

    An architecture that is not in the table takes the entry of the nearest older one: 86 that of 80, 103 that of 100.
    """
    known = [x for x in TABLE if x <= compute_capability]
    if not known:
        raise NotImplementedError(f"Triton kernels need compute capability 8.0 or more, not {compute_capability / 10}")
    # 8.6 and 8.9 have the shared memory of 12.0.
    entry = 120 if 80 < compute_capability < 90 else max(known)
    tiles = TABLE[entry][kernel, operands]
    tile = next((tile for limit, tile in zip(WIDTHS, tiles) if width <= limit), None)
    if tile is None:
        given = "float32" if operands == "exact" else "two-byte"
        raise NotImplementedError(
            f"no tile of the Triton kernel {kernel} fits width {width} with {given} operands on compute capability "
            f"{compute_capability / 10}"
        )
    return tile
