"""How the arrays of one call lie for its kernels on a TPU, and how a kernel's steps go over them.

The ops have [B,T,heads,W]; the kernels see [B heads, T', W], T' tokens in whole blocks.
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp

from pallas_kernels.tpu import calls
from pallas_kernels.tpu.matrix_unit import quotient


def _same(head):
    return head


class HeadsFirst:
    """The sizes that every op's call has, and the ways between the op's arrays and the kernels'.

    batch B, time T, heads of what is written, length T'.
    """

    def __init__(self, batch: int, time: int, heads: int, length: int):
        self.batch, self.time, self.heads, self.length = batch, time, heads, length

    def pad(self, x):
        """[B,T,...] -> [B,T',...], with zeros."""
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
        """Which row of the batch one of the B heads is of."""
        return quotient(head, self.heads)


class Blocks:
    """How a kernel's steps cut arrays into blocks of `rows` tokens. `at`: which block a step has. An input that is None
    stays None. `of`: which of an array's heads a head has."""

    def __init__(self, layout: HeadsFirst, rows: int, at: Callable = _same):
        self.heads, self.length, self.rows, self.at = layout.batch * layout.heads, layout.length, rows, at

    def whole(self, x, of: Callable = _same):
        """A head's [1, ...], the same at every step."""
        return x if x is None else calls.Input(x, (1, *x.shape[1:]), lambda h, s, _: (of(h), *[0] * (x.ndim - 1)))

    def tall(self, x, of: Callable = _same):
        """[1, rows, W] of x [., T', W]."""
        return x if x is None else calls.Input(x, (1, self.rows, x.shape[2]), lambda h, s, _: (of(h), self.at(s), 0))

    def folded(self, x):
        """[1, r, rows, W] of x [., r, T', W]."""
        if x is None:
            return None
        return calls.Input(x, (1, x.shape[1], self.rows, x.shape[3]), lambda h, s, _: (h, 0, self.at(s), 0))

    def row(self, x, of: Callable = _same):
        """[1, 1, rows] of x [., 1, T']."""
        return x if x is None else calls.Input(x, (1, 1, self.rows), lambda h, s, _: (of(h), 0, self.at(s)))

    def out_tall(self, width: int, dtype):
        shape = (self.heads, self.length, width)
        return calls.Output(shape, dtype, (1, self.rows, width), lambda h, s, _: (h, self.at(s), 0))

    def out_folded(self, group: int, width: int, dtype):
        shape = (self.heads, group, self.length, width)
        return calls.Output(shape, dtype, (1, group, self.rows, width), lambda h, s, _: (h, 0, self.at(s), 0))

    def out_row(self, group: int = 1):
        """[., group, T'] float32."""
        shape = (self.heads, group, self.length)
        return calls.Output(shape, jnp.float32, (1, group, self.rows), lambda h, s, _: (h, 0, self.at(s)))

    def out_whole(self, *shape: int):
        """[., *shape] float32, the same block at every step of a head."""
        return calls.Output((self.heads, *shape), jnp.float32, (1, *shape), lambda h, s, _: (h, *[0] * len(shape)))
