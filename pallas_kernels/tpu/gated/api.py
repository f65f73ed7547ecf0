"""The forward and backward pass of the gated ops on a TPU, for the ops' `custom_vjp`: one kernel each.

    S ← Diag(e^{g_t}) S,      S ← S + β_t k_t (v_t − Sᵀ k_t)ᵀ  (delta rule)  or  S + k_t v_tᵀ,      o_t = scale · Sᵀ q_t

Letters: B batch rows, T tokens, H query and key heads, Hv value heads, K and V the head dimensions, C rows of a chunk,
n chunks and R = n C rows of a group. The grid is (B Hv heads, T/R groups). Heads are independent; the groups of a head
run in order, and the state stays in VMEM between them.

Memory: the residuals are the arguments and the states that enter the groups, T/R · K V float32 numbers per value head
(V/R times as many as a [T, K] array has). The backward kernel recomputes the states inside a group in VMEM. If several
value heads share a key head, the gradients of queries and keys are first computed for each value head, in float32.

Precision: the state and all sums are float32. Triangular systems are solved as accurately as in float32 for float32
inputs, and to 2^-15 for bfloat16 inputs (`dot_exact`). Other products take bfloat16 operands for bfloat16 inputs, to
which written values and states are rounded. Otherwise they take float32 operands, with six passes of the matrix unit.
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
    """The static arguments of a call.

    scale: of the read. delta: the gated delta rule (True) or gated linear attention. chunk: rows of a chunk, a power of
    two of at least 32. chunks: chunks of a group. For both, 0 means the default. interpret: passed to pallas_call.
    """

    scale: float
    delta: bool
    chunk: int = 0
    chunks: int = 0
    interpret: object = False


def lacks(settings: Settings, key, value, log_decay) -> str | None:
    """Why these kernels do not support this call, or None if they do."""
    return limits.lacks(key, value)


def forward(settings: Settings, query, key, value, beta, log_decay, state, resets):
    """(out [B,T,Hv,V] in value's dtype, final state [B,Hv,K,V] float32, residuals for `backward`).

    The residuals are the pair (the arguments, what the kernels made).

    query, key [B,T,H,K], value [B,T,Hv,V], beta [B,T,Hv] or None, log_decay [B,T,Hv], [B,T,Hv,K] or None, state
    [B,Hv,K,V], resets [B,T] bools or None; the state is set to 0 before each token with a reset. All arrays must be 0
    at padding. Under vmap the mapped axis is folded into the batch.

    Raises NotImplementedError for a call that `lacks` rejects, and under jvp (the op's custom_vjp avoids jvp).
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
    """The gradients (dquery, dkey, dvalue, dbeta, dlog_decay, dstate) for the cotangents of `forward`'s out and final
    state. Each has the shape and dtype of its argument, and is None if the argument was None.
    """
    function = functools.partial(_backward, settings)
    function = transformable(function, "the Pallas backward of the gated ops", "'recurrent'")
    return function(residuals, dout, dstate)


# _forward and _backward are jitted, so that JAX traces each once per shape, whatever the platform.
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
    # The first axis of all residuals must be the batch, so that vmap can fold it.
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
