"""How the blocks of a sequence lie on the devices of a mesh axis.

The model keeps a row's tokens contiguous: device p of P has tokens p·T/P … (p+1)·T/P − 1. Causal work grows along the
row, so that the last device would have most of it. A form therefore cuts the row into N = m P blocks of C tokens and
spreads them, for m = 4 and P = 3 (numbers of the blocks on each device):

    contiguous    0 1 2 3     4 5 6 7     8 9 10 11     as the model has them
    zigzag        0 1 10 11   2 3 8 9     4 5 6 7       the row's p-th part of 2 P and the (2P − 1 − p)-th
    dealt         0 3 6 9     1 4 7 10    2 5 8 11      block b to device b mod P, as cards are dealt
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
from jax import lax


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Where the blocks are: `layout` "contiguous", "zigzag" or "dealt" over the mesh axis `axis_name` of `devices`
    devices, `number` blocks of `rows` tokens on each."""

    layout: str
    axis_name: str
    devices: int
    number: int
    rows: int

    def table(self) -> np.ndarray:
        """[P, m] int32: the numbers of the blocks of each device, in increasing order."""
        device, block = np.arange(self.devices)[:, None], np.arange(self.number)[None]
        if self.layout == "contiguous":
            return (device * self.number + block).astype(np.int32)
        if self.layout == "dealt":
            return (block * self.devices + device).astype(np.int32)
        half = self.number // 2
        later = 2 * self.devices - 1 - device
        return np.where(block < half, device * half + block, later * half + block - half).astype(np.int32)

    def numbers(self, device):
        """[m] int32: the numbers of one device's blocks; `device` may be traced."""
        return lax.dynamic_index_in_dim(jnp.asarray(self.table()), device, keepdims=False)

    def in_order(self, x):
        """x [B, h, m, ...], one entry per own block, of all devices and in the row's order: [B, h, N, ...]."""
        every = lax.all_gather(x, self.axis_name, axis=2, tiled=True)
        return jnp.take(every, np.argsort(self.table().reshape(-1)), axis=2)

    def spread(self, x):
        """x [B, T/P, ...] of contiguous tokens -> the device's blocks one after another; None stays None.

        "dealt": each device sends (P − 1)/P of its numbers, by one all-to-all. "zigzag": it sends all of them, but for
        the halves that stay, by two permutations.
        """
        if x is None or self.layout == "contiguous":
            return x
        if self.layout == "dealt":
            cut = x.reshape(x.shape[0], -1, self.devices, self.rows, *x.shape[2:])
            return lax.all_to_all(cut, self.axis_name, split_axis=2, concat_axis=1, tiled=True).reshape(x.shape)
        even, odd = (lax.ppermute(half, self.axis_name, self._zigzag(parity)) for parity, half in enumerate(_halves(x)))
        return jnp.concatenate(self._by_parity(even, odd), axis=1)

    def unspread(self, x):
        """The inverse of `spread`."""
        if x is None or self.layout == "contiguous":
            return x
        if self.layout == "dealt":
            cut = x.reshape(x.shape[0], -1, 1, self.rows, *x.shape[2:])
            return lax.all_to_all(cut, self.axis_name, split_axis=1, concat_axis=2, tiled=True).reshape(x.shape)
        back = [[(there, here) for here, there in self._zigzag(parity)] for parity in (0, 1)]
        both = self._by_parity(*_halves(x))
        return jnp.concatenate([lax.ppermute(y, self.axis_name, pairs) for y, pairs in zip(both, back)], axis=1)

    def _zigzag(self, parity):
        """(from, to) of the halves number 2 d + parity, d = 0 … P − 1. Half h is on device min(h, 2P − 1 − h)."""
        halves = [(device, 2 * device + parity) for device in range(self.devices)]
        return [(device, min(half, 2 * self.devices - 1 - half)) for device, half in halves]

    def _by_parity(self, first, second):
        """(first, second) on even devices, (second, first) on odd ones. A device's two halves have numbers p and
        2P − 1 − p: one even, one odd."""
        odd = lax.axis_index(self.axis_name) % 2 == 1
        return jnp.where(odd, second, first), jnp.where(odd, first, second)


def _halves(x):
    half = x.shape[1] // 2
    return x[:, :half], x[:, half:]


def blocks_of(layout: str, tokens: int, axis_name: str, at_most: int) -> Blocks:
    """The blocks of a sequence with `tokens` tokens on each device, of at most `at_most` tokens each.

    A device's tokens must be a multiple of the blocks that the layout needs: 2 for "zigzag", P for "dealt". Raises
    ValueError if they are not.
    """
    devices = lax.axis_size(axis_name)
    unit = {"contiguous": 1, "zigzag": 2, "dealt": devices}[layout]
    if tokens % unit:
        raise ValueError(
            f"query has {tokens} tokens on each of the {devices} devices of the mesh axis {axis_name!r}: that must be "
            f"a multiple of {unit}, so make the sequence (data.sequence_length) a multiple of {unit * devices} tokens, "
            f"or the number of heads of every array (model.num_kv_heads) one of {devices}"
        )
    rows = max(size for size in range(1, min(at_most, tokens // unit) + 1) if (tokens // unit) % size == 0)
    return Blocks(layout, axis_name, devices, tokens // rows, rows)
