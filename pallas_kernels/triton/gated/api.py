"""The gated delta rule and gated linear attention as a few kernel launches: what a `custom_vjp` of the ops is made of.

    S ← e^{g_t} S,      S ← S + β_t k_t (v_t − Sᵀ k_t)ᵀ  (delta rule)  or  S + k_t v_tᵀ,      o_t = scale · Sᵀ q_t

Letters: B rows, T tokens, H heads of queries and keys, Hv of values, K and V the widths, n chunks of C tokens. Forward:
the chunks' triangular systems (delta rule), the state's way through them, what is read. Backward: the first two again,
then what reads give back to what was written, the state's cotangent on its way back, and all gradients. Kept for the
backward are the arguments alone; while it runs there are the states of all chunks, 2 n K V numbers a head of values.

Precision: the state and all sums are float32. Products take the inputs' type where it has two bytes (what is written,
and the states, are rounded to it for products), and three TF32 products for one (7 digits) where it is float32.
Systems are solved with TF32 operands, or three for one.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.transform import transformable
from pallas_kernels.triton import launch as launching
from pallas_kernels.triton.delta.api import DTYPES, WIDEST
from pallas_kernels.triton.gated.call import Call, Settings, count_segments, is_narrow, largest_width
from pallas_kernels.triton.gated.channels.launches import channels_backward, channels_forward
from pallas_kernels.triton.gated.read_gradients import gated_read_gradients
from pallas_kernels.triton.gated.reads import gated_read, gated_read_values
from pallas_kernels.triton.gated.solve import gated_solve
from pallas_kernels.triton.gated.solve_gradients import gated_solve_gradients
from pallas_kernels.triton.gated.states import gated_advance, gated_retreat
from pallas_kernels.triton.gated.table import chunk_rows
from pallas_kernels.triton.launch import Output


def lacks(settings: Settings, key, value, log_decay) -> str | None:
    """Why these kernels cannot do this call, or None."""
    if str(key.dtype) not in DTYPES or key.dtype != value.dtype:
        return f"its kernels take one dtype of {', '.join(DTYPES)}; key is {key.dtype} and value {value.dtype}"
    if max(key.shape[3], value.shape[3]) > WIDEST:
        return f"its kernels take widths up to {WIDEST}; keys have {key.shape[3]} and values {value.shape[3]}"
    try:
        chunk_rows(settings.capability, largest_width(key, value), is_narrow(value))
    except NotImplementedError as error:
        return str(error)
    return None


def forward(settings: Settings, query, key, value, beta, log_decay, state, resets, run=launching.run):
    """(out [B,T,Hv,V] in value's dtype, final state [B,Hv,K,V] float32; residuals for `backward`).

    query, key [B,T,H,K], value [B,T,Hv,V], beta, log_decay [B,T,Hv] or None, state [B,Hv,K,V], resets [B,T] booleans or
    None: before a reset the state is emptied. Padding must be 0 in all of them. Under vmap the batch is folded.

    Raises NotImplementedError under jvp (the op's custom_vjp goes round it), and for what `lacks` says.
    """
    reason = lacks(settings, key, value, log_decay)
    if reason:
        raise NotImplementedError(reason)
    arrays = (query, key, value, beta, log_decay, state, resets)
    function = functools.partial(_forward, settings, run)
    if run is launching.run:
        function = transformable(function, "the Triton forward of the gated ops", "'recurrent'")
    return (*function(*arrays), arrays)


def backward(settings: Settings, residuals, dout, dstate, run=launching.run):
    """The gradients (dquery, dkey, dvalue, dbeta, dlog_decay, dstate), each in its argument's shape and dtype.

    For the cotangents of `forward`'s out and final state; None where the argument was None.
    """
    function = functools.partial(_backward, settings, run)
    if run is launching.run:
        function = transformable(function, "the Triton backward of the gated ops", "'recurrent'")
    return function(residuals, dout, dstate)


def gates(chunk: int, time: int, log_decay, resets):
    """What decays and resets do, chunk by chunk; log_decay [B,T,Hv] or None, resets [B,T] or None.

    (g [B,Hv,n C] or None, the number of resets so far [B,n C] or None, and None or: enter [B,Hv,n C], what is left of
    the entering state at each token; leave [B,Hv,n C], what is left at the chunk's end of what a token writes; total
    [B,Hv,n], what is left there of the state.) Float32; padded to whole chunks, with a decay of 1.
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
        return g, segments, None
    return g, segments, (flat(enter), flat(leave), total)


class _Call(Call):
    """One call's launches. `left`: enter, leave, total of `gates`, for each head of values, or None."""

    def __init__(self, settings, run, query, key, value, beta, log_decay, resets):
        super().__init__(settings, run, query, key, value, beta)
        self.prepare = functools.partial(gates, self.chunk, self.time, resets=resets)
        self.g, self.segments, left = self.prepare(log_decay)
        if left is not None:
            # Resets alone are the same for all heads.
            left = tuple(jnp.broadcast_to(x, (self.batch, self.heads, x.shape[2])) for x in left)
        self.left = left

    @property
    def has(self):
        """What there is of gates, as kernels ask for it."""
        return dict(HAS_DECAY=self.g is not None, HAS_SEGMENTS=self.segments is not None)

    @property
    def gated(self):
        return dict(HAS_GATES=self.left is not None)

    @property
    def around(self):
        return self.left or (None, None, None)

    def solve(self, store_inverse):
        """w, u, and the inverses."""
        return self.run(
            gated_solve,
            (self.key, self.value, self.g, self.segments, self.beta, self.around[0]),
            (
                self.tall(self.key_width),
                self.tall(self.width),
                self.squares(store_inverse),
            ),
            (),
            **self.has,
            **self.gated,
            STORE_INVERSE=store_inverse,
        )

    def advance(self, u, w, state):
        """States that enter the chunks, what is written, the final state."""
        delta = self.settings.delta
        _, leave, total = self.around
        states, written, final = self.run(
            gated_advance,
            (self.key, u, w, leave, total, state),
            (
                self.states(),
                self.tall(self.width) if delta else Output((1,), self.dtype),
                Output(state.shape, jnp.float32),
            ),
            (),
            self.each_part_of_values,
            **self.gated,
        )
        return states, written if delta else self.value, final

    def read(self, written, states):
        return self.run(
            gated_read,
            (self.query, self.key, written, self.g, self.segments, self.around[0], states),
            (self.tall(self.width),),
            (self.scale,),
            **self.has,
            **self.gated,
        )[0]

    def read_values(self, dout):
        return self.run(
            gated_read_values,
            (self.query, self.key, dout, self.g, self.segments),
            (self.tall(self.width),),
            (self.scale,),
            **self.has,
        )[0]

    def retreat(self, w, dout, dwritten, dstate):
        """Cotangents of the states that leave the chunks, of what is written, of the initial state."""
        return self.run(
            gated_retreat,
            (self.query, self.key, w, dout, dwritten, *self.around, dstate),
            (self.states(), self.tall(self.width), Output(dstate.shape, jnp.float32)),
            (self.scale,),
            self.each_part_of_values,
            **self.gated,
        )

    def read_gradients(self, written, dout, states, dstates):
        """dq and dk of each head of values, dg, denter, dleave, dtotal."""
        gated = self.left is not None
        keys = self.tall(self.key_width, jnp.float32)
        enter, leave, _ = self.around
        return self.run(
            gated_read_gradients,
            (self.query, self.key, written, dout, states, dstates, self.g, self.segments, enter, leave),
            (
                keys,
                keys,
                self.numbers(self.g is not None),
                self.numbers(gated),
                self.numbers(gated),
                Output((self.batch, self.heads, self.chunks) if gated else (1,), jnp.float32),
            ),
            (self.scale,),
            **self.has,
            **self.gated,
        )

    def solve_gradients(self, written, dwritten, inverse, states):
        """dk of each head of values, dv, dbeta, dg, denter."""
        return self.run(
            gated_solve_gradients,
            (
                *(self.key, self.value, written, dwritten, inverse, states),
                *(self.g, self.segments, self.beta, self.around[0]),
            ),
            (
                self.tall(self.key_width, jnp.float32),
                self.tall(self.width),
                self.numbers(),
                self.numbers(self.g is not None),
                self.numbers(self.left is not None),
            ),
            (),
            **self.has,
            **self.gated,
        )


def _states(call, state, store_inverse):
    w = inverse = None
    u = call.value
    if call.settings.delta:
        w, u, inverse = call.solve(store_inverse)
    return (*call.advance(u, w, state.astype(jnp.float32)), w, inverse)


def _forward(settings, run, query, key, value, beta, log_decay, state, resets):
    if log_decay is not None and log_decay.ndim == 4:
        return channels_forward(settings, run, query, key, value, beta, log_decay, state, resets)
    call = _Call(settings, run, query, key, value, beta, log_decay, resets)
    states, written, final, _, _ = _states(call, state, False)
    return call.read(written, states), final


def _backward(settings, run, residuals, dout, dstate):
    query, key, value, beta, log_decay, state, resets = residuals
    if log_decay is not None and log_decay.ndim == 4:
        return channels_backward(settings, run, residuals, dout, dstate)
    call = _Call(settings, run, query, key, value, beta, log_decay, resets)
    states, written, _, w, inverse = _states(call, state, True)
    dout = dout.astype(value.dtype)
    dstates, dwritten, dinitial = call.retreat(w, dout, call.read_values(dout), dstate.astype(jnp.float32))
    dq, dk, dg, denter, dleave, dtotal = call.read_gradients(written, dout, states, dstates)
    tokens = lambda x: jnp.moveaxis(x, 1, 2)[:, : call.time]
    dvalue, dbeta = dwritten, None
    if settings.delta:
        dk_solve, dvalue, dbeta, dg_solve, denter_solve = call.solve_gradients(written, dwritten, inverse, states)
        dk, dg, denter = dk + dk_solve, dg + dg_solve, denter + denter_solve
    dlog_decay = None
    if log_decay is not None:

        def decays(log_decay):
            g, _, left = call.prepare(log_decay)
            return g, left

        dlog_decay = jax.vjp(decays, log_decay)[1]((dg, (denter, dleave, dtotal)))[0]
    sum_heads = lambda x: x.reshape(*x.shape[:2], key.shape[2], -1, x.shape[3]).sum(axis=3).astype(key.dtype)
    return (
        sum_heads(dq),
        sum_heads(dk),
        dvalue,
        None if beta is None else tokens(dbeta).astype(beta.dtype),
        dlog_decay,
        dinitial.astype(state.dtype),
    )
