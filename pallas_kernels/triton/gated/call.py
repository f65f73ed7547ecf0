"""One call of the gated ops: its settings, arrays and sizes, and how it builds its Launches.

heads/launches.py (no decay, or one per head) and channels/launches.py (one per channel) share this file."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.triton import launch as launching
from pallas_kernels.triton.gated.states import gated_advance, gated_retreat
from pallas_kernels.triton.gated.table import GatedTile, choose, chosen_plan, chunk_rows
from pallas_kernels.triton.launch import Launch, Output
from pallas_kernels.triton.memory import block_width


@dataclasses.dataclass(frozen=True)
class Settings:
    """The static arguments of a call.

    scale: of the read. delta: the gated delta rule (True) or gated linear attention. compute_capability: 90 for an
    H100; None means that of the device, or 90 if there is none. chunk, tile: replace the table's entries, for tests and
    for choosing the table. plan: one of table.PLANS in the place of the table's, for tests and for measuring.
    """

    scale: float
    delta: bool
    compute_capability: int | None = None
    chunk: int | None = None
    tile: GatedTile | None = None
    plan: str | None = None

    @property
    def capability(self):
        return self.compute_capability or launching.target_capability()

    def plan_of(self, key, value) -> str:
        """Which of table.PLANS computes a call."""
        return self.plan or chosen_plan(self.capability, largest_width(key, value), is_narrow(value))


def largest_width(key, value):
    return max(block_width(key.shape[3]), block_width(value.shape[3]))


def is_narrow(value):
    return np.dtype(value.dtype).itemsize == 2


def count_segments(chunk: int, time: int, resets):
    """Segment numbers [B, n C]: for each token, the number of resets (resets [B,T] bools) up to it. Padded to whole
    chunks."""
    segments = jnp.cumsum(resets, axis=1, dtype=jnp.int32)
    return jnp.pad(segments, [(0, 0), (0, -time % chunk)], mode="edge")


class Left(NamedTuple):
    """The factors by which decays and resets reduce the state inside a chunk.

    enter [B,Hv,n C]: from the chunk's start to each token. leave [B,Hv,n C]: from each token to the chunk's end. total
    [B,Hv,n], or [B,Hv,n,K] with a decay per channel: over the whole chunk. None means 1. With a decay per channel,
    enter and leave are None too: the queries and keys are multiplied by them already.
    """

    enter: jax.Array | None = None
    leave: jax.Array | None = None
    total: jax.Array | None = None


class Call:
    """The arrays and sizes of one call. Its methods build and run the launches."""

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
        self.precision = "tf32" if self.narrow else "tf32x3"
        self._run = run

    # The number of programs per head, if a program takes `columns` columns at a time.

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
        """The Launch of `kernel`. The kernel gets those of the call's constants that are among its parameters, and
        `constants`, which take precedence."""
        width = largest_width(self.key, self.value)
        tile = self.settings.tile or choose(kernel.__name__, self.settings.capability, width, self.narrow)
        known = dict(
            HEADS=self.heads,
            K_HEADS=self.key.shape[2],
            K=self.key_width,
            V=self.width,
            DELTA=self.settings.delta,
            HAS_BETA=self.beta is not None,
            PRECISION=self.precision,
            SOLVE_PRECISION=self.precision,
            C=self.chunk,
            LEVELS=self.chunk.bit_length() - 1,
            BLOCK_K=block_width(self.key_width),
            KEYS=min(tile.columns, block_width(self.key_width)),
            VALUES=min(tile.columns, block_width(self.width)),
        )
        known = {name: known[name] for name in kernel.arg_names if name in known}
        return Launch(
            kernel,
            # A kernel takes an array in every place of its list. It does not read that of an absent argument.
            tuple(self.key if x is None else x for x in arrays),
            outputs,
            (self.time, *scalars),
            self.batch * self.heads * programs(tile.columns),
            known | constants,
            tile.warps,
            tile.stages,
        )

    def tall(self, width, dtype=None):
        """The Output [B,T,Hv,width]."""
        return Output((self.batch, self.time, self.heads, width), dtype or self.dtype)

    def numbers(self, present=True):
        """The Output [B,Hv,n C] float32; one element if it is not needed."""
        return Output((self.batch, self.heads, self.length) if present else (1,), jnp.float32)

    def squares(self, present=True, dtype=None):
        """The Output [B,Hv,n,C,C]; one element if it is not needed."""
        square = (self.batch, self.heads, self.chunks, self.chunk, self.chunk)
        return Output(square if present else (1,), dtype or self.dtype)

    def states(self):
        return Output((self.batch, self.heads, self.chunks, self.key_width, self.width), self.dtype)

    def advance(self, decay, keys, u, w, left: Left, state):
        """(states that enter the chunks, written values V', final state). keys is [B,T,·,K]; `decay` is DECAY of
        states.py."""
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
        """The cotangents of (the states that leave the chunks, the written values, the initial state). `dwritten` is
        the part of the written values' cotangent that comes from the reads of their own chunk."""
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
        """[B,T,Hv,K] -> [B,T,H,K] in the keys' dtype: sums over the value heads that share a key head."""
        return x.reshape(*x.shape[:2], self.key.shape[2], -1, x.shape[3]).sum(axis=3).astype(self.key.dtype)

    def like_arguments(self, dq, dk, dvalue, dbeta, dlog_decay, dinitial, beta, state):
        """The six gradients in the order, shapes and dtypes of the arguments: dq, dk [B,T,Hv,K], dbeta [B,Hv,n C]."""
        dbeta = None if beta is None else self.tokens(dbeta).astype(beta.dtype)
        return self.sum_heads(dq), self.sum_heads(dk), dvalue, dbeta, dlog_decay, dinitial.astype(state.dtype)

    def tokens(self, x):
        """[B,Hv,n C] -> [B,T,Hv]."""
        return jnp.moveaxis(x, 1, 2)[:, : self.time]
