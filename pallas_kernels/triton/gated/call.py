"""What one call of the gated ops knows, and how it becomes descriptions of launches.

heads/launches.py (no decay, or one a head) and channels/launches.py (one a channel) share it."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.triton import launch as launching
from pallas_kernels.triton.gated.states import gated_advance, gated_retreat
from pallas_kernels.triton.gated.table import GatedTile, choose, chunk_rows
from pallas_kernels.triton.launch import Launch, Output
from pallas_kernels.triton.memory import block_width


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is known while tracing: the read's scale, the delta rule or not.

    `compute_capability`: 90 for an H100; None asks the device, and is 90 where there is none. `chunk` and `tile`: in
    the table's place, for tests and for choosing the table.
    """

    scale: float
    delta: bool
    compute_capability: int | None = None
    chunk: int | None = None
    tile: GatedTile | None = None

    @property
    def capability(self):
        return self.compute_capability or launching.target_capability()


def largest_width(key, value):
    return max(block_width(key.shape[3]), block_width(value.shape[3]))


def is_narrow(value):
    return np.dtype(value.dtype).itemsize == 2


def count_segments(chunk: int, time: int, resets):
    """The number of resets so far, [B, n C] in whole chunks, of resets [B,T] booleans."""
    segments = jnp.cumsum(resets, axis=1, dtype=jnp.int32)
    return jnp.pad(segments, [(0, 0), (0, -time % chunk)], mode="edge")


class Left(NamedTuple):
    """What decays and resets leave, chunk by chunk: of the entering state at each token, and at the chunk's end of what
    a token writes [B,Hv,n C], and of the state [B,Hv,n] or, of each channel, [B,Hv,n,K]. None: all, or, of each
    channel, what queries and keys hold already."""

    enter: jax.Array | None = None
    leave: jax.Array | None = None
    total: jax.Array | None = None


class Call:
    """The arrays and sizes of one call, for each kernel that is part of it."""

    def __init__(self, settings, run, query, key, value, beta):
        self.settings, self.narrow = settings, is_narrow(value)
        self.batch, self.time, self.heads, self.width = value.shape
        self.key_width = key.shape[3]
        self.chunk = settings.chunk or chunk_rows(settings.capability, largest_width(key, value), self.narrow)
        self.chunks = -(-self.time // self.chunk)
        self.length = self.chunks * self.chunk
        self.dtype = value.dtype
        self.query, self.key, self.value = query, key, value
        self.beta = None
        if beta is not None:
            beta = jnp.moveaxis(beta, 2, 1).astype(jnp.float32)
            self.beta = jnp.pad(beta, [(0, 0), (0, 0), (0, self.length - self.time)])
        self.scale = np.float32(settings.scale)
        self._run = run

    # How many programs there are for a head, when each has so many columns at a time.

    def each_chunk(self, columns):
        return self.chunks

    def each_part_of_values(self, columns):
        return -(-self.width // columns)

    def each_part_of_keys_of_a_chunk(self, columns):
        return self.chunks * -(-self.key_width // columns)

    def run(self, kernel, arrays, outputs, scalars, programs=None, **constants):
        launch = self.launch(kernel, arrays, outputs, scalars, programs or self.each_chunk, constants)
        if self._run is launching.run:
            return self._run(launch, self.settings.capability)
        return self._run(launch)

    def launch(self, kernel, arrays, outputs, scalars, programs, constants) -> Launch:
        """Of the constants that every call has, those in the kernel's list; `constants` are its own, and go before."""
        width = largest_width(self.key, self.value)
        tile = self.settings.tile or choose(kernel.__name__, self.settings.capability, width, self.narrow)
        known = dict(
            HEADS=self.heads,
            K_HEADS=self.key.shape[2],
            K=self.key_width,
            V=self.width,
            DELTA=self.settings.delta,
            HAS_BETA=self.beta is not None,
            PRECISION="tf32" if self.narrow else "tf32x3",
            SOLVE_PRECISION="tf32" if self.narrow else "tf32x3",
            C=self.chunk,
            LEVELS=self.chunk.bit_length() - 1,
            BLOCK_K=block_width(self.key_width),
            KEYS=min(tile.columns, block_width(self.key_width)),
            VALUES=min(tile.columns, block_width(self.width)),
        )
        known = {name: known[name] for name in kernel.arg_names if name in known}
        return Launch(
            kernel,
            # An argument that is absent still has a place in a kernel's list; nothing reads it there.
            tuple(self.key if x is None else x for x in arrays),
            outputs,
            (self.time, *scalars),
            self.batch * self.heads * programs(tile.columns),
            known | constants,
            tile.warps,
            tile.stages,
        )

    def tall(self, width, dtype=None):
        return Output((self.batch, self.time, self.heads, width), dtype or self.dtype)

    def numbers(self, present=True):
        return Output((self.batch, self.heads, self.length) if present else (1,), jnp.float32)

    def squares(self, present=True, dtype=None):
        square = (self.batch, self.heads, self.chunks, self.chunk, self.chunk)
        return Output(square if present else (1,), dtype or self.dtype)

    def states(self):
        return Output((self.batch, self.heads, self.chunks, self.key_width, self.width), self.dtype)

    def advance(self, decay, keys, u, w, left: Left, state):
        """States that enter the chunks, what is written, the final state. keys [B,T,.,K]; decay as in states.py."""
        delta = self.settings.delta
        states, written, final = self.run(
            gated_advance,
            (keys, u, w, left.leave, left.total, state.astype(jnp.float32)),
            (
                self.states(),
                self.tall(self.width) if delta else Output((1,), self.dtype),
                Output(state.shape, jnp.float32),
            ),
            (),
            self.each_part_of_values,
            K_HEADS=keys.shape[2],
            DECAY=decay,
        )
        return states, written if delta else self.value, final

    def retreat(self, decay, queries, keys, w, dout, dwritten, left: Left, dstate):
        """Cotangents of the states that leave the chunks, of what is written, of the initial state. dwritten: what the
        chunk's own reads give."""
        return self.run(
            gated_retreat,
            (queries, keys, w, dout, dwritten, *left, dstate.astype(jnp.float32)),
            (self.states(), self.tall(self.width), Output(dstate.shape, jnp.float32)),
            (self.scale,),
            self.each_part_of_values,
            K_HEADS=keys.shape[2],
            DECAY=decay,
        )

    def sum_heads(self, x):
        """[B,T,Hv,K] -> [B,T,H,K] in the keys' type: the sums over the heads of values that share a head of keys."""
        return x.reshape(*x.shape[:2], self.key.shape[2], -1, x.shape[3]).sum(axis=3).astype(self.key.dtype)

    def tokens(self, x):
        """[B,Hv,n C] -> [B,T,Hv]."""
        return jnp.moveaxis(x, 1, 2)[:, : self.time]
