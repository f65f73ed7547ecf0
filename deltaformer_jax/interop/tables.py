"""Tables of tensors: which tensors of a file are which parameters of ours.

A row names tensors of a layer in the file and parameters of our block. A table may hold rows for options that a model
does not have: a row counts if the model has its parameters.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from deltaformer_jax.interop.layouts import Layout


class Row(NamedTuple):
    """theirs: a tensor's name, or several whose rows are laid end to end. "a|b": either name; the first is written.

    ours: a parameter's path below the block, or several, which share the tensor's rows in this order. by_head: they do
    so for each head of the first parameter, not for the whole.
    """

    theirs: str | tuple[str, ...]
    ours: str | tuple[str, ...]
    layout: Layout
    by_head: bool = False

    @property
    def tensors(self) -> tuple[str, ...]:
        return (self.theirs,) if isinstance(self.theirs, str) else self.theirs

    @property
    def parameters(self) -> tuple[str, ...]:
        return (self.ours,) if isinstance(self.ours, str) else self.ours


def shapes(row: Row, ours: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """The shapes of the row's tensors in a file, from those of its parameters."""
    parts = [row.layout.theirs(shape) for shape in ours]
    if len(row.tensors) == len(parts):
        return parts
    return [(sum(part[0] for part in parts), *parts[0][1:])]


def to_ours(row: Row, arrays: list[np.ndarray], ours: list[tuple[int, ...]]) -> list[np.ndarray]:
    """The row's parameters, of the shapes `ours`, from its tensors."""
    whole = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
    counts = [row.layout.theirs(shape)[0] for shape in ours]
    if row.by_head:
        heads = ours[0][-2]
        whole = whole.reshape(heads, -1, *whole.shape[1:])
        parts = np.split(whole, np.cumsum([count // heads for count in counts])[:-1], axis=1)
        parts = [part.reshape(-1, *whole.shape[2:]) for part in parts]
    else:
        parts = np.split(whole, np.cumsum(counts)[:-1])
    return [row.layout.to_ours(part, shape) for part, shape in zip(parts, ours, strict=True)]


def to_theirs(row: Row, arrays: list[np.ndarray]) -> list[np.ndarray]:
    """The row's tensors from its parameters: the inverse of `to_ours`."""
    parts = [row.layout.to_theirs(array) for array in arrays]
    if len(row.tensors) == len(parts):
        return parts
    if not row.by_head:
        return [np.concatenate(parts)]
    heads = arrays[0].shape[-2]
    grouped = [part.reshape(heads, -1, *part.shape[1:]) for part in parts]
    return [np.concatenate(grouped, axis=1).reshape(-1, *parts[0].shape[1:])]
