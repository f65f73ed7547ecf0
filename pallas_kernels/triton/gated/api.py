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

from pallas_kernels.transform import transformable
from pallas_kernels.triton import launch as launching
from pallas_kernels.triton.delta.api import DTYPES, WIDEST
from pallas_kernels.triton.gated.call import Settings, is_narrow, largest_width
from pallas_kernels.triton.gated.channels import launches as channels
from pallas_kernels.triton.gated.heads import launches as heads
from pallas_kernels.triton.gated.table import chunk_rows


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


def _launches(log_decay):
    """What describes the launches for such a decay."""
    return channels if log_decay is not None and log_decay.ndim == 4 else heads


def _forward(settings, run, query, key, value, beta, log_decay, state, resets):
    return _launches(log_decay).forward(settings, run, query, key, value, beta, log_decay, state, resets)


def _backward(settings, run, residuals, dout, dstate):
    log_decay = residuals[4]
    return _launches(log_decay).backward(settings, run, residuals, dout, dstate)
