"""The forward and backward pass of DeltaFormer on a TPU, for the op's `custom_vjp`: one kernel each.

    u_t = α_t v_t − β_t Σ_{i<t} κ₁(w_t, k_i) u_i,        o_t = Σ_{i≤t} κ₂(q_t, k_i) u_i

Letters: B batch rows, T tokens, H query heads, G key/value heads, Hu heads of the write query (G or H), r = H / Hu
query heads that share one head of u, K and V the head dimensions, C rows of a chunk. The kernels' arrays are
[B Hu, T, width].

Precision: sums, u and intermediate results are float32. Products of queries and keys take operands of the inputs'
dtype. Products with weights take bfloat16 operands if the inputs are bfloat16 and the similarity is softmax; otherwise
float32 operands (six passes of the matrix unit).
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from pallas_kernels.tpu import limits
from pallas_kernels.tpu.delta.backward_call import Cotangents, call_backward
from pallas_kernels.tpu.delta.forward_call import call_forward
from pallas_kernels.tpu.delta.kappa import Kappa
from pallas_kernels.tpu.delta.layout import Layout
from pallas_kernels.transform import transformable

_DIFFERENTIABLE = "'parallel' or 'recurrent'"


@dataclasses.dataclass(frozen=True)
class Settings:
    """The static arguments of a call.

    write, read: the similarities; `read` is None if only u is needed. tied: w = q, and the softmax `write` serves both.
    chunk: rows of a chunk, a multiple of 128; 0 means the default. streamed: whether arrays of all rows stay in HBM;
    None means that they do if they do not fit in VMEM. interpret: passed to pallas_call.
    """

    write: Kappa
    read: Kappa | None
    tied: bool = False
    chunk: int = 0
    streamed: bool | None = None
    interpret: object = False


def lacks(settings: Settings, key, value) -> str | None:
    """Why these kernels do not support this call, or None if they do."""
    return limits.lacks(key, value)


def forward(settings: Settings, query, write_query, key, value, alpha, beta, segment_ids):
    """(out [B,T,H,V] or None, u [B,T,Hu,V], residuals for `backward`); out and u are in value's dtype. The residuals
    are the pair (the arguments, what the kernels made).

    query [B,T,H,K] (None without a read), write_query [B,T,Hu,K] (None: it is the key, or the query if tied), key
    [B,T,G,K], value [B,T,G,V], alpha, beta [B,T,Hu] or None, segment_ids [B,T] int32 or None. All arrays must be 0 at
    padding (id 0). Under vmap the mapped axis is folded into the batch.

    Raises NotImplementedError for a call that `lacks` rejects, and under jvp (the op's custom_vjp avoids jvp).
    """
    reason = lacks(settings, key, value)
    if reason:
        raise NotImplementedError(reason)
    arrays = (query, write_query, key, value, alpha, beta, segment_ids)
    function = functools.partial(_forward, settings)
    out, u, made = transformable(function, "the Pallas forward of delta attention", _DIFFERENTIABLE)(*arrays)
    # Only the backward pass of softmax needs the output.
    normalised = settings.read is not None and settings.read.normalised
    return out, u, (arrays, made | {"out": out if normalised else None})


def backward(settings: Settings, residuals, dout, du):
    """The gradients (dquery, dwrite_query, dkey, dvalue, dalpha, dbeta) for the cotangents of `forward`'s out and u.

    Each has the shape and dtype of its argument, and is None if the argument was None. If tied, dwrite_query is None.
    """
    function = functools.partial(_backward, settings)
    return transformable(function, "the Pallas backward of delta attention", _DIFFERENTIABLE)(residuals, dout, du)


# _forward and _backward are jitted, so that JAX traces each once per shape, whatever the platform.
@functools.partial(jax.jit, static_argnums=0)
def _forward(settings, query, write_query, key, value, alpha, beta, segment_ids):
    layout = Layout(settings, query, write_query, key, value, segment_ids)
    plan = layout.plan
    results = call_forward(settings, layout, query, write_query, key, value, alpha, beta)
    out = layout.unfolded(results["out"]) if plan.reads or plan.tied else None
    # The first axis of all residuals must be the batch, so that vmap can fold it.
    made = {
        name: x.reshape(layout.batch, layout.heads, *x.shape[1:])
        for name, x in results.items()
        if name not in ("out", "u_operand")
    }
    return out, layout.back(results["u"]).astype(value.dtype), made


@functools.partial(jax.jit, static_argnums=0)
def _backward(settings, residuals, dout, du):
    (query, write_query, key, value, alpha, beta, segment_ids), made = residuals
    layout = Layout(settings, query, write_query, key, value, segment_ids)
    plan = layout.plan
    merged = lambda x: x.reshape(-1, *x.shape[2:])
    kept = {name: merged(x) for name, x in made.items() if name != "out"}
    k = layout.tall(key)
    w = layout.tall(query if plan.tied else key if write_query is None else write_query)
    du = layout.tall(du).astype(jnp.float32)
    tied = None
    if plan.tied:
        tied = _TiedRead(layout.tall(dout).astype(jnp.float32), kept["rest"], kept["share"], kept["summary"], kept["u"])
        cotangents = tied.cotangents(du, plan.write_dtype)
    elif plan.reads:
        cotangents = Cotangents(du, layout.folded(dout), _row_dot(layout, dout, made["out"]))
    else:
        cotangents = Cotangents(du)
    results = call_backward(settings, layout, w, query, k, value, alpha, beta, kept, cotangents)
    dk, dw, dq = results["dk"], results["dw"].swapaxes(1, 2) * plan.write.scale, None
    if plan.tied:
        own = tied.own_scores() * plan.write.scale
        dq = layout.back(dw + own * jnp.repeat(k, layout.heads // layout.kv_heads, axis=0).astype(jnp.float32))
        dk, dw = dk + own * w.astype(jnp.float32), None
    elif plan.reads:
        dq = layout.unfolded(results["dq"].swapaxes(2, 3) * plan.read.scale)
    if not plan.tied:
        dk, dw = (dk + dw, None) if write_query is None else (dk, layout.back(dw).astype(write_query.dtype))
    gate = lambda name, x: None if x is None else layout.row_back(results[name]).astype(x.dtype)
    return (
        None if dq is None else dq.astype(query.dtype),
        dw,
        _sum_heads(layout.back(dk), layout.kv_heads).astype(key.dtype),
        _sum_heads(layout.back(results["dv"]), layout.kv_heads).astype(value.dtype),
        gate("dalpha", alpha),
        gate("dbeta", beta),
    )


def _row_dot(layout, dout, out):
    """dO·o of every row, [B Hu,r,T'], if the read is softmax (`out` is kept); else None."""
    if out is None:
        return None
    row_dot = jnp.sum(dout.astype(jnp.float32) * out.astype(jnp.float32), axis=3)
    return layout.folded(row_dot[..., None])[..., 0]


class _TiedRead:
    """The cotangents in the tied case, where the write kernel also computes the read o = (1 − π) s + π u.

    dout, summary (s), u [B Hu,T',V]; rest (1 − π), share (π) [B Hu,1,T'].
    """

    def __init__(self, dout, rest, share, summary, u):
        self.dout, self.rest, self.share, self.u = dout, rest, share, u
        # dO·o
        self.dot = jnp.sum(dout * (_across(rest) * summary.astype(jnp.float32) + _across(share) * u), axis=2)[:, None]

    def cotangents(self, du, dtype) -> Cotangents:
        return Cotangents(
            du + _across(self.share) * self.dout,
            read_share=(_across(self.rest) * self.dout).astype(dtype),
            read_dot=self.rest * self.dot,
        )

    def own_scores(self):
        """The gradient of the diagonal scores, [B Hu,T',1]: dS_ii = π_i (dO_i·u_i − dO_i·o_i)."""
        return _across(self.share * (jnp.sum(self.dout * self.u, axis=2)[:, None] - self.dot))


def _across(x):
    """[N,1,T] -> [N,T,1]."""
    return x.swapaxes(1, 2)


def _sum_heads(x, heads):
    """[B,T,h,W] -> [B,T,heads,W]: sums over the heads that share a key/value head."""
    if x.shape[2] == heads:
        return x
    return x.reshape(*x.shape[:2], heads, x.shape[2] // heads, x.shape[3]).sum(axis=3)
