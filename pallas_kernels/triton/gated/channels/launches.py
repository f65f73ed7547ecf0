"""The kernel launches of the gated ops with a decay per channel (log_decay [B,T,Hv,K]).

    S ← Diag(e^{g_t}) S,      then as in api.py

Forward: the pairs, reads and writes of the chunks (pairs.py), invert the triangular systems (delta rule only), pass the
state through the chunks, read. With the plan "walk" the last two are one launch (walk.py). Backward: the first three
again, the cotangent of V' through its own chunk's output, pass the state's cotangent back through the chunks, the
gradients of the outputs of pairs.py, and from those all other gradients. While the backward pass runs, it holds, per
value head, 2 n K V numbers for states and their cotangents, seven arrays of T K numbers and five of T C. The forward
pass holds n K V, four and two; the walk none, three and four.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np

from pallas_kernels.triton.gated.call import Call, Left, count_segments
from pallas_kernels.triton.gated.channels.pair_gradients import gated_channel_pair_gradients
from pallas_kernels.triton.gated.channels.pairs import gated_channel_pairs
from pallas_kernels.triton.gated.channels.reads import (
    gated_channel_read,
    gated_channel_read_gradients,
    gated_channel_read_values,
)
from pallas_kernels.triton.gated.channels.systems import gated_channel_solve, gated_channel_solve_gradients
from pallas_kernels.triton.gated.channels.walk import gated_channel_invert, gated_channel_walk
from pallas_kernels.triton.gated.walk.form import Form
from pallas_kernels.triton.launch import Output


@functools.cache
def gates_to_border(chunk: int, narrow: bool):
    """[levels, C, C]: entry [level, l, i] is 1 if gate l lies between token i and the border between token i's block of
    2^level tokens and the neighbouring block.

    It is an argument of the kernel, because computing it there would take a third of the kernel's instructions.
    """
    token = np.arange(chunk)
    found = []
    for level in range(chunk.bit_length() - 1):
        block = token >> level
        second = (block & 1 == 1)[:, None]
        inside = block[:, None] == block[None, :]
        found.append(inside & (second == (token[None, :] >= token[:, None])))
    return np.stack(found).astype(jnp.bfloat16 if narrow else np.float32)


class _Call(Call):
    """The launches of one call."""

    def __init__(self, settings, run, query, key, value, beta, log_decay, resets):
        super().__init__(settings, run, query, key, value, beta)
        self.g = log_decay.astype(jnp.float32)
        self.segments = None if resets is None else count_segments(self.chunk, self.time, resets)

    @property
    def totals(self):
        return Output((self.batch, self.heads, self.chunks, self.key_width), jnp.float32)

    def keys(self, present=True):
        return self.tall(self.key_width) if present else Output((1,), self.dtype)

    def pairs(self):
        """(kk, qk, k_reads, q_reads, writes, total) of pairs.py. Without the delta rule, kk and k_reads are unused."""
        delta = self.settings.delta
        return self.run(
            gated_channel_pairs,
            (self.query, self.key, self.g, self.segments),
            (
                self.squares(delta, jnp.float32),
                self.squares(),
                self.keys(delta),
                self.keys(),
                self.keys(),
                self.totals,
            ),
            (),
            HAS_SEGMENTS=self.segments is not None,
        )

    def solve_systems(self, kk, k_reads, store_inverse):
        """(w, u, inverses) of `gated_channel_solve`."""
        return self.run(
            gated_channel_solve,
            (kk, k_reads, self.value, self.beta),
            (self.keys(), self.tall(self.width), self.squares(store_inverse)),
            (),
            STORE_INVERSE=store_inverse,
        )

    def walk(self, kk, qk, k_reads, q_reads, writes, total, state):
        """(out, final state) by a walk through the chunks (walk.py)."""
        inverse = None
        if self.settings.delta:
            inverse = self.run(gated_channel_invert, (kk, self.beta), (self.squares(),), ())[0]
        form = Form(
            *(self.heads, self.heads, self.key_width, self.width, self.settings.delta, self.precision),
            *(True, self.segments is not None, self.beta is not None),
        )
        return self.run(
            gated_channel_walk,
            (qk, q_reads, k_reads, writes, self.value, inverse, self.beta, total, state.astype(jnp.float32)),
            (self.tall(self.width), Output(state.shape, jnp.float32)),
            (self.scale,),
            self.each_part_of_values,
            FORM=form,
        )

    def read(self, qk, q_reads, written, states):
        arrays = (qk, q_reads, written, states)
        return self.run(gated_channel_read, arrays, (self.tall(self.width),), (self.scale,))[0]

    def read_values(self, qk, dout):
        return self.run(gated_channel_read_values, (qk, dout), (self.tall(self.width),), (self.scale,))[0]

    def read_gradients(self, written, dout, states, dstates):
        """(dqk, dq_reads, dwrites, dtotal)."""
        return self.run(
            gated_channel_read_gradients,
            (written, dout, states, dstates),
            (self.squares(), self.keys(), self.keys(), self.totals),
            (self.scale,),
        )

    def solve_gradients(self, kk, k_reads, written, dwritten, inverse, states):
        """(dkk, dk_reads, dv, dbeta)."""
        return self.run(
            gated_channel_solve_gradients,
            (kk, k_reads, self.value, written, dwritten, inverse, states, self.beta),
            (self.squares(), self.keys(), self.tall(self.width), self.numbers()),
            (),
        )

    def pair_gradients(self, dkk, dqk, dk_reads, dq_reads, dwrites, dtotal):
        """(dq, dk, dg), each for each value head."""
        alone = self.heads == self.key.shape[2]
        keys = self.tall(self.key_width, self.dtype if alone else jnp.float32)
        return self.run(
            gated_channel_pair_gradients,
            (
                *(self.query, self.key, self.g, self.segments, gates_to_border(self.chunk, self.narrow)),
                *(dkk, dqk, dk_reads, dq_reads, dwrites, dtotal),
            ),
            (keys, keys, self.tall(self.key_width, jnp.float32)),
            (),
            self.each_part_of_keys_of_a_chunk,
            HAS_SEGMENTS=self.segments is not None,
        )


def forward(settings, run, query, key, value, beta, log_decay, state, resets):
    """(out, final state). The arguments are those of `forward` in api.py."""
    call = _Call(settings, run, query, key, value, beta, log_decay, resets)
    kk, qk, k_reads, q_reads, writes, total = call.pairs()
    if settings.plan_of(key, value) == "walk":
        return tuple(call.walk(kk, qk, k_reads, q_reads, writes, total, state))
    w, u = None, value
    if settings.delta:
        w, u, _ = call.solve_systems(kk, k_reads, False)
    states, written, final = call.advance("channel", writes, u, w, Left(total=total), state)
    return call.read(qk, q_reads, written, states), final


def backward(settings, run, residuals, dout, dstate):
    """The six gradients. The arguments are those of `backward` in api.py."""
    query, key, value, beta, log_decay, state, resets = residuals
    call = _Call(settings, run, query, key, value, beta, log_decay, resets)
    kk, qk, k_reads, q_reads, writes, total = call.pairs()
    w, u, inverse = None, value, None
    if settings.delta:
        w, u, inverse = call.solve_systems(kk, k_reads, True)
    left = Left(total=total)
    states, written, _ = call.advance("channel", writes, u, w, left, state)
    dout = dout.astype(value.dtype)
    dwritten = call.read_values(qk, dout)
    dstates, dwritten, dinitial = call.retreat("channel", q_reads, writes, w, dout, dwritten, left, dstate)
    dqk, dq_reads, dwrites, dtotal = call.read_gradients(written, dout, states, dstates)
    dkk = dk_reads = dbeta = None
    dvalue = dwritten
    if settings.delta:
        dkk, dk_reads, dvalue, dbeta = call.solve_gradients(kk, k_reads, written, dwritten, inverse, states)
    dq, dk, dg = call.pair_gradients(dkk, dqk, dk_reads, dq_reads, dwrites, dtotal)
    return call.like_arguments(dq, dk, dvalue, dbeta, dg.astype(log_decay.dtype), dinitial, beta, state)
