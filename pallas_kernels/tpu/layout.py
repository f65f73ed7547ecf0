"""How the arrays of one call of DeltaFormer lie for its kernels on a TPU: [B,T,heads,W] as [B heads, T', W], T' whole
chunks; which chunks meet which; and whether arrays of all rows stay in VMEM.

Letters as in delta.py.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax

from pallas_kernels.tpu import limits
from pallas_kernels.tpu.products import TILE, quotient


def chunk_of(settings, dtype, time: int) -> int:
    """512 rows for bfloat16, 256 for float32, whose tiles are twice as large; no more than there are."""
    most = settings.chunk or (512 if dtype == jnp.bfloat16 else 256)
    return min(most, -(-time // TILE) * TILE)


class Layout:
    """The sizes of one call, and the ways between the op's arrays and the kernels'. `settings`: delta.py's."""

    def __init__(self, settings, query, write_query, key, value, segment_ids):
        self.batch, self.time, self.kv_heads, self.width = key.shape
        self.value_width = value.shape[3]
        w = query if settings.tied else key if write_query is None else write_query
        self.heads = w.shape[2]
        self.group = 1 if query is None else query.shape[2] // self.heads
        self.chunk = chunk_of(settings, key.dtype, self.time)
        self.steps = -(-self.time // self.chunk)
        self.length = self.steps * self.chunk
        self.operand = jnp.dtype(key.dtype)
        narrow = lambda kappa: kappa is not None and kappa.normalised and key.dtype == jnp.bfloat16
        self.write_dtype = jnp.dtype(jnp.bfloat16 if narrow(settings.write) else jnp.float32)
        self.read_dtype = jnp.dtype(jnp.bfloat16 if narrow(settings.read) else jnp.float32)
        if segment_ids is None:
            self.first = jnp.zeros((self.batch, self.steps), jnp.int32)
            self.last = jnp.full((self.batch, self.steps), self.steps - 1, jnp.int32)
        else:
            ids = self.pad(segment_ids)
            self.first, self.last = first_chunks(ids, self.chunk), last_chunks(ids, self.chunk)

    def pad(self, x):
        return jnp.pad(x, [(0, 0), (0, self.length - self.time)] + [(0, 0)] * (x.ndim - 2))

    def tall(self, x):
        """[B,T,heads,W] -> [B heads, T', W]."""
        x = jnp.swapaxes(self.pad(x), 1, 2)
        return x.reshape(-1, *x.shape[2:])

    def folded(self, x):
        """[B,T,Hu r,W] -> [B Hu, r, T', W]."""
        x = self.tall(x)
        return x.reshape(-1, self.group, *x.shape[1:])

    def row(self, x):
        """[B,T,heads] -> [B heads, 1, T'] float32."""
        return self.tall(x[..., None].astype(jnp.float32)).swapaxes(1, 2)

    def back(self, x):
        """[B heads, T', W] -> [B,T,heads,W]."""
        x = x.reshape(self.batch, -1, *x.shape[1:])
        return jnp.swapaxes(x, 1, 2)[:, : self.time]

    def unfolded(self, x):
        """[B Hu, r, T', W] -> [B,T,Hu r,W]."""
        return self.back(x.reshape(-1, *x.shape[2:]))

    def kv(self, head):
        """Which of the B G heads of keys and values a head of u has."""
        return quotient(head, self.heads // self.kv_heads)

    def of_batch(self, head):
        return quotient(head, self.heads)

    def sizes(self):
        return dict(
            chunk=self.chunk, group=self.group, group_of_batch=self.heads, operand=self.operand,
            write_dtype=self.write_dtype, read_dtype=self.read_dtype,
        )  # fmt: skip

    def streams_forward(self, settings, kept_dtype):
        """Whether k, twice, and u of all rows are too much for VMEM."""
        lanes = lambda width: -(-width // TILE) * TILE
        row = 2 * lanes(self.width) * self.operand.itemsize + lanes(self.value_width) * kept_dtype.itemsize
        return self._streams(settings, row)

    def streams_backward(self, settings, reads):
        """The same of what the backward sweep keeps of all rows: w, H, dW; q, dO and dQ of each query head."""
        lanes = lambda width: -(-width // TILE) * TILE
        operand, width, value_width = self.operand.itemsize, lanes(self.width), lanes(self.value_width)
        row = 2 * width * (operand + 4) + value_width * self.write_dtype.itemsize
        row += (2 * width * (operand + 4) + 2 * value_width * operand) * self.group * reads
        return self._streams(settings, row)

    def _streams(self, settings, bytes_per_row):
        if settings.streamed is not None:
            return settings.streamed
        return self.length * bytes_per_row > limits.RESIDENT_BYTES


def first_chunks(ids, chunk: int):
    """[B, T/C] int32: the chunk where the segment of each chunk's first row begins; ids [B, T]."""
    index = jnp.arange(ids.shape[1], dtype=jnp.int32)[None]
    begins = jnp.concatenate([jnp.ones_like(ids[:, :1], bool), ids[:, 1:] != ids[:, :-1]], 1)
    return lax.cummax(jnp.where(begins, index, 0), axis=1)[:, ::chunk] // chunk


def last_chunks(ids, chunk: int):
    """[B, T/C] int32: the chunk where the segment of each chunk's last column ends."""
    time = ids.shape[1]
    index = jnp.arange(time, dtype=jnp.int32)[None]
    ends = jnp.concatenate([ids[:, 1:] != ids[:, :-1], jnp.ones_like(ids[:, :1], bool)], 1)
    end = lax.cummin(jnp.where(ends, index, time), axis=1, reverse=True)
    return end[:, chunk - 1 :: chunk] // chunk
