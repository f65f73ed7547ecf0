"""Causal softmax attention, o_t = Σ_{i≤t} softmax_i(scale · q_t·k_i) v_i, by DeltaFormer's read kernels with u = v.

Beside cuDNN's attention these kernels take segment ids without a mask of T² entries, and skip the tiles that lie in
other segments; keys and values may differ in head dimension. Memory: O(T (K+V)) per head.

Letters: B batch rows, T tokens, H query heads, G key/value heads, K and V the head dimensions of keys and values.
Source: Dao et al., arXiv 2205.14135.
"""

from __future__ import annotations

import dataclasses
import functools

from pallas_kernels.transform import transformable
from pallas_kernels.triton import launch as launching
from pallas_kernels.triton.delta.api import Kappa, row_dots, sum_heads
from pallas_kernels.triton.delta.launches import read_backward_launch, read_forward_launch, tile_of
from pallas_kernels.triton.delta.table import Tile
from pallas_kernels.triton.limits import unsupported

# The implementations of the op that have all derivatives.
_DIFFERENTIABLE = "'parallel' or 'recurrent'"


@dataclasses.dataclass(frozen=True)
class Settings:
    """The static arguments of a call: the scale of the scores, and what delta/api.py's Settings say of the last two."""

    scale: float
    compute_capability: int | None = None
    tiles: tuple[tuple[str, Tile], ...] = ()

    # What the launches of a read ask for.
    tied = False

    @property
    def read(self) -> Kappa:
        return Kappa("softmax", self.scale)


def lacks(settings: Settings, key, value, window, log_decay, sinks) -> str | None:
    """Why these kernels do not support this call, or None if they do."""
    if reason := unsupported(key, value):
        return reason
    given = [name for name, x in (("window", window), ("log_decay", log_decay), ("sinks", sinks)) if x is not None]
    if given:
        return f"its kernels have no {given[0]}"
    try:
        for name in ("read_forward", "read_backward"):
            tile_of(settings, name, key, value)
    except NotImplementedError as error:
        return str(error)
    return None


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


def _run(launch, run, settings):
    return run(launch) if run is not launching.run else run(launch, settings.compute_capability)


def _forward(settings, run, query, key, value, segment_ids):
    return tuple(_run(read_forward_launch(settings, query, key, value, None, segment_ids), run, settings))


def _backward(settings, run, residuals, dout):
    (query, key, value, segment_ids), (out, lse) = residuals
    row_dot = row_dots(dout, out)
    launch = read_backward_launch(settings, query, key, value, None, dout, lse, row_dot, segment_ids)
    dquery, dkey, dvalue = _run(launch, run, settings)
    heads = key.shape[2]
    return (
        dquery.astype(query.dtype),
        sum_heads(dkey, heads).astype(key.dtype),
        sum_heads(dvalue, heads).astype(value.dtype),
    )
