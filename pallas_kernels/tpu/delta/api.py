"""DeltaFormer on a TPU: one kernel forward, one backward; what a `custom_vjp` of the op is made of.

    u_t = α_t v_t − β_t Σ_{i<t} κ₁(w_t, k_i) u_i,        o_t = Σ_{i≤t} κ₂(q_t, k_i) u_i

Letters: B rows, T tokens, H query heads, G key/value heads, Hu heads of the write query (G or H), r = H / Hu queries
that share one u, K and V the widths, C rows of a chunk. The kernels see [B Hu, T, width].

Precision: sums, u and everything between are float32. Products take bfloat16 operands where the inputs are bfloat16 and
the weights are softmax's, float32 ones (six passes of the matrix unit) elsewhere; products of queries and keys take the
inputs' own.
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
    """What is known while tracing. `read` None: only u is wanted. `tied`: w = q, and `write`, one softmax, serves both.

    `chunk`: rows of a chunk, a multiple of 128; 0: chosen. `streamed`: whether arrays of all rows stay in HBM; None:
    where VMEM does not hold them. `interpret`: goes to pallas_call.
    """

    write: Kappa
    read: Kappa | None
    tied: bool = False
    chunk: int = 0
    streamed: bool | None = None
    interpret: object = False


def lacks(settings: Settings, key, value) -> str | None:
    """Why these kernels cannot do this call, or None."""
    return limits.lacks(key, value)


def forward(settings: Settings, query, write_query, key, value, alpha, beta, segment_ids):
    """(out [B,T,H,V] or None, u [B,T,Hu,V], both in value's dtype; residuals for `backward`).

    query [B,T,H,K] (None without a read), write_query [B,T,Hu,K] (None: the key; with `tied`: the query), key
    [B,T,G,K], value [B,T,G,V], alpha, beta [B,T,Hu] or None, segment_ids [B,T] int32 or None. Padding (id 0) must be 0
    in all of them. Under vmap the batch is folded.

    Raises NotImplementedError under jvp (the op's custom_vjp goes round it), and for what `lacks` says.
    """
    reason = lacks(settings, key, value)
    if reason:
        raise NotImplementedError(reason)
    arrays = (query, write_query, key, value, alpha, beta, segment_ids)
    function = functools.partial(_forward, settings)
    return transformable(function, "the Pallas forward of delta attention", _DIFFERENTIABLE)(*arrays)


def backward(settings: Settings, residuals, dout, du):
    """The gradients (dquery, dwrite_query, dkey, dvalue, dalpha, dbeta) for the cotangents of `forward`'s out and u.

    Each in its argument's shape and dtype; None where the argument was None (and dwrite_query with `tied`).
    """
    function = functools.partial(_backward, settings)
    return transformable(function, "the Pallas backward of delta attention", _DIFFERENTIABLE)(residuals, dout, du)


# Jitted, so that a call whose shapes were seen before is not traced again, on whatever platform it runs.
@functools.partial(jax.jit, static_argnums=0)
def _forward(settings, query, write_query, key, value, alpha, beta, segment_ids):
    given = (query, write_query, key, value, alpha, beta, segment_ids)
    layout = Layout(settings, query, write_query, key, value, segment_ids)
    plan = layout.plan
    results = call_forward(settings, layout, query, write_query, key, value, alpha, beta)
    out = layout.unfolded(results["out"]) if plan.reads or plan.tied else None
    # Everything kept leads with the batch, so that vmap can fold it.
    kept = {
        name: x.reshape(layout.batch, layout.heads, *x.shape[1:])
        for name, x in results.items()
        if name not in ("out", "u_operand")
    }
    kept |= {"given": given, "out": out if plan.reads and plan.read.normalised else None}
    return out, layout.back(results["u"]).astype(value.dtype), kept


@functools.partial(jax.jit, static_argnums=0)
def _backward(settings, residuals, dout, du):
    query, write_query, key, value, alpha, beta, segment_ids = residuals["given"]
    layout = Layout(settings, query, write_query, key, value, segment_ids)
    plan = layout.plan
    merged = lambda x: x.reshape(-1, *x.shape[2:])
    kept = {name: merged(x) for name, x in residuals.items() if name not in ("given", "out")}
    k = layout.tall(key)
    w = layout.tall(query if plan.tied else key if write_query is None else write_query)
    du = layout.tall(du).astype(jnp.float32)
    tied = None
    if plan.tied:
        tied = _TiedRead(layout.tall(dout).astype(jnp.float32), kept["rest"], kept["share"], kept["summary"], kept["u"])
        cotangents = tied.cotangents(du, plan.write_dtype)
    elif plan.reads:
        cotangents = Cotangents(du, layout.folded(dout), _row_dot(layout, dout, residuals["out"]))
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
    """dO·o of every row, [B Hu,r,T'], for reads with a normaliser; None for others."""
    if out is None:
        return None
    row_dot = jnp.sum(dout.astype(jnp.float32) * out.astype(jnp.float32), axis=3)
    return layout.folded(row_dot[..., None])[..., 0]


class _TiedRead:
    """What o = (1 − π) s + π u, the read that the write makes on its way, does to cotangents. dout, summary (s), u
    [B Hu,T',V]; rest (1 − π), share (π) [B Hu,1,T']."""

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
        """The gradient of each row's own score, [B Hu,T',1]: dS_ii = π_i (dO_i·u_i − dO_i·o_i)."""
        return _across(self.share * (jnp.sum(self.dout * self.u, axis=2)[:, None] - self.dot))


def _across(x):
    """[N,1,T] -> [N,T,1]."""
    return x.swapaxes(1, 2)


def _sum_heads(x, heads):
    """[B,T,h,W] -> [B,T,heads,W]: the sums over the heads that share one."""
    if x.shape[2] == heads:
        return x
    return x.reshape(*x.shape[:2], heads, x.shape[2] // heads, x.shape[3]).sum(axis=3)
