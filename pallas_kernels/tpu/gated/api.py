"""The gated delta rule and gated linear attention on a TPU: one kernel forward, one backward; what a `custom_vjp` of
the ops is made of.

    S ← Diag(e^{g_t}) S,      S ← S + β_t k_t (v_t − Sᵀ k_t)ᵀ  (delta rule)  or  S + k_t v_tᵀ,      o_t = scale · Sᵀ q_t

Letters: B rows, T tokens, H heads of queries and keys, Hv of values, K and V the widths, C rows of a chunk, R = n C of
a group of chunks. The grid is B Hv heads, side by side, by T/R groups, in order; the state stays in VMEM.

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

from pallas_kernels.tpu import calls, limits
from pallas_kernels.tpu.gated.backward import backward_kernel
from pallas_kernels.tpu.gated.forward import forward_kernel
from pallas_kernels.tpu.gated.layout import Layout
from pallas_kernels.tpu.layout import Blocks
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


# Jitted, so that a call whose shapes were seen before is not traced again, on whatever platform it runs.
@functools.partial(jax.jit, static_argnums=0)
def _forward(settings, query, key, value, beta, log_decay, state, resets):
    layout = Layout(settings, key, value, log_decay, resets)
    blocks = Blocks(layout, layout.rows)
    state_shape, heads = (layout.value_width, layout.width), layout.batch * layout.heads
    results = layout.call(
        forward_kernel,
        "gated_forward",
        layout.inputs(blocks, query, key, value, beta, log_decay) | {"initial": blocks.whole(layout.across(state))},
        {
            "out": blocks.out_tall(layout.value_width, value.dtype),
            "states": calls.Output(
                (heads, layout.steps, *state_shape), jnp.float32, (1, 1, *state_shape), lambda h, s, _: (h, s, 0, 0)
            ),
            "final": layout.out_state(),
        },
        "state",
    )
    final = layout.across(results["final"]).reshape(state.shape)
    # Everything kept leads with the batch, so that vmap can fold it.
    states = results["states"].reshape(layout.batch, layout.heads, layout.steps, *state_shape)
    return layout.back(results["out"]), final, states


@functools.partial(jax.jit, static_argnums=0)
def _backward(settings, residuals, dout, dstate):
    (query, key, value, beta, log_decay, state, resets), states = residuals
    layout = Layout(settings, key, value, log_decay, resets)
    blocks = Blocks(layout, layout.rows, lambda step: layout.steps - 1 - step)
    state_shape = (layout.value_width, layout.width)
    dkeys = blocks.out_tall(layout.width, key.dtype if layout.sharing == 1 else jnp.float32)
    dg = None
    if log_decay is not None:
        dg = blocks.out_tall(layout.width, jnp.float32) if layout.plan.channels else blocks.out_row()
    results = layout.call(
        backward_kernel,
        "gated_backward",
        layout.inputs(blocks, query, key, value, beta, log_decay)
        | {
            "dout": blocks.tall(layout.tall(dout)),
            "states": calls.Input(
                states.reshape(-1, layout.steps, *state_shape),
                (1, 1, *state_shape),
                lambda h, s, _: (h, blocks.at(s), 0, 0),
            ),
            "dfinal": blocks.whole(layout.across(dstate)),
        },
        {
            "dq": dkeys,
            "dk": dkeys,
            "dv": blocks.out_tall(layout.value_width, value.dtype),
            "dbeta": None if beta is None or not settings.delta else blocks.out_row(),
            "dg": dg,
            "dinitial": layout.out_state(),
        },
        "dstate",
    )
    dbeta = dlog_decay = None
    if beta is not None:
        dbeta = layout.row_back(results["dbeta"]).astype(beta.dtype) if settings.delta else jnp.zeros_like(beta)
    if log_decay is not None:
        back = layout.back if layout.plan.channels else layout.row_back
        dlog_decay = back(results["dg"]).astype(log_decay.dtype)
    return (
        layout.sum_sharing(results["dq"]).astype(key.dtype),
        layout.sum_sharing(results["dk"]).astype(key.dtype),
        layout.back(results["dv"]),
        dbeta,
        dlog_decay,
        layout.across(results["dinitial"]).reshape(state.shape).astype(state.dtype),
    )
