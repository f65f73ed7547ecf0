"""The layout of the arrays for the TPU kernels, and how they are cut into blocks for the steps of a kernel's grid.

The ops' arrays are [B,T,heads,W]. The kernels' arrays are [B heads, T', W], with T' = T padded to whole blocks.
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp

from pallas_kernels.tpu import calls
from pallas_kernels.tpu.matrix_unit import quotient


def _same(head):
    return head


class HeadsFirst:
    """The sizes of a call, and the conversions between the ops' layout and the kernels' layout.

    batch: B. time: T. heads: heads of the written values. length: T'.
    """

    def __init__(self, batch: int, time: int, heads: int, length: int):
        self.batch, self.time, self.heads, self.length = batch, time, heads, length

    def pad(self, x):
        """[B,T,...] -> [B,T',...], padded with zeros."""
        return jnp.pad(x, [(0, 0), (0, self.length - self.time)] + [(0, 0)] * (x.ndim - 2))

    def tall(self, x):
        """[B,T,heads,...] -> [B heads, T', ...]."""
        x = jnp.swapaxes(self.pad(x), 1, 2)
        return x.reshape(-1, *x.shape[2:])

    def row(self, x):
        """[B,T,heads] -> [B heads, 1, T'] float32."""
        return self.tall(x[..., None].astype(jnp.float32)).swapaxes(1, 2)

    def back(self, x):
        """[B heads, T', W] -> [B,T,heads,W]."""
        x = x.reshape(self.batch, -1, *x.shape[1:])
        return jnp.swapaxes(x, 1, 2)[:, : self.time]

    def row_back(self, x):
        """[B heads, 1, T'] -> [B,T,heads]."""
        return self.back(x.swapaxes(1, 2))[..., 0]

    def batch_row(self, head):
        """The batch row of a head, one of the B × heads."""
        return quotient(head, self.heads)


class Blocks:
    """Cuts arrays into blocks of `rows` tokens, one for each step of a kernel's grid (heads, steps).

    `at` maps a step to its block. In the methods, `of` maps a head of the grid to a head of the array. An input that is
    None stays None.
    """

    def __init__(self, layout: HeadsFirst, rows: int, at: Callable = _same):
        self.heads, self.length, self.rows, self.at = layout.batch * layout.heads, layout.length, rows, at

    def whole(self, x, of: Callable = _same):
        """Block [1, ...]: all rows of a head, the same block at every step."""
        return x if x is None else calls.Input(x, (1, *x.shape[1:]), lambda h, s, _: (of(h), *[0] * (x.ndim - 1)))

    def tall(self, x, of: Callable = _same):
        """Block [1, rows, W] of x [., T', W]."""
        return x if x is None else calls.Input(x, (1, self.rows, x.shape[2]), lambda h, s, _: (of(h), self.at(s), 0))

    def folded(self, x):
        """Block [1, r, rows, W] of x [., r, T', W]."""
        if x is None:
            return None
        return calls.Input(x, (1, x.shape[1], self.rows, x.shape[3]), lambda h, s, _: (h, 0, self.at(s), 0))

    def row(self, x, of: Callable = _same):
        """Block [1, 1, rows] of x [., 1, T']."""
        return x if x is None else calls.Input(x, (1, 1, self.rows), lambda h, s, _: (of(h), 0, self.at(s)))

    def out_tall(self, width: int, dtype):
        shape = (self.heads, self.length, width)
        return calls.Output(shape, dtype, (1, self.rows, width), lambda h, s, _: (h, self.at(s), 0))

    def out_folded(self, group: int, width: int, dtype):
        shape = (self.heads, group, self.length, width)
        return calls.Output(shape, dtype, (1, group, self.rows, width), lambda h, s, _: (h, 0, self.at(s), 0))

    def out_row(self, group: int = 1):
        """Output [., group, T'] float32, in blocks [1, group, rows]."""
        shape = (self.heads, group, self.length)
        return calls.Output(shape, jnp.float32, (1, group, self.rows), lambda h, s, _: (h, 0, self.at(s)))

    def out_whole(self, *shape: int):
        """Output [., *shape] float32; all of a head is one block, the same at every step."""
        return calls.Output((self.heads, *shape), jnp.float32, (1, *shape), lambda h, s, _: (h, *[0] * len(shape)))
