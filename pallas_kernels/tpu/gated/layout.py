"""The layout of one call of the gated ops for its TPU kernels. The letters are those of api.py."""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.tpu import calls, limits
from pallas_kernels.tpu.gated.chunk import Plan
from pallas_kernels.tpu.layout import Blocks, HeadsFirst
from pallas_kernels.tpu.matrix_unit import TILE, quotient


class Layout(HeadsFirst):
    """The sizes of one call, and the conversions between the ops' layout and the kernels' layout. `settings`: Settings
    of api.py."""

    def __init__(self, settings, key, value, log_decay, resets):
        batch, time, heads, self.value_width = value.shape
        self.key_heads, self.width = key.shape[2:]
        self.sharing = heads // self.key_heads
        channels = log_decay is not None and log_decay.ndim == 4
        chunk = settings.chunk or chunk_rows(channels)
        chunks = settings.chunks or chunks_of_a_group(chunk, time)
        self.rows = chunk * chunks
        self.steps = -(-time // self.rows)
        super().__init__(batch, time, heads, self.steps * self.rows)
        self.plan = Plan(settings.scale, settings.delta, channels, chunk, chunks, jnp.dtype(key.dtype))
        self.interpret = settings.interpret
        self.local = None
        if resets is not None:
            resets = self.pad(resets).reshape(batch, -1, chunk)
            self.local = jnp.cumsum(resets, axis=-1, dtype=jnp.int32).reshape(batch, 1, self.length)

    def key_head(self, head):
        """The key head, of B H, that a value head uses."""
        return quotient(head, self.sharing)

    def across(self, state):
        """The transposed states, [B,Hv,K,V] -> [B Hv, V, K] float32; also for the way back."""
        return jnp.swapaxes(state.astype(jnp.float32).reshape(-1, *state.shape[-2:]), 1, 2)

    def sum_sharing(self, x):
        """[B Hv, T', K] -> [B,T,H,K]: sums over the value heads that share a key head."""
        x = self.back(x)
        if self.sharing > 1:
            x = x.reshape(*x.shape[:2], self.key_heads, self.sharing, self.width).sum(axis=3)
        return x

    def inputs(self, blocks: Blocks, query, key, value, beta, log_decay):
        """The inputs that both kernels take."""
        tall = lambda x, of: blocks.tall(self.tall(x), of)
        own = lambda head: head
        g = None
        if log_decay is not None:
            decays = log_decay.astype(jnp.float32)
            g = tall(decays, own) if self.plan.channels else blocks.row(self.row(decays))
        return {
            "k": tall(key, self.key_head),
            "q": tall(query, self.key_head),
            "v": tall(value, own),
            "beta": None if beta is None or not self.plan.delta else blocks.row(self.row(beta)),
            "g": g,
            "local": blocks.row(self.local, self.batch_row),
        }

    def out_state(self):
        """The Output of one state per head."""
        return Blocks(self, self.rows).out_whole(self.value_width, self.width)

    def call(self, kernel, name, inputs, outputs, scratch):
        """Runs a kernel. `scratch`: the name of the scratch array in VMEM that holds the state."""
        return calls.call(
            functools.partial(kernel, plan=self.plan),
            name,
            (self.batch * self.heads, self.steps),
            # These kernels need no prefetched array; `calls.call` takes one, which is not read.
            jnp.zeros(1, jnp.int32),
            inputs,
            outputs,
            {scratch: pltpu.VMEM((self.value_width, self.width), jnp.float32)},
            vmem_bytes=limits.VMEM_BYTES,
            interpret=self.interpret,
        )


def chunk_rows(channels: bool) -> int:
    """Rows of a chunk: 128 with one decay per head or none, 64 with a decay per channel.

    From the static schedules for v5e, head dimension 128, bfloat16: four chunks of 128 rows, compared with eight of 64,
    take 2 % more time forward and 10 % less backward with one decay per head, and 6 % and 10 % more per channel.
    """
    return 64 if channels else 128


def chunks_of_a_group(chunk: int, time: int) -> int:
    """Chunks of a group: 4, or fewer if T is shorter. With 4, a token takes 10 % less time than with 2 on v5e, and 20 %
    less on v6e (static schedules). The rows of a group are a multiple of 128 if there are several groups."""
    rows = min(4 * chunk, -(-time // TILE) * TILE)
    return max(rows // chunk, 1)
