"""The forward and backward pass of DeltaFormer as a few kernel launches, for the op's `custom_vjp`.

    u_t = α_t v_t − β_t Σ_{i<t} κ₁(w_t, k_i) u_i,        o_t = Σ_{i≤t} κ₂(q_t, k_i) u_i

Letters: B batch rows, T tokens, H query heads, G key/value heads, Hu heads of the write query (G or H), K and V the
head dimensions of keys and values. Arrays are [B, T, heads, width] and are not copied to another layout.

The forward pass takes one launch for the write and one for the read. In the tied case (one softmax for both), one
launch does both. If the write's similarity is not softmax and the arrays are bfloat16, a launch before the write
inverts its triangular systems (write/invert_blocks.py). The backward pass takes the same launches. Memory: O(T (K+V))
per head.

Precision: sums and intermediate results are float32. The operands of the products depend on the call (form.py):
* softmax, two-byte arrays: two-byte operands; the triangular systems are solved with TF32 operands;
* other similarities, bfloat16 arrays: three bfloat16 products in the place of one (5 digits), with u kept as two
  bfloat16 parts (split_products.py);
* float32 arrays: three TF32 products in the place of one (7 digits).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.transform import transformable
from pallas_kernels.triton import launch as launching
from pallas_kernels.triton.delta.form import operands
from pallas_kernels.triton.delta.launches import (
    invert_blocks_launch,
    read_backward_launch,
    read_forward_launch,
    tile_of,
    write_backward_launch,
    write_forward_launch,
)
from pallas_kernels.triton.delta.similarity import LOG2_E
from pallas_kernels.triton.delta.table import Tile
from pallas_kernels.triton.limits import unsupported

SIMILARITIES = ("linear", "relu", "exp", "softmax", "round")

# The implementations of the op that have all derivatives.
_DIFFERENTIABLE = "'parallel' or 'recurrent'"


@dataclasses.dataclass(frozen=True)
class Kappa:
    """A similarity: its name, the scale of its scores, and for "round" the number of decimals."""

    name: str
    scale: float
    decimals: int = 2

    @property
    def power(self) -> float:
        """10 to the number of decimals."""
        return float(10.0**self.decimals)

    @property
    def score_scale(self):
        """The factor that the kernels multiply q·k by. For softmax it includes log2(e), because the kernels compute e^s
        as a power of two."""
        return np.float32(self.scale * (LOG2_E if self.name == "softmax" else 1))


@dataclasses.dataclass(frozen=True)
class Settings:
    """The static arguments of a call.

    write, read: the similarities; `read` is None if only u is needed. tied: w = q, and the softmax `write` serves both.
    compute_capability: 90 for an H100; None means that of the device, or 90 if there is none. tiles: (kernel name,
    Tile) pairs that replace the table's entries, for tests and for choosing the table.
    """

    write: Kappa
    read: Kappa | None
    tied: bool = False
    compute_capability: int | None = None
    tiles: tuple[tuple[str, Tile], ...] = ()


def lacks(settings: Settings, key, value) -> str | None:
    """Why these kernels do not support this call, or None if they do."""
    if reason := unsupported(key, value):
        return reason
    others = {x.name for x in (settings.write, settings.read) if x is not None} - {"softmax"}
    if str(key.dtype) == "float16" and others:
        return f"its kernels support {others.pop()!r} in bfloat16 and float32 only; float16 needs softmax"
    try:
        for name, kappa in (("write", settings.write), ("read", settings.read)):
            if kappa is not None:
                for direction in ("forward", "backward"):
                    tile_of(settings, f"{name}_{direction}", key, value)
    except NotImplementedError as error:
        return str(error)
    return None


def forward(settings: Settings, query, write_query, key, value, alpha, beta, segment_ids, run=launching.run):
    """(out [B,T,H,V] or None, u [B,T,Hu,V], residuals for `backward`); out and u are in value's dtype. The residuals
    are the pair (the arguments, what the kernels made).

    query [B,T,H,K] (None without a read), write_query [B,T,Hu,K] (None: it is the key, or the query if tied), key
    [B,T,G,K], value [B,T,G,V], alpha, beta [B,T,Hu] or None, segment_ids [B,T] int32 or None. All arrays must be 0 at
    padding (id 0); u is 0 there. Under vmap the mapped axis is folded into the batch. `run` runs a Launch; tests pass
    an interpreter.

    Raises NotImplementedError for a call that `lacks` rejects, and under jvp (the op's custom_vjp avoids jvp).
    """
    reason = lacks(settings, key, value)
    if reason:
        raise NotImplementedError(reason)
    arrays = (query, write_query, key, value, alpha, beta, segment_ids)
    function = functools.partial(_forward, settings, run)
    if run is launching.run:
        function = transformable(function, "the Triton forward of delta attention", _DIFFERENTIABLE)
    out, made = function(*arrays)
    # Only the backward pass of softmax needs the output. Outputs that are residuals too are one array, kept once.
    normalised = settings.read is not None and settings.read.name == "softmax"
    u = made["u"].as_taken("narrow", value.dtype)[0]
    return out, u, (arrays, made | {"out": out if normalised else None})


def backward(settings: Settings, residuals, dout, du, run=launching.run):
    """The gradients (dquery, dwrite_query, dkey, dvalue, dalpha, dbeta) for the cotangents of `forward`'s out and u.

    Each has the shape and dtype of its argument, and is None if the argument was None. If tied, dwrite_query is None.
    """
    if run is not launching.run:
        return _backward(settings, run, residuals, dout, du)
    function = functools.partial(_backward, settings, run)
    return transformable(function, "the Triton backward of delta attention", _DIFFERENTIABLE)(residuals, dout, du)


class _Written(NamedTuple):
    """u in the forms in which the write kernel stored it (form.py, `operands`).

    exact: u in float32, or None if nothing takes it again. operand: u as the products take it, in the arrays' dtype;
    for "pair" its high part; None for "exact". residue: for "pair" the low part, else None.
    """

    exact: jax.Array | None
    operand: jax.Array | None
    residue: jax.Array | None

    def as_taken(self, taken: str, dtype) -> tuple[jax.Array, jax.Array | None]:
        """(operand, residue or None): u for products whose operands are of the kind `taken`, between arrays of
        `dtype`."""
        if taken == "exact":
            return self.exact, None
        if self.residue is not None:
            return self.operand, self.residue if taken == "pair" else None
        if taken == "pair":
            # reduce_precision instead of a cast to bfloat16 and back, which XLA may remove.
            high = lax.reduce_precision(self.exact, exponent_bits=8, mantissa_bits=7)
            return high.astype(jnp.bfloat16), (self.exact - high).astype(jnp.bfloat16)
        return (self.exact.astype(dtype) if self.operand is None else self.operand), None


def run_launch(launch, run, settings):
    """The outputs of a launch by `run`: `launching.run` for the settings' device, or a test's interpreter."""
    return run(launch) if run is not launching.run else run(launch, settings.compute_capability)


def _inverse(settings, run, name, w, key, value, beta, segment_ids):
    """The inverses that a write kernel needs, in two parts; (None, None) if the kernel computes them itself."""
    if operands(settings.write, value.dtype) != "pair":
        return None, None
    return tuple(run_launch(invert_blocks_launch(settings, name, w, key, value, beta, segment_ids), run, settings))


def _forward(settings, run, query, write_query, key, value, alpha, beta, segment_ids):
    if settings.tied:
        write_query = query
    w = key if write_query is None else write_query
    inverse = _inverse(settings, run, "write_forward", w, key, value, beta, segment_ids)
    launch = write_forward_launch(settings, w, key, value, alpha, beta, segment_ids, inverse)
    u, operand, residue, lse_write, _, summary, *tied = run_launch(launch, run, settings)
    softmax = settings.write.name == "softmax"
    taken = operands(settings.write, value.dtype)
    summary = summary if launch.constants["FORM"].has_summary else None
    written = _Written(
        u if launch.constants["FORM"].wide_u else None,
        operand if taken != "exact" else None,
        residue if taken == "pair" else None,
    )
    made = {"u": written, "summary": summary, "lse_write": lse_write if softmax else None}
    if settings.tied:
        out, own_share, past_share = tied
        return out, made | {"own_share": own_share, "past_share": past_share}
    if settings.read is None:
        return None, made
    source = written.as_taken(operands(settings.read, value.dtype), value.dtype)
    out, lse_read = run_launch(read_forward_launch(settings, query, key, *source, segment_ids), run, settings)
    return out, made | {"lse_read": lse_read if settings.read.name == "softmax" else None}


def row_dots(a, b):
    """The dot products of rows: two arrays [B,T,h,V] -> [B,h,T] float32."""
    return jnp.moveaxis(jnp.sum(a.astype(jnp.float32) * b.astype(jnp.float32), axis=3), 2, 1)


def sum_heads(x, heads):
    """[B,T,h,W] -> [B,T,heads,W]: sums over the heads that share a key/value head."""
    if x.shape[2] == heads:
        return x
    return x.reshape(*x.shape[:2], heads, x.shape[2] // heads, x.shape[3]).sum(axis=3)


def _column(row):
    """[B,h,T] -> [B,T,h,1]."""
    return jnp.moveaxis(row, 1, 2)[..., None]


def _backward(settings, run, residuals, dout, du):
    (query, write_query, key, value, alpha, beta, segment_ids), made = residuals
    written: _Written = made["u"]
    kv_heads = key.shape[2]
    du = du.astype(jnp.float32)
    dquery, dkey_read, tied = None, 0, None
    if settings.tied:
        write_query = query
        own_share, past_share = made["own_share"], made["past_share"]
        wide = dout.astype(jnp.float32)
        summary = made["summary"].astype(jnp.float32)
        read_dot = row_dots(wide, _column(past_share) * summary + _column(own_share) * written.exact)
        du = du + _column(own_share) * wide
        tied = (dout, past_share, read_dot)
    elif settings.read is not None:
        source = written.as_taken(operands(settings.read, value.dtype), value.dtype)
        row_dot = row_dots(dout, made["out"]) if settings.read.name == "softmax" else None
        launch = read_backward_launch(settings, query, key, *source, dout, made["lse_read"], row_dot, segment_ids)
        dquery, dkey_read, du_read = run_launch(launch, run, settings)
        dquery, du = dquery.astype(query.dtype), du + du_read
    w = key if write_query is None else write_query
    source = written.as_taken(operands(settings.write, value.dtype), value.dtype)
    saved = (written.exact, *source, made["summary"], made["lse_write"])
    inverse = _inverse(settings, run, "write_backward", w, key, value, beta, segment_ids)
    launch = write_backward_launch(settings, w, key, value, alpha, beta, segment_ids, inverse, *saved, du, tied)
    dw, dkey, dvalue, dalpha, dbeta, *_ = run_launch(launch, run, settings)
    dw, dkey = dw * settings.write.scale, dkey * settings.write.scale + dkey_read
    if settings.tied:
        # The gradient of the diagonal scores, which the kernel leaves out: dS_ii = π_i (dO_i·u_i − dO_i·o_i).
        own = _column(own_share * (row_dots(wide, written.exact) - read_dot)) * settings.write.scale
        repeated = jnp.repeat(key, w.shape[2] // kv_heads, axis=2)
        dquery = (dw + own * repeated.astype(jnp.float32)).astype(query.dtype)
        dkey, dw = dkey + own * query.astype(jnp.float32), None
    elif write_query is None:
        dkey, dw = dkey + dw, None
    else:
        dw = dw.astype(write_query.dtype)
    gate = lambda gradient, x: None if x is None else jnp.moveaxis(gradient, 1, 2).astype(x.dtype)
    return (
        dquery,
        dw,
        sum_heads(dkey, kv_heads).astype(key.dtype),
        sum_heads(dvalue, kv_heads).astype(value.dtype),
        gate(dalpha, alpha),
        gate(dbeta, beta),
    )
