"""Causal softmax attention, o_t = Σ_{i≤t} softmax_i(scale · q_t·k_i) v_i, by DeltaFormer's read kernels with u = v.

Beside cuDNN's attention these kernels take segment ids without a mask of T² entries, and skip the tiles that lie in
other segments; keys and values may differ in head dimension. Memory: O(T (K+V)) per head.

Letters: B batch rows, T tokens, H query heads, G key/value heads, K and V the head dimensions of keys and values.
Source: Dao et al., arXiv 2205.14135.
"""

from __future__ import annotations

import functools

from pallas_kernels.transform import transformable
from pallas_kernels.triton import launch as launching
from pallas_kernels.triton.delta import api as delta
from pallas_kernels.triton.delta.api import Settings, row_dots, run_launch, sum_heads
from pallas_kernels.triton.delta.launches import read_backward_launch, read_forward_launch

# The implementations of the op that have all derivatives.
_DIFFERENTIABLE = "'parallel' or 'recurrent'"


def settings_of(scale: float, **more) -> Settings:
    """The static arguments of a call whose scores are multiplied by `scale`. `more`: see delta/api.py."""
    softmax = delta.Kappa("softmax", scale)
    return Settings(softmax, softmax, **more)


def lacks(settings: Settings, key, value, window, log_decay, sinks) -> str | None:
    """Why these kernels do not support this call, or None if they do."""
    given = [name for name, x in (("window", window), ("log_decay", log_decay), ("sinks", sinks)) if x is not None]
    return f"its kernels have no {given[0]}" if given else delta.lacks(settings, key, value)


def forward(settings: Settings, query, key, value, log_decay, sinks, segment_ids, run=launching.run):
    """(out [B,T,H,V] in value's dtype, residuals for `backward`). log_decay and sinks are None.

    query [B,T,H,K], key [B,T,G,K], value [B,T,G,V], segment_ids [B,T] int32 or None. All arrays must be 0 at padding
    (id 0). Under vmap the mapped axis is folded into the batch. `run` runs a Launch; tests pass an interpreter.
    """
    function = functools.partial(_forward, settings, run)
    if run is launching.run:
        function = transformable(function, "the Triton forward of softmax attention", _DIFFERENTIABLE)
    out, lse = function(query, key, value, segment_ids)
    return out, ((query, key, value, segment_ids), (out, lse))


def backward(settings: Settings, residuals, dout, run=launching.run):
    """The gradients of forward's arguments (dquery, dkey, dvalue, None, None) for the cotangent of its output."""
    function = functools.partial(_backward, settings, run)
    if run is launching.run:
        function = transformable(function, "the Triton backward of softmax attention", _DIFFERENTIABLE)
    return *function(residuals, dout), None, None


def _forward(settings, run, query, key, value, segment_ids):
    return tuple(run_launch(read_forward_launch(settings, query, key, value, None, segment_ids), run, settings))


def _backward(settings, run, residuals, dout):
    (query, key, value, segment_ids), (out, lse) = residuals
    row_dot = row_dots(dout, out)
    launch = read_backward_launch(settings, query, key, value, None, dout, lse, row_dot, segment_ids)
    dquery, dkey, dvalue = run_launch(launch, run, settings)
    heads = key.shape[2]
    return (
        dquery.astype(query.dtype),
        sum_heads(dkey, heads).astype(key.dtype),
        sum_heads(dvalue, heads).astype(value.dtype),
    )
