"""Theorem 1's construction: a memory of n slots whose contents are exchanged by writing a difference of two keys.

Source: Xu et al., DeltaFormer (NeurIPS 2025), Theorem 1 and appendix C.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from deltaformer_jax.tasks.draws import Draws


class SwapMemory(NamedTuple):
    """T = n + S + n tokens a row: n writes, S swaps, n reads.

    keys float64 [N, T, K]: k_i; then k_a − k_b; then k_j, as key and as query. values float64 [N, T, V]: v_i, then 0.
    gate float64 [N, T]: 1, and 0 at reads: as alpha and beta it makes reads write nothing. expected float64 [N, n, V]:
    what reading slot j gives. pairs int64 [N, S, 2]: the slots (a, b) of each swap. With an axis of one head in each,
    `delta_attention(keys, keys, values, alpha=gate, beta=gate, write_scale=1.0, read_scale=1.0, ...)` is to be
    `expected` in its last n rows.
    """

    keys: np.ndarray
    values: np.ndarray
    gate: np.ndarray
    expected: np.ndarray
    pairs: np.ndarray


class SwapConstruction:
    """u_t = v_t − Σ_{i<t} f(k_t·k_i) u_i: once all (k_i, v_i) are written, key k_a − k_b with value 0 swaps slots a, b.

    Then u = ṽ_b − ṽ_a for the contents ṽ before it, and Σ_i f(k_j·k_i) u_i is slot j's content. Exact where f rounds to
    the nearest integer (`Round(decimals=0)`) and |k_i·k_j| < 1/8; with orthogonal keys for any f that leaves −2 … 2 as
    they are.

    Args: keys: [n, K], of length 1, n ≥ 2. values: [n, V], the first contents. swaps: S ≥ 0, of two uniform slots each.
    Raises ValueError for shapes that do not fit. `task(seed, indices)` -> SwapMemory.
    """

    def __init__(self, keys: np.ndarray, values: np.ndarray, swaps: int):
        self.keys, self.values, self.swaps = np.asarray(keys, np.float64), np.asarray(values, np.float64), swaps
        if self.keys.ndim != 2 or len(self.keys) < 2:
            raise ValueError(f"keys have shape {self.keys.shape}: must be [slots, width] of at least 2 slots")
        if self.values.ndim != 2 or len(self.values) != len(self.keys):
            raise ValueError(f"values have shape {self.values.shape}: must be [{len(self.keys)} slots, width]")
        if swaps < 0:
            raise ValueError(f"swaps={swaps}: must be at least 0")

    def __call__(self, seed: int | str, indices: np.ndarray) -> SwapMemory:
        slots, swaps = len(self.keys), self.swaps
        draws = Draws(seed, "swap construction", indices)
        first = draws.integers(swaps, slots)
        second = draws.integers(swaps, slots - 1)
        second += second >= first
        rows, total = len(first), slots + swaps + slots
        keys = np.empty((rows, total, self.keys.shape[1]))
        keys[:, :slots] = keys[:, slots + swaps :] = self.keys
        keys[:, slots : slots + swaps] = self.keys[first] - self.keys[second]
        values = np.zeros((rows, total, self.values.shape[1]))
        values[:, :slots] = self.values
        gate = np.ones((rows, total))
        gate[:, slots + swaps :] = 0.0
        holds = np.tile(np.arange(slots), (rows, 1))
        row = np.arange(rows)
        for a, b in zip(first.T, second.T):
            holds[row, a], holds[row, b] = holds[row, b], holds[row, a]
        return SwapMemory(keys, values, gate, self.values[holds], np.stack([first, second], axis=-1))
