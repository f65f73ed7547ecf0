"""The forward and backward pass of the gated ops as a few kernel launches, for the ops' `custom_vjp`.

    S ← e^{g_t} S,      S ← S + β_t k_t (v_t − Sᵀ k_t)ᵀ  (delta rule)  or  S + k_t v_tᵀ,      o_t = scale · Sᵀ q_t

Letters: B batch rows, T tokens, H query and key heads, Hv value heads, K and V the head dimensions of keys and values,
n chunks of C tokens.

Forward launches: invert the chunks' triangular systems (delta rule only); pass the state through the chunks; read.
Backward launches: the first two again; the gradient of the written values by the reads of their own chunk; pass the
state's cotangent back through the chunks; all other gradients. The residuals are the arguments only. While the backward
pass runs, it holds the states of all chunks and their cotangents: 2 n K V numbers per value head.

Precision: the state and all sums are float32. For two-byte inputs, products take operands of the inputs' dtype; written
values and states are rounded to it for products. For float32 inputs, three TF32 products take the place of one (7
digits). Triangular systems are solved with one TF32 product for two-byte inputs, and with three for float32.
"""

from __future__ import annotations

import functools

from pallas_kernels.transform import transformable
from pallas_kernels.triton import launch as launching
from pallas_kernels.triton.gated.call import Settings, is_narrow, largest_width
from pallas_kernels.triton.gated.channels import launches as channels
from pallas_kernels.triton.gated.heads import launches as heads
from pallas_kernels.triton.gated.table import chunk_rows, has_plan
from pallas_kernels.triton.gated.walk import launches as walk
from pallas_kernels.triton.limits import unsupported


def lacks(settings: Settings, key, value, log_decay) -> str | None:
    """Why these kernels do not support this call, or None if they do."""
    if reason := unsupported(key, value):
        return reason
    try:
        chunk_rows(settings.capability, largest_width(key, value), is_narrow(value))
    except NotImplementedError as error:
        return str(error)
    if settings.plan and not settings.tile and not has_plan(settings.plan, largest_width(key, value), is_narrow(value)):
        return f"the plan {settings.plan!r} has tiles for two-byte dtypes and head dimensions up to 128"
    return None


def forward(settings: Settings, query, key, value, beta, log_decay, state, resets, run=launching.run):
    """(out [B,T,Hv,V] in value's dtype, final state [B,Hv,K,V] float32, residuals for `backward`).

    The residuals are the pair (the arguments, what the kernels made); here the second is empty.

    query, key [B,T,H,K], value [B,T,Hv,V], beta [B,T,Hv] or None, log_decay [B,T,Hv], [B,T,Hv,K] or None, state
    [B,Hv,K,V], resets [B,T] bools or None; the state is set to 0 before each token with a reset. All arrays must be 0
    at padding. Under vmap the mapped axis is folded into the batch. `run` runs a Launch; tests pass an interpreter.

    Raises NotImplementedError for a call that `lacks` rejects, and under jvp (the op's custom_vjp avoids jvp).
    """
    reason = lacks(settings, key, value, log_decay)
    if reason:
        raise NotImplementedError(reason)
    arrays = (query, key, value, beta, log_decay, state, resets)
    function = functools.partial(_forward, settings, run)
    if run is launching.run:
        function = transformable(function, "the Triton forward of the gated ops", "'recurrent'")
    return (*function(*arrays), (arrays, ()))


def backward(settings: Settings, residuals, dout, dstate, run=launching.run):
    """The gradients (dquery, dkey, dvalue, dbeta, dlog_decay, dstate) for the cotangents of `forward`'s out and final
    state. Each has the shape and dtype of its argument, and is None if the argument was None.
    """
    function = functools.partial(_backward, settings, run)
    if run is launching.run:
        function = transformable(function, "the Triton backward of the gated ops", "'recurrent'")
    arrays, _ = residuals
    return function(arrays, dout, dstate)


def _launches(settings, key, value, log_decay):
    """The module of launches for a decay of this shape: per channel, or per head (or none)."""
    channel = log_decay is not None and log_decay.ndim == 4
    if channel:
        return channels
    return {"stages": heads, "walk": walk}[settings.plan_of(key, value)]


def _forward(settings, run, query, key, value, beta, log_decay, state, resets):
    return _launches(settings, key, value, log_decay).forward(
        settings, run, query, key, value, beta, log_decay, state, resets
    )


def _backward(settings, run, arrays, dout, dstate):
    _, key, value, _, log_decay, _, _ = arrays
    return _launches(settings, key, value, log_decay).backward(settings, run, arrays, dout, dstate)
