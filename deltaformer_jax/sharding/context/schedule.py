"""When each device works in the chain of DeltaFormer's write, and how much of its time it waits.

The write is a chain: block b of a row can be solved only after all blocks before it. The streams (rows × write heads)
are cut into groups. At step s, block b = s − j of group j is solved, by device b mod P; its keys and values then go to
all devices, which take them into the sums of their later blocks. Of P consecutive blocks each device has one, so that
with at most P groups no device solves twice in a step. N blocks and g groups take N + g − 1 steps.

A step takes as long as its busiest device. More groups make the solve shorter, which only one device of a group does,
and the run longer by the steps in which not all groups have work.
"""

from __future__ import annotations

import numpy as np

# Work in units of one tile of the write: what a block with its own columns adds to a tile is the triangular solve.
SOLVE = 1.0


def work(blocks: int, devices: int, groups: int, reads: float) -> np.ndarray:
    """[steps, P]: the work of each device at each step of the forward pass, in tiles of the write of all streams.

    A row has `blocks` blocks. `reads`: query heads per write head; a tile of the read costs as much as the write's.
    """
    numbers = np.arange(blocks).reshape(-1, devices).T  # [P, m]: the blocks of each device
    of_block = np.zeros((blocks, devices))
    for b in range(blocks):
        of_block[b] = (1 + reads) * np.sum(numbers > b, axis=1)
        of_block[b, b % devices] += 1 + SOLVE + reads
    steps = np.zeros((blocks + groups - 1, devices))
    for j in range(groups):
        steps[j : j + blocks] += of_block / groups
    return steps


def idle_share(steps: np.ndarray) -> float:
    """The share of the devices' time in which they wait for the busiest one of the step."""
    return 1 - steps.sum() / (steps.shape[1] * steps.max(axis=1).sum())


def choose_groups(streams: int, blocks: int, devices: int, reads: float) -> int:
    """The number of groups, a divisor of `streams` of at most P, with the shortest run."""
    divisors = [groups for groups in range(1, min(streams, devices) + 1) if streams % groups == 0]
    return min(divisors, key=lambda groups: work(blocks, devices, groups, reads).max(axis=1).sum())


def ring_work(table: np.ndarray, seen: int | None = None) -> np.ndarray:
    """[steps, P]: the tiles of each device at each step of a causal read over the ring (`ring_read.py`).

    table: `Blocks.table()`, the numbers of each device's blocks. seen: how many blocks a row sees, its own included,
    None: all before it. A device sees its own blocks at the first step.
    """
    devices = table.shape[0]
    steps = np.zeros((devices, devices))
    for ago in range(devices):
        for device in range(devices):
            between = table[device][:, None] - table[(device - ago) % devices][None]
            steps[ago, device] = np.sum((between >= 0) & (between < (seen or table.size)))
    return steps[steps.max(axis=1) > 0]
