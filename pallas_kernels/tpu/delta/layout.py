"""The layout of one call of DeltaFormer for its TPU kernels: sizes, which chunks see which, and whether arrays of all
rows stay in VMEM. The letters are those of api.py.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

from pallas_kernels.tpu import limits
from pallas_kernels.tpu.delta.kappa import Kappa
from pallas_kernels.tpu.layout import HeadsFirst
from pallas_kernels.tpu.matrix_unit import TILE, quotient


class Plan(NamedTuple):
    """The static arguments of the kernels.

    write, read: the similarities. tied: w = q, and one softmax writes and reads. writes_by_key: w = k. chunk: rows of a
    chunk. steps: number of chunks. group: query heads that share one head of u. heads, kv_heads: heads of u and of keys
    per batch row. operand, write_dtype, read_dtype: the dtypes of the operands of products of queries and keys, of
    products with weights in the write, and of products with weights in the read.
    """

    write: Kappa
    read: Kappa | None
    tied: bool
    writes_by_key: bool
    chunk: int
    steps: int
    group: int
    heads: int
    kv_heads: int
    operand: jnp.dtype
    write_dtype: jnp.dtype
    read_dtype: jnp.dtype

    @property
    def reads(self) -> bool:
        """Whether there is a read that the write does not compute itself."""
        return self.read is not None and not self.tied

    def batch_row(self, head):
        return quotient(head, self.heads)

    def kv_head(self, head):
        """The key/value head, of B G, that a head of u uses."""
        return quotient(head, self.heads // self.kv_heads)

    def write_head(self, head):
        """The head of w that a head of u uses."""
        return self.kv_head(head) if self.writes_by_key else head


def chunk_rows(settings, dtype, time: int) -> int:
    """Rows of a chunk: 512 for bfloat16; 256 for float32, whose tiles take twice the memory; T, rounded up to a
    multiple of 128, if that is less."""
    most = settings.chunk or (512 if dtype == jnp.bfloat16 else 256)
    return min(most, -(-time // TILE) * TILE)


class Layout(HeadsFirst):
    """The sizes of one call, and the conversions between the op's layout and the kernels' layout. `settings`: Settings
    of api.py."""

    def __init__(self, settings, query, write_query, key, value, segment_ids):
        batch, time, self.kv_heads, self.width = key.shape
        self.value_width = value.shape[3]
        w = query if settings.tied else key if write_query is None else write_query
        self.chunk = chunk_rows(settings, key.dtype, time)
        self.steps = -(-time // self.chunk)
        super().__init__(batch, time, w.shape[2], self.steps * self.chunk)
        self.group = 1 if query is None else query.shape[2] // self.heads
        narrow = lambda kappa: kappa is not None and kappa.normalised and key.dtype == jnp.bfloat16
        self.plan = Plan(
            write=settings.write,
            read=settings.read,
            tied=settings.tied,
            writes_by_key=write_query is None and not settings.tied,
            chunk=self.chunk,
            steps=self.steps,
            group=self.group,
            heads=self.heads,
            kv_heads=self.kv_heads,
            operand=jnp.dtype(key.dtype),
            write_dtype=jnp.dtype(jnp.bfloat16 if narrow(settings.write) else jnp.float32),
            read_dtype=jnp.dtype(jnp.bfloat16 if narrow(settings.read) else jnp.float32),
        )
        self.streamed = settings.streamed
        self.segments = None
        if segment_ids is None:
            self.first = jnp.zeros((self.batch, self.steps), jnp.int32)
            self.last = jnp.full((self.batch, self.steps), self.steps - 1, jnp.int32)
        else:
            ids = self.pad(segment_ids)
            self.first, self.last = first_chunks(ids, self.chunk), last_chunks(ids, self.chunk)
            self.segments = ids[:, None, :]

    def folded(self, x):
        """[B,T,Hu r,W] -> [B Hu, r, T', W]."""
        x = self.tall(x)
        return x.reshape(-1, self.group, *x.shape[1:])

    def unfolded(self, x):
        """[B Hu, r, T', W] -> [B,T,Hu r,W]."""
        return self.back(x.reshape(-1, *x.shape[2:]))

    def streams_forward(self, kept_dtype) -> bool:
        """Whether the forward kernel leaves arrays of all rows in HBM: two buffers of k, and u, do not fit in VMEM."""
        row = 2 * _lanes(self.width) * self.plan.operand.itemsize + _lanes(self.value_width) * kept_dtype.itemsize
        return self._streams(row)

    def streams_backward(self) -> bool:
        """Whether the backward kernel leaves arrays of all rows in HBM: w, H and dW, and for a separate read q, dO and
        dQ of each query head."""
        operand, width, value_width = self.plan.operand.itemsize, _lanes(self.width), _lanes(self.value_width)
        row = 2 * width * (operand + 4) + value_width * self.plan.write_dtype.itemsize
        row += (2 * width * (operand + 4) + 2 * value_width * operand) * self.group * self.plan.reads
        return self._streams(row)

    def _streams(self, bytes_per_row):
        if self.streamed is not None:
            return self.streamed
        return self.length * bytes_per_row > limits.RESIDENT_BYTES


def _lanes(width):
    return -(-width // TILE) * TILE


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
