"""Tile sizes of the gated kernels by head dimension and architecture, looked up while tracing.

The tiles were chosen among those that fit the shared memory of a thread block, by the number of registers that the
compiler spills; not yet by time.
"""

from __future__ import annotations

import dataclasses

from pallas_kernels.triton.limits import WIDTHS


@dataclasses.dataclass(frozen=True)
class GatedTile:
    """columns: how many channels of V a kernel processes at a time; for the channel pair kernels, channels of K. warps,
    stages: Triton's num_warps and num_stages."""

    columns: int
    warps: int
    stages: int


# The kernels without decay, or with one decay per head.
KERNELS = (
    "gated_solve",
    "gated_advance",
    "gated_read",
    "gated_read_values",
    "gated_retreat",
    "gated_read_gradients",
    "gated_solve_gradients",
)
# The kernels with a decay per channel.
CHANNEL_KERNELS = (
    "gated_channel_pairs",
    "gated_channel_solve",
    "gated_advance",
    "gated_channel_read",
    "gated_channel_read_values",
    "gated_retreat",
    "gated_channel_read_gradients",
    "gated_channel_solve_gradients",
    "gated_channel_pair_gradients",
)
# The kernels of walk/: no decay, or one per head.
WALK_KERNELS = ("gated_invert", "gated_walk", "gated_walk_states", "gated_walk_back", "gated_walk_gradients")

# What computes a call. "stages": heads/launches.py, channels/launches.py. "walk", for two-byte operands and head
# dimensions up to 128: walk/launches.py; with a decay per channel the forward pass of channels/walk.py, and else
# "stages".
PLANS = ("stages", "walk")
# (compute capability, whether operands have two bytes) -> the plan for WIDTHS; "stages" for what is not listed. No walk
# ran on a device yet: `benchmarks/gpu.py --only times --op gated` prints both.
CHOSEN_PLANS = {(90, True): ("stages", "stages", "stages")}

# (compute capability, whether operands have two bytes) -> tokens of a chunk, for WIDTHS.
CHUNKS = {
    (80, True): (64, 64, 64),
    (80, False): (32, 16, 16),
    (90, True): (64, 64, 64),
    (90, False): (64, 64, 64),
    (100, True): (64, 64, 32),
    (100, False): (32, 32, 16),
    (120, True): (64, 64, 32),
    (120, False): (32, 16, 16),
}

# (kernel, whether operands have two bytes) -> the tiles for WIDTHS, the same on every architecture.
_TILES = {
    ("gated_solve", True): (GatedTile(64, 4, 2), GatedTile(64, 4, 2), GatedTile(64, 8, 2)),
    ("gated_advance", True): (GatedTile(64, 4, 2), GatedTile(64, 4, 2), GatedTile(32, 4, 2)),
    ("gated_read", True): (GatedTile(64, 4, 2), GatedTile(64, 4, 2), GatedTile(64, 8, 1)),
    ("gated_read_values", True): (GatedTile(64, 4, 2), GatedTile(64, 4, 2), GatedTile(64, 8, 1)),
    ("gated_retreat", True): (GatedTile(64, 4, 2), GatedTile(64, 4, 1), GatedTile(32, 4, 1)),
    ("gated_read_gradients", True): (GatedTile(64, 8, 1), GatedTile(64, 8, 1), GatedTile(64, 8, 1)),
    ("gated_solve_gradients", True): (GatedTile(64, 8, 1), GatedTile(64, 8, 1), GatedTile(32, 8, 1)),
    ("gated_solve", False): (GatedTile(32, 8, 1), GatedTile(32, 8, 1), GatedTile(32, 8, 1)),
    ("gated_advance", False): (GatedTile(32, 4, 1), GatedTile(16, 8, 1), GatedTile(16, 8, 1)),
    ("gated_read", False): (GatedTile(32, 4, 1), GatedTile(16, 8, 1), GatedTile(16, 8, 1)),
    ("gated_read_values", False): (GatedTile(32, 4, 1), GatedTile(16, 8, 1), GatedTile(16, 8, 1)),
    ("gated_retreat", False): (GatedTile(32, 4, 1), GatedTile(16, 8, 1), GatedTile(16, 8, 1)),
    ("gated_read_gradients", False): (GatedTile(16, 8, 1), GatedTile(16, 8, 1), GatedTile(16, 8, 1)),
    ("gated_solve_gradients", False): (GatedTile(16, 8, 1), GatedTile(16, 8, 1), GatedTile(16, 8, 1)),
    ("gated_invert", True): (GatedTile(64, 4, 1), GatedTile(64, 4, 1), None),
    ("gated_walk", True): (GatedTile(64, 4, 2), GatedTile(64, 4, 2), None),
    ("gated_walk_states", True): (GatedTile(64, 4, 2), GatedTile(64, 4, 2), None),
    ("gated_walk_back", True): (GatedTile(64, 4, 2), GatedTile(64, 4, 2), None),
    ("gated_walk_gradients", True): (GatedTile(64, 4, 1), GatedTile(128, 8, 1), None),
    ("gated_channel_invert", True): (GatedTile(64, 4, 1), GatedTile(64, 4, 1), None),
    ("gated_channel_walk", True): (GatedTile(64, 4, 2), GatedTile(128, 8, 2), None),
    ("gated_channel_pairs", True): (GatedTile(64, 8, 1), GatedTile(64, 8, 1), GatedTile(64, 8, 1)),
    ("gated_channel_solve", True): (GatedTile(64, 4, 2), GatedTile(64, 4, 2), GatedTile(64, 8, 2)),
    ("gated_channel_read", True): (GatedTile(64, 4, 2), GatedTile(64, 4, 2), GatedTile(64, 8, 1)),
    ("gated_channel_read_values", True): (GatedTile(64, 4, 2), GatedTile(64, 4, 2), GatedTile(64, 8, 1)),
    ("gated_channel_read_gradients", True): (GatedTile(64, 4, 1), GatedTile(64, 8, 1), GatedTile(32, 8, 1)),
    ("gated_channel_solve_gradients", True): (GatedTile(64, 4, 1), GatedTile(64, 8, 1), GatedTile(32, 8, 1)),
    ("gated_channel_pair_gradients", True): (GatedTile(32, 8, 1), GatedTile(32, 8, 1), GatedTile(32, 8, 1)),
    ("gated_channel_pairs", False): (GatedTile(32, 8, 1), GatedTile(32, 8, 1), GatedTile(32, 8, 1)),
    ("gated_channel_solve", False): (GatedTile(32, 8, 1), GatedTile(32, 8, 1), GatedTile(32, 8, 1)),
    ("gated_channel_read", False): (GatedTile(32, 4, 1), GatedTile(16, 8, 1), GatedTile(16, 8, 1)),
    ("gated_channel_read_values", False): (GatedTile(32, 4, 1), GatedTile(16, 8, 1), GatedTile(16, 8, 1)),
    ("gated_channel_read_gradients", False): (GatedTile(16, 8, 1), GatedTile(16, 8, 1), GatedTile(16, 8, 1)),
    ("gated_channel_solve_gradients", False): (GatedTile(16, 8, 1), GatedTile(16, 8, 1), GatedTile(16, 8, 1)),
    ("gated_channel_pair_gradients", False): (GatedTile(32, 8, 1), GatedTile(32, 8, 1), GatedTile(32, 8, 1)),
}


def _entry(compute_capability):
    if compute_capability < 80:
        raise NotImplementedError(f"Triton kernels need compute capability 8.0 or more, not {compute_capability / 10}")
    # 8.6 and 8.9 have as much shared memory as 12.0.
    entry = 120 if 80 < compute_capability < 90 else max(x for x, _ in CHUNKS if x <= compute_capability)
    return entry


def _at(row, width):
    return next(x for limit, x in zip(WIDTHS, row) if width <= limit)


def chunk_rows(compute_capability: int, width: int, narrow: bool) -> int:
    """Tokens of a chunk. `width` is the larger head dimension of keys and values.

    An architecture that is not in the table uses the entry of the next older one; 86 and 89 use that of 120. Raises
    NotImplementedError below compute capability 8.0.
    """
    return _at(CHUNKS[_entry(compute_capability), narrow], width)


def choose(kernel: str, compute_capability: int, width: int, narrow: bool) -> GatedTile:
    """The tile for `width`. Raises NotImplementedError below compute capability 8.0."""
    _entry(compute_capability)
    return _at(_TILES[kernel, narrow], width)


def has_plan(plan: str, width: int, narrow: bool) -> bool:
    """Whether there are tiles for the plan."""
    return plan == "stages" or (narrow and all(_at(_TILES[kernel, True], width) for kernel in WALK_KERNELS))


def chosen_plan(compute_capability: int, width: int, narrow: bool) -> str:
    """Which of PLANS computes a call."""
    row = CHOSEN_PLANS.get((_entry(compute_capability), narrow))
    return _at(row, width) if row else "stages"
