"""The gated delta rule and gated linear attention on a TPU: one kernel forward, one backward; what a `custom_vjp` of
the ops is made of.

    S ← Diag(e^{g_t}) S,      S ← S + β_t k_t (v_t − Sᵀ k_t)ᵀ  (delta rule)  or  S + k_t v_tᵀ,      o_t = scale · Sᵀ q_t

Letters: B rows, T tokens, H heads of queries and keys, Hv of values, K and V the widths, C rows of a chunk, R = n C of
a group of chunks. The grid is B Hv heads, in parallel, by T/R groups, in order; the state stays in VMEM.

Memory: kept for the backward are the arguments and the states that enter the groups, T/R · K V float32 numbers a head
of values (as many as a [T, K] array has, times V/R); states inside a group are made again in VMEM. Gradients of keys
and queries are float32 and of every head of values where several share a head of keys.

Precision: the state and all sums are float32, and systems are solved in float32. Products take bfloat16 operands where
the inputs are bfloat16 (what is written, and the states, are rounded to it for products), else float32 ones, six passes
of the matrix unit.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.tpu import calls, limits
from pallas_kernels.tpu.gated.backward import backward_kernel
from pallas_kernels.tpu.gated.forward import Plan, forward_kernel
from pallas_kernels.tpu.matrix_unit import TILE
from pallas_kernels.transform import transformable


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is known while tracing: the read's scale, the delta rule or not.

    `chunk`, `chunks`: rows of a chunk, a power of two of at least 32, and chunks of a group; 0: chosen. `interpret`:
    goes to pallas_call.
    """

    scale: float
    delta: bool
    chunk: int = 0
    chunks: int = 0
    interpret: object = False


def lacks(settings: Settings, key, value, log_decay) -> str | None:
    """Why these kernels cannot do this call, or None."""
    return limits.lacks(key, value)


def forward(settings: Settings, query, key, value, beta, log_decay, state, resets):
    """(out [B,T,Hv,V] in value's dtype, final state [B,Hv,K,V] float32; residuals for `backward`).

    query, key [B,T,H,K], value [B,T,Hv,V], beta [B,T,Hv] or None, log_decay [B,T,Hv], [B,T,Hv,K] or None, state
    [B,Hv,K,V], resets [B,T] booleans or None: before a reset the state is emptied. Padding must be 0 in all of them.
    Under vmap the batch is folded.

    Raises NotImplementedError under jvp (the op's custom_vjp goes round it), and for what `lacks` says.
    """
    reason = lacks(settings, key, value, log_decay)
    if reason:
        raise NotImplementedError(reason)
    arrays = (query, key, value, beta, log_decay, state, resets)
    function = functools.partial(_forward, settings)
    function = transformable(function, "the Pallas forward of the gated ops", "'recurrent'")
    out, final, states = function(*arrays)
    return out, final, (arrays, states)


def backward(settings: Settings, residuals, dout, dstate):
    """The gradients (dquery, dkey, dvalue, dbeta, dlog_decay, dstate), each in its argument's shape and dtype.

    For the cotangents of `forward`'s out and final state; None where the argument was None.
    """
    function = functools.partial(_backward, settings)
    function = transformable(function, "the Pallas backward of the gated ops", "'recurrent'")
    return function(residuals, dout, dstate)


class _Layout:
    """The sizes of one call, and the ways between the op's arrays and the kernels'."""

    def __init__(self, settings, query, key, value, beta, log_decay, resets):
        self.batch, self.time, self.heads, self.value_width = value.shape
        self.key_heads, self.width = key.shape[2:]
        self.group = self.heads // self.key_heads
        channels = log_decay is not None and log_decay.ndim == 4
        self.chunk = settings.chunk or chunk_rows(channels)
        self.chunks = settings.chunks or chunks_of_a_group(self.chunk, self.time)
        self.rows = self.chunk * self.chunks
        self.steps = -(-self.time // self.rows)
        self.length = self.steps * self.rows
        self.plan = Plan(
            settings.scale, settings.delta, channels, self.chunk, self.chunks, jnp.dtype(key.dtype)
        )  # fmt: skip
        self.interpret = settings.interpret
        self.local = None
        if resets is not None:
            resets = jnp.pad(resets, [(0, 0), (0, self.length - self.time)]).reshape(self.batch, -1, self.chunk)
            self.local = jnp.cumsum(resets, axis=-1, dtype=jnp.int32).reshape(self.batch, 1, self.length)

    def tall(self, x):
        """[B,T,heads,W] -> [B heads, T', W]."""
        x = jnp.pad(x, [(0, 0), (0, self.length - self.time), (0, 0), (0, 0)])
        return jnp.swapaxes(x, 1, 2).reshape(-1, self.length, x.shape[3])

    def back(self, x):
        """[B heads, T', W] -> [B,T,heads,W]."""
        return jnp.swapaxes(x.reshape(self.batch, -1, *x.shape[1:]), 1, 2)[:, : self.time]

    def row(self, x):
        """[B,T,heads] -> [B heads, 1, T']."""
        return jnp.swapaxes(self.tall(x[..., None]), 1, 2)

    def across(self, state):
        """[B,Hv,K,V] -> [B Hv, V, K] float32, or back."""
        return jnp.swapaxes(state.astype(jnp.float32).reshape(-1, *state.shape[-2:]), 1, 2)

    def inputs(self, query, key, value, beta, log_decay, at):
        """Of both kernels; `at`: the group of a step."""
        wide = lambda x, of=lambda h: h: calls.Input(
            self.tall(x), (1, self.rows, x.shape[3]), lambda h, s, _: (of(h), at(s), 0)
        )
        row = lambda x, of=lambda h: h: calls.Input(x, (1, 1, self.rows), lambda h, s, _: (of(h), 0, at(s)))
        # No `//`: of traced numbers it asks the device for its kind, and a program may be lowered with none at hand.
        of_keys, of_batch = lambda h: lax.div(h, self.group), lambda h: lax.div(h, self.heads)
        g = None if log_decay is None else log_decay.astype(jnp.float32)
        return {
            "k": wide(key, of_keys),
            "q": wide(query, of_keys),
            "v": wide(value),
            "beta": None if beta is None or not self.plan.delta else row(self.row(beta.astype(jnp.float32))),
            "g": None if g is None else wide(g) if self.plan.channels else row(self.row(g)),
            "local": None if self.local is None else row(self.local, of_batch),
        }

    def state(self, array=None):
        """A state of each head, as an input where there is an array."""
        block, index = (1, self.value_width, self.width), lambda h, s, _: (h, 0, 0)
        if array is not None:
            return calls.Input(self.across(array), block, index)
        return calls.Output((self.batch * self.heads, *block[1:]), jnp.float32, block, index)

    def output(self, width, dtype, at):
        shape = (self.batch * self.heads, self.length, width)
        return calls.Output(shape, dtype, (1, self.rows, width), lambda h, s, _: (h, at(s), 0))

    def output_row(self, at):
        shape = (self.batch * self.heads, 1, self.length)
        return calls.Output(shape, jnp.float32, (1, 1, self.rows), lambda h, s, _: (h, 0, at(s)))

    def call(self, kernel, name, inputs, outputs, scratch):
        return calls.call(
            functools.partial(kernel, plan=self.plan),
            name,
            (self.batch * self.heads, self.steps),
            # Nothing has to be known before a step: one number that nobody reads.
            jnp.zeros(1, jnp.int32),
            inputs,
            outputs,
            {scratch: pltpu.VMEM((self.value_width, self.width), jnp.float32)},
            vmem_bytes=limits.VMEM_BYTES,
            interpret=self.interpret,
        )


def chunk_rows(channels: bool) -> int:
    """Rows of a chunk. By the static schedules for v5e at width 128 in bfloat16, four chunks of 128 rows take 2 % more
    forward and 10 % less backward than eight of 64 with one decay a head, with one a channel 6 % and 10 % more."""
    return 64 if channels else 128


def chunks_of_a_group(chunk: int, time: int) -> int:
    """4 chunks, fewer where there are no more: 10 % less a token than with 2 on v5e, 20 % on v6e. Rows of a group that
    is not the only one are whole lanes."""
    rows = min(4 * chunk, -(-time // TILE) * TILE)
    return max(rows // chunk, 1)


# Jitted, so that a call whose shapes were seen before is not traced again, on whatever platform it runs.
@functools.partial(jax.jit, static_argnums=0)
def _forward(settings, query, key, value, beta, log_decay, state, resets):
    layout = _Layout(settings, query, key, value, beta, log_decay, resets)
    at = lambda s: s
    block = (layout.value_width, layout.width)
    heads = layout.batch * layout.heads
    results = layout.call(
        forward_kernel,
        "gated_forward",
        layout.inputs(query, key, value, beta, log_decay, at) | {"initial": layout.state(state)},
        {
            "out": layout.output(layout.value_width, value.dtype, at),
            "states": calls.Output(
                (heads, layout.steps, *block), jnp.float32, (1, 1, *block), lambda h, s, _: (h, s, 0, 0)
            ),
            "final": layout.state(),
        },
        "state",
    )
    final = layout.across(results["final"]).reshape(state.shape)
    # Everything kept leads with the batch, so that vmap can fold it.
    states = results["states"].reshape(layout.batch, layout.heads, layout.steps, *block)
    return layout.back(results["out"]), final, states


@functools.partial(jax.jit, static_argnums=0)
def _backward(settings, residuals, dout, dstate):
    (query, key, value, beta, log_decay, state, resets), states = residuals
    layout = _Layout(settings, query, key, value, beta, log_decay, resets)
    at = lambda s: layout.steps - 1 - s
    block = (layout.value_width, layout.width)
    keys = layout.output(layout.width, key.dtype if layout.group == 1 else jnp.float32, at)
    rows = layout.output_row(at)
    results = layout.call(
        backward_kernel,
        "gated_backward",
        layout.inputs(query, key, value, beta, log_decay, at)
        | {
            "dout": calls.Input(layout.tall(dout), (1, layout.rows, layout.value_width), lambda h, s, _: (h, at(s), 0)),
            "states": calls.Input(
                states.reshape(-1, layout.steps, *block), (1, 1, *block), lambda h, s, _: (h, at(s), 0, 0)
            ),
            "dfinal": layout.state(dstate),
        },
        {
            "dq": keys,
            "dk": keys,
            "dv": layout.output(layout.value_width, value.dtype, at),
            "dbeta": None if beta is None or not settings.delta else rows,
            "dg": None
            if log_decay is None
            else layout.output(layout.width, jnp.float32, at)
            if layout.plan.channels
            else rows,
            "dinitial": layout.state(),
        },
        "dstate",
    )

    def of_keys(x):
        x = layout.back(x)
        if layout.group > 1:
            x = x.reshape(*x.shape[:2], layout.key_heads, layout.group, layout.width).sum(axis=3)
        return x.astype(key.dtype)

    gate = lambda x: layout.back(jnp.swapaxes(x, 1, 2))[..., 0]
    dbeta = dlog_decay = None
    if beta is not None:
        dbeta = gate(results["dbeta"]).astype(beta.dtype) if settings.delta else jnp.zeros_like(beta)
    if log_decay is not None:
        dlog_decay = layout.back(results["dg"]) if layout.plan.channels else gate(results["dg"])
        dlog_decay = dlog_decay.astype(log_decay.dtype)
    return (
        of_keys(results["dq"]),
        of_keys(results["dk"]),
        layout.back(results["dv"]),
        dbeta,
        dlog_decay,
        layout.across(results["dinitial"]).reshape(state.shape).astype(state.dtype),
    )
