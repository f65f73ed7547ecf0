"""Tile sizes by kernel, head dimension and architecture, looked up while tracing. Nothing is tuned at run time.

The tiles were chosen among those that fit the shared memory of a thread block, by the number of registers that the
compiler spills. Those in `_HOPPER` were chosen by time on an H100, at batch 2, 32 heads, 8192 tokens, bfloat16. Other
tiles have not been timed (benchmarks/gpu.py --tile does it).
"""

from __future__ import annotations

import dataclasses

from pallas_kernels.triton.limits import WIDTHS


@dataclasses.dataclass(frozen=True)
class Tile:
    """One configuration of a kernel.

    rows, columns: the size of a tile of scores. A program of a forward kernel has a block of `rows` rows; a program of
    a backward kernel has a block of `columns` columns. warps, stages: Triton's num_warps and num_stages. halves: 1, the
    block's triangular system is inverted as a whole; 2, its two halves are inverted. group: heads that are processed at
    the same time (order.py); 0, as many as `heads_at_once` says.
    """

    rows: int
    columns: int
    warps: int
    stages: int
    halves: int = 1
    group: int = 0


# Bytes of shared memory that one thread block may have, by compute capability.
SHARED_MEMORY = {80: 166_912, 90: 232_448, 100: 232_448, 120: 101_376}


# Compute capability -> (kernel, kind of operands: form.operands) -> the tiles for WIDTHS; None: no tile fits. "tied_"
# kernels are the write kernels with the read in them; only softmax has them.
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
# On compute capability 10.0, products of tiles with 64 rows or more use tensor memory. Three products of wide tiles
# need more of it than there is, and Triton then emits a trap instead of a kernel. So these tiles are smaller.
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
# Measured on an H100 (2026-11-27 and 28, jax 0.11.2, Triton 3.6.0) at width 128, in milliseconds; _LARGE has in
# brackets: write_forward 4.55 (6.78), tied_forward 4.92 (6.86), read_backward 7.74 (9.18), write_backward 13.6 (13.9),
# tied_backward 13.6 (14.6).
_HOPPER = _LARGE | {
    ("write_forward", "narrow"): (Tile(64, 64, 4, 3), Tile(128, 64, 8, 3, 2), Tile(64, 32, 8, 2, 2)),
    ("tied_forward", "narrow"): (Tile(64, 64, 4, 3), Tile(128, 64, 8, 3, 2), Tile(64, 32, 8, 2, 2)),
    ("read_backward", "narrow"): (Tile(64, 128, 8, 2), Tile(64, 128, 8, 2), Tile(16, 64, 8, 2)),
    ("write_backward", "narrow"): (Tile(32, 128, 8, 2, 2), Tile(64, 128, 8, 2, 2), Tile(16, 64, 8, 2)),
    ("tied_backward", "narrow"): (Tile(32, 128, 8, 2, 2), Tile(64, 128, 8, 2, 2), Tile(16, 64, 8, 2, 2)),
}
TABLE = {80: _MEDIUM, 90: _HOPPER, 100: _TENSOR_MEMORY, 120: _SMALL}


def choose(kernel: str, compute_capability: int, width: int, operands: str) -> Tile:
    """The tile of a kernel. `width` is the larger head dimension of keys and values.

    An architecture that is not in the table uses the entry of the next older one, for example 103 that of 100. 86 and
    89 use that of 120, because they have the same shared memory. Raises NotImplementedError if no tile fits, and below
    compute capability 8.0.
    """
    known = [x for x in TABLE if x <= compute_capability]
    if not known:
        raise NotImplementedError(f"Triton kernels need compute capability 8.0 or more, not {compute_capability / 10}")
    # 8.6 and 8.9 have as much shared memory as 12.0.
    entry = 120 if 80 < compute_capability < 90 else max(known)
    tiles = TABLE[entry][kernel, operands]
    tile = next((tile for limit, tile in zip(WIDTHS, tiles) if width <= limit), None)
    if tile is None:
        given = "float32" if operands == "exact" else "two-byte"
        raise NotImplementedError(
            f"no tile of the Triton kernel {kernel} fits head dimension {width} with {given} operands on compute "
            f"capability {compute_capability / 10}"
        )
    return tile


def heads_at_once(time: int, width: int) -> int:
    """How many heads the write processes at the same time: a power of two. `width` is that of a key and a u together.

    The blocks of a head wait for one another. With too few heads, multiprocessors idle while each head's next block
    waits. With too many, their keys and u do not stay in the cache. The rule is 32 heads at 8192 tokens and width 256,
    where 32 and 64 were measured to be the fastest; more for shorter heads, and never fewer.
    """
    fitting = 32 * 8192 * 256 // (time * width)
    return max(32, min(128, 1 << max(fitting, 1).bit_length() - 1))
