"""Form: what the walk's kernels are compiled for, except their tile. It is the constant FORM in all of them."""

from __future__ import annotations

import dataclasses

from pallas_kernels.triton.memory import Layout


@dataclasses.dataclass(frozen=True)
class Form:
    """heads: value heads. key_heads: heads of queries and keys. key_width, value_width: K and V. delta: the delta rule.
    precision: Triton's input_precision for products of float32 numbers. has_…: the optional array is present."""

    heads: int
    key_heads: int
    key_width: int
    value_width: int
    delta: bool
    precision: str
    has_decay: bool
    has_segments: bool
    has_beta: bool

    @property
    def keys(self) -> Layout:
        """Layout of q and k: [B, T, key_heads, K]."""
        return Layout(self.key_heads, self.key_width)

    @property
    def key_gradients(self) -> Layout:
        """Layout of dq and dk: [B, T, heads, K]."""
        return Layout(self.heads, self.key_width)

    @property
    def values(self) -> Layout:
        """Layout of v, out and their gradients: [B, T, heads, V]."""
        return Layout(self.heads, self.value_width)

    @property
    def has_gates(self) -> bool:
        """Whether the state shrinks between tokens."""
        return self.has_decay or self.has_segments
