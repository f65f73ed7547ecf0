"""The construction of Theorem 1: a memory of n slots; writing the difference of two keys swaps two slots' contents.

Source: Xu et al., DeltaFormer (NeurIPS 2025), Theorem 1 and appendix C.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from deltaformer_jax.tasks.draws import Draws


class SwapMemory(NamedTuple):
    """N rows of T = n + S + n tokens: n writes, S swaps, n reads.

    * keys float64 [N, T, K]: k_i at writes, k_a − k_b at swaps, k_j at reads. They serve as keys and as queries.
    * values float64 [N, T, V]: v_i at writes, else 0.
    * gate float64 [N, T]: 0 at reads, else 1. As alpha and beta it keeps reads from writing.
    * expected float64 [N, n, V]: the contents of slot j at its read.
    * pairs int64 [N, S, 2]: the slots (a, b) of each swap.

    With a head axis of length 1 in each array, the last n rows of
    `delta_attention(keys, keys, values, alpha=gate, beta=gate, write_scale=1.0, read_scale=1.0, ...)` must equal
    `expected`.
    """

    keys: np.ndarray
    values: np.ndarray
    gate: np.ndarray
    expected: np.ndarray
    pairs: np.ndarray


class SwapConstruction:
    """u_t = v_t − Σ_{i<t} f(k_t·k_i) u_i: n slots are written; then key k_a − k_b with value 0 swaps slots a and b.

    The swap's u is ṽ_b − ṽ_a, where ṽ are the contents before it. Reading slot j, Σ_i f(k_j·k_i) u_i, gives its
    content. This is exact if f rounds to the nearest integer (`Round(decimals=0)`) and |k_i·k_j| < 1/8 for i ≠ j. With
    orthogonal keys it is exact for any f with f(x) = x at the integers −2 … 2.

    Args: keys: [n, K], of length 1, n ≥ 2. values: [n, V], the first contents. swaps: S ≥ 0; each swaps two slots drawn
      uniformly. Raises ValueError for shapes that don't fit. `task(seed, indices)` -> SwapMemory.
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
