"""The kernel launches of the gated ops without decay, or with one decay per head.

Forward: invert the triangular systems (delta rule only), pass the state through the chunks, read. Backward: the first
two again, the cotangent of V' through its own chunk's output, pass the state's cotangent back through the chunks, all
other gradients.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.triton.gated.call import Call, Left, count_segments
from pallas_kernels.triton.gated.heads.reads import gated_read, gated_read_gradients, gated_read_values
from pallas_kernels.triton.gated.heads.systems import gated_solve, gated_solve_gradients
from pallas_kernels.triton.launch import Output


def gates(chunk: int, time: int, log_decay, resets):
    """(g [B,Hv,n C] or None, segment numbers [B,n C] or None, Left) of log_decay [B,T,Hv] or None, resets [B,T] or
    None.

    g and Left are float32. All are padded to whole chunks; g is 0 there.
    """
    length = -(-time // chunk) * chunk
    blocks = lambda x: x.reshape(*x.shape[:-1], -1, chunk)
    flat = lambda x: x.reshape(*x.shape[:-2], -1)
    g = segments = enter = leave = total = None
    if log_decay is not None:
        g = jnp.moveaxis(log_decay, 2, 1).astype(jnp.float32)
        g = jnp.pad(g, [(0, 0), (0, 0), (0, length - time)])
        inside = blocks(g)
        enter = jnp.exp(jnp.cumsum(inside, axis=-1))
        later = jnp.concatenate([inside[..., 1:], jnp.zeros_like(inside[..., :1])], axis=-1)
        leave = jnp.exp(lax.cumsum(later, axis=3, reverse=True))
        total = enter[..., -1]
    if resets is not None:
        segments = count_segments(chunk, time, resets)
        inside = blocks(segments)[:, None]
        last = inside[..., -1:]
        before = jnp.concatenate([jnp.zeros_like(last[:, :, :1]), last[:, :, :-1]], axis=2)
        seen = [inside == before, inside == last, (before == last)[..., 0]]
        if log_decay is None:
            enter, leave, total = (x.astype(jnp.float32) for x in seen)
        else:
            enter, leave, total = (jnp.where(x, y, 0) for x, y in zip(seen, (enter, leave, total)))
    if enter is None:
        return g, segments, Left()
    return g, segments, Left(flat(enter), flat(leave), total)


class HeadsCall(Call):
    """The launches of one call. `left` is the Left of `gates`, for each value head."""

    def __init__(self, settings, run, query, key, value, beta, log_decay, resets):
        super().__init__(settings, run, query, key, value, beta)
        self.prepare = functools.partial(gates, self.chunk, self.time, resets=resets)
        self.g, self.segments, left = self.prepare(log_decay)
        self.gated = left.total is not None
        self.decay = "head" if self.gated else "none"
        # With resets but no decay, Left has one head for all heads.
        each = lambda x: jnp.broadcast_to(x, (self.batch, self.heads, x.shape[2]))
        self.left = Left(*map(each, left)) if self.gated else left

    @property
    def has(self):
        """The kernels' constants that say which gates are present."""
        return dict(HAS_DECAY=self.g is not None, HAS_SEGMENTS=self.segments is not None)

    def solve_systems(self, store_inverse):
        """(w, u, inverses) of `gated_solve`."""
        return self.run(
            gated_solve,
            (self.key, self.value, self.g, self.segments, self.beta, self.left.enter),
            (self.tall(self.key_width), self.tall(self.width), self.squares(store_inverse)),
            (),
            **self.has,
            STORE_INVERSE=store_inverse,
        )

    def states_of(self, state, store_inverse):
        """(states that enter the chunks, written values V', final state, w, inverses)."""
        w, u, inverse = None, self.value, None
        if self.settings.delta:
            w, u, inverse = self.solve_systems(store_inverse)
        return (*self.advance(self.decay, self.key, u, w, self.left, state), w, inverse)

    def read(self, written, states):
        return self.run(
            gated_read,
            (self.query, self.key, written, self.g, self.segments, self.left.enter, states),
            (self.tall(self.width),),
            (self.scale,),
            **self.has,
        )[0]

    def read_values(self, dout):
        return self.run(
            gated_read_values,
            (self.query, self.key, dout, self.g, self.segments),
            (self.tall(self.width),),
            (self.scale,),
            **self.has,
        )[0]

    def read_gradients(self, written, dout, states, dstates):
        """(dq, dk, dg, denter, dleave, dtotal), dq and dk for each value head."""
        keys = self.tall(self.key_width, jnp.float32)
        enter, leave, _ = self.left
        return self.run(
            gated_read_gradients,
            (self.query, self.key, written, dout, states, dstates, self.g, self.segments, enter, leave),
            (
                keys,
                keys,
                self.numbers(self.g is not None),
                self.numbers(self.gated),
                self.numbers(self.gated),
                Output((self.batch, self.heads, self.chunks) if self.gated else (1,), jnp.float32),
            ),
            (self.scale,),
            **self.has,
        )

    def solve_gradients(self, written, dwritten, inverse, states):
        """(dk, dv, dbeta, dg, denter), dk for each value head."""
        return self.run(
            gated_solve_gradients,
            (
                *(self.key, self.value, written, dwritten, inverse, states),
                *(self.g, self.segments, self.beta, self.left.enter),
            ),
            (
                self.tall(self.key_width, jnp.float32),
                self.tall(self.width),
                self.numbers(),
                self.numbers(self.g is not None),
                self.numbers(self.gated),
            ),
            (),
            **self.has,
        )

    def decay_gradient(self, log_decay, dg, denter, dleave, dtotal):
        """The gradient of log_decay, from the gradients of the results of `gates`."""

        def decays(log_decay):
            g, _, left = self.prepare(log_decay)
            return g, left

        return jax.vjp(decays, log_decay)[1]((dg, Left(denter, dleave, dtotal)))[0]


def forward(settings, run, query, key, value, beta, log_decay, state, resets):
    """(out, final state). The arguments are those of `forward` in api.py."""
    call = HeadsCall(settings, run, query, key, value, beta, log_decay, resets)
    states, written, final, _, _ = call.states_of(state, False)
    return call.read(written, states), final


def backward(settings, run, residuals, dout, dstate):
    """The six gradients. The arguments are those of `backward` in api.py."""
    query, key, value, beta, log_decay, state, resets = residuals
    call = HeadsCall(settings, run, query, key, value, beta, log_decay, resets)
    states, written, _, w, inverse = call.states_of(state, True)
    dout = dout.astype(value.dtype)
    dwritten = call.read_values(dout)
    dstates, dwritten, dinitial = call.retreat(call.decay, query, key, w, dout, dwritten, call.left, dstate)
    dq, dk, dg, denter, dleave, dtotal = call.read_gradients(written, dout, states, dstates)
    dvalue, dbeta = dwritten, None
    if settings.delta:
        dk_solve, dvalue, dbeta, dg_solve, denter_solve = call.solve_gradients(written, dwritten, inverse, states)
        dk, dg, denter = dk + dk_solve, dg + dg_solve, denter + denter_solve
    dlog_decay = None if log_decay is None else call.decay_gradient(log_decay, dg, denter, dleave, dtotal)
    return call.like_arguments(dq, dk, dvalue, dbeta, dlog_decay, dinitial, beta, state)
