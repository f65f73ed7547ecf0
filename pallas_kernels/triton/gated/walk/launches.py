"""The kernel launches of the walk: the gated ops without decay, or with one decay per head, in fewer passes.

Forward: the inverses of the triangular systems (delta rule only), the walk. Backward: the inverses again, the states,
the walk back, all gradients. While the backward pass runs, it holds per value head the states of all chunks and their
cotangents, 2 n K V numbers, V' and Y, 2 T V, and the inverses, T C; the forward pass holds the inverses alone. The
outputs too are computed by B × heads × ⌈V / VALUES⌉ programs in parallel, where heads/launches.py has n times as many.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax

from pallas_kernels.triton.gated.heads.launches import HeadsCall
from pallas_kernels.triton.gated.walk.backward import gated_walk_back
from pallas_kernels.triton.gated.walk.form import Form
from pallas_kernels.triton.gated.walk.forward import gated_walk, gated_walk_states
from pallas_kernels.triton.gated.walk.gradients import gated_walk_gradients
from pallas_kernels.triton.gated.walk.inverses import gated_invert
from pallas_kernels.triton.launch import Output


def sums_of_gates(g, chunk: int):
    """[B,Hv,n,2,C] float32: the sums of the gates g [B,Hv,n C] from the chunk's start to each token, as a large and a
    small part whose sum has twice the digits of float32.

    A gate below −10⁴ counts as −10⁴: e^D is 0 for both, and −∞ has no differences.
    """

    def add(a, b):
        # Knuth's sum of two numbers with its rounding error, for numbers of two parts.
        (high, low), (other, rest) = a, b
        total = high + other
        part = total - high
        error = (high - (total - part)) + (other - part) + (low + rest)
        result = total + error
        return result, error - (result - total)

    inside = jnp.maximum(g, -1e4).reshape(*g.shape[:-1], -1, chunk)
    parts = lax.associative_scan(add, (inside, jnp.zeros_like(inside)), axis=3)
    return jnp.stack(parts, axis=3)


class _Call(HeadsCall):
    """The launches of one call."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.sums = None if self.g is None else sums_of_gates(self.g, self.chunk)

    @property
    def form(self):
        return Form(
            self.heads,
            self.key.shape[2],
            self.key_width,
            self.width,
            self.settings.delta,
            self.precision,
            self.g is not None,
            self.segments is not None,
            self.beta is not None,
        )

    @property
    def gates(self):
        return (self.sums, self.segments, self.beta, *self.left)

    def transposed_states(self):
        return Output((self.batch, self.heads, self.chunks, self.width, self.key_width), self.dtype)

    def invert(self):
        """The inverses of all chunks, or None without the delta rule."""
        if not self.settings.delta:
            return None
        arrays = (self.key, self.sums, self.segments, self.beta)
        return self.run(gated_invert, arrays, (self.squares(),), (), FORM=self.form)[0]

    def walk(self, inverse, state):
        """(out, final state)."""
        return self.run(
            gated_walk,
            (self.query, self.key, self.value, inverse, *self.gates, state.astype(jnp.float32)),
            (self.tall(self.width), Output(state.shape, jnp.float32)),
            (self.scale,),
            self.each_part_of_values,
            FORM=self.form,
        )

    def states_of(self, inverse, state):
        """(the states that enter the chunks, the written values V')."""
        delta = self.settings.delta
        states, written = self.run(
            gated_walk_states,
            (self.key, self.value, inverse, *self.gates, state.astype(jnp.float32)),
            (self.transposed_states(), self.tall(self.width) if delta else Output((1,), self.dtype)),
            (),
            self.each_part_of_values,
            FORM=self.form,
        )
        return states, written if delta else self.value

    def walk_back(self, dout, inverse, dstate):
        """(the cotangents of the states that leave the chunks, Y, the cotangent of the initial state)."""
        return self.run(
            gated_walk_back,
            (self.query, self.key, dout, inverse, *self.gates, dstate.astype(jnp.float32)),
            (self.transposed_states(), self.tall(self.width), Output(dstate.shape, jnp.float32)),
            (self.scale,),
            self.each_part_of_values,
            FORM=self.form,
        )

    def gradients(self, dout, written, y, states, dstates):
        """(dq, dk, dv, (dbeta, dg, denter, dleave), dtotal), dq and dk for each value head."""
        delta = self.settings.delta
        alone = self.heads == self.key.shape[2]
        keys = self.tall(self.key_width, self.dtype if alone else jnp.float32)
        numbers = (self.batch, self.heads, self.chunks, 4, self.chunk)
        dq, dk, dv, dtokens, dtotal = self.run(
            gated_walk_gradients,
            (self.query, self.key, self.value, dout, written, y, states, dstates, *self.gates[:-1]),
            (
                *(keys, keys, self.tall(self.width) if delta else Output((1,), self.dtype)),
                Output(numbers if delta or self.gated else (1,), jnp.float32),
                Output((self.batch, self.heads, self.chunks) if self.gated else (1,), jnp.float32),
            ),
            (self.scale,),
            FORM=self.form,
        )
        each = (None,) * 4
        if dtokens.ndim > 1:
            each = [dtokens[:, :, :, i].reshape(self.batch, self.heads, self.length) for i in range(4)]
        return dq, dk, dv if delta else y, each, dtotal


def forward(settings, run, query, key, value, beta, log_decay, state, resets):
    """(out, final state). The arguments are those of `forward` in api.py."""
    call = _Call(settings, run, query, key, value, beta, log_decay, resets)
    return tuple(call.walk(call.invert(), state))


def backward(settings, run, residuals, dout, dstate):
    """The six gradients. The arguments are those of `backward` in api.py."""
    query, key, value, beta, log_decay, state, resets = residuals
    call = _Call(settings, run, query, key, value, beta, log_decay, resets)
    dout = dout.astype(value.dtype)
    inverse = call.invert()
    states, written = call.states_of(inverse, state)
    dstates, y, dinitial = call.walk_back(dout, inverse, dstate)
    dq, dk, dvalue, (dbeta, dg, denter, dleave), dtotal = call.gradients(dout, written, y, states, dstates)
    dlog_decay = None if log_decay is None else call.decay_gradient(log_decay, dg, denter, dleave, dtotal)
    return call.like_arguments(dq, dk, dvalue, dbeta, dlog_decay, dinitial, beta, state)
