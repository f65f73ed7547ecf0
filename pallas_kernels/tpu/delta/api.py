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

import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.tpu import calls, limits
from pallas_kernels.tpu.delta.backward import backward_kernel
from pallas_kernels.tpu.delta.forward import forward_kernel
from pallas_kernels.tpu.delta.weights import Kappa
from pallas_kernels.tpu.layout import Layout
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


def _forward(settings, query, write_query, key, value, alpha, beta, segment_ids):
    given = (query, write_query, key, value, alpha, beta, segment_ids)
    at = Layout(settings, query, write_query, key, value, segment_ids)
    heads, length, chunk, group = at.batch * at.heads, at.length, at.chunk, at.group
    width, value_width = at.width, at.value_width
    reads = settings.tied or settings.read is not None
    kept_dtype = at.write_dtype if settings.read is None or settings.tied else max(
        at.write_dtype, at.read_dtype, key=lambda dtype: dtype.itemsize
    )  # fmt: skip
    streamed = at.streams_forward(settings, kept_dtype)
    k = at.tall(key)
    segments = None if segment_ids is None else at.pad(segment_ids)[:, None, :]
    whole = lambda x, index: x if x is None else calls.Input(x, (1, *x.shape[1:]), index)
    tall = lambda x, w, of=lambda h: h: (
        None if x is None else calls.Input(x, (1, chunk, w), lambda h, c, _: (of(h), c, 0))
    )
    row = lambda x, of=lambda h: h: None if x is None else calls.Input(x, (1, 1, chunk), lambda h, c, _: (of(h), 0, c))
    inputs = {
        "k": calls.Input(k) if streamed else whole(k, lambda h, c, _: (at.kv(h), 0, 0)),
        "keys": tall(k, width, at.kv),
        "w": None if write_query is None or settings.tied else tall(at.tall(write_query), width),
        "q": None if query is None or (settings.read is None and not settings.tied) else calls.Input(
            at.folded(query), (1, group, chunk, width), lambda h, c, _: (h, 0, c, 0)
        ),
        "v": tall(at.tall(value), value_width, at.kv),
        "alpha": None if alpha is None else row(at.row(alpha)),
        "beta": None if beta is None else row(at.row(beta)),
        "rows": row(segments, at.of_batch),
        "columns": whole(segments, lambda h, c, _: (at.of_batch(h), 0, 0)),
    }  # fmt: skip
    out_tall = lambda dtype: calls.Output(
        (heads, length, value_width), dtype, (1, chunk, value_width), lambda h, c, _: (h, c, 0)
    )
    out_row = calls.Output((heads, 1, length), jnp.float32, (1, 1, chunk), lambda h, c, _: (h, 0, c))
    outputs = {
        "operand": calls.Output((heads, value_width, length), kept_dtype) if streamed else None,
        "u": out_tall(jnp.float32),
        "out": calls.Output(
            (heads, group, length, value_width), value.dtype, (1, group, chunk, value_width),
            lambda h, c, _: (h, 0, c, 0),
        ) if reads else None,
        "summary": out_tall(at.write_dtype) if settings.tied or beta is not None else None,
        "lse_write": out_row if settings.write.normalised else None,
        "lse_read": calls.Output(
            (heads, group, length), jnp.float32, (1, group, chunk), lambda h, c, _: (h, 0, c)
        ) if reads and not settings.tied and settings.read.normalised else None,
        "share": out_row if settings.tied else None,
        "rest": out_row if settings.tied else None,
    }  # fmt: skip
    scratch = {
        "values": pltpu.VMEM((value_width, chunk if streamed else length), kept_dtype),
        "sums": pltpu.VMEM((value_width, chunk), jnp.float32),
    }
    if streamed:
        scratch |= {
            "k_tiles": pltpu.VMEM((2, chunk, width), at.operand),
            "k_semaphores": pltpu.SemaphoreType.DMA((2, 2)),
            "u_tiles": pltpu.VMEM((2, value_width, chunk), kept_dtype),
            "u_semaphores": pltpu.SemaphoreType.DMA((2, 2)),
            "semaphore": pltpu.SemaphoreType.DMA(()),
        }
    results = calls.call(
        functools.partial(forward_kernel, settings=settings, kv_head=at.kv, **at.sizes()),
        "delta_forward",
        (heads, at.steps),
        at.first,
        inputs,
        outputs,
        scratch,
        vmem_bytes=limits.VMEM_BYTES,
        interpret=settings.interpret,
    )
    kept = {name: x for name, x in results.items() if name not in ("out", "operand")} | {"given": given}
    out = at.unfolded(results["out"]) if reads else None
    normalised = reads and not settings.tied and settings.read.normalised
    kept["out"] = out if normalised else None
    # Everything kept leads with the batch, so that vmap can fold it.
    kept = {
        name: x if name in ("given", "out") or x is None else x.reshape(at.batch, at.heads, *x.shape[1:])
        for name, x in kept.items()
    }
    return out, at.back(results["u"]).astype(value.dtype), kept


def _backward(settings, residuals, dout, du):
    query, write_query, key, value, alpha, beta, segment_ids = residuals["given"]
    at = Layout(settings, query, write_query, key, value, segment_ids)
    heads, length, chunk, group = at.batch * at.heads, at.length, at.chunk, at.group
    width, value_width = at.width, at.value_width
    merged = lambda name: residuals[name].reshape(-1, *residuals[name].shape[2:])
    reads = settings.tied or settings.read is not None
    j = lambda step: at.steps - 1 - step
    whole = lambda x, of=lambda h: h: (
        None if x is None else calls.Input(x, (1, *x.shape[1:]), lambda h, s, _: (of(h), *[0] * (x.ndim - 1)))
    )
    tall = lambda x, w, of=lambda h: h: (
        None if x is None else calls.Input(x, (1, chunk, w), lambda h, s, _: (of(h), j(s), 0))
    )
    row = lambda x: None if x is None else calls.Input(x, (1, 1, chunk), lambda h, s, _: (h, 0, j(s)))
    k, u = at.tall(key), merged("u")
    du = at.tall(du).astype(jnp.float32)
    row_dot = read_share = read_dot = share = None
    if settings.tied:
        share, rest, summary = merged("share"), merged("rest"), merged("summary")
        across = lambda x: x.swapaxes(1, 2)  # [N,1,T] -> [N,T,1]
        wide = at.tall(dout).astype(jnp.float32)
        read = jnp.sum(wide * (across(rest) * summary.astype(jnp.float32) + across(share) * u), axis=2)[:, None]
        du = du + across(share) * wide
        read_share = (across(rest) * wide).astype(at.write_dtype)
        read_dot = rest * read
    elif reads and settings.read.normalised:
        row_dot = jnp.sum(dout.astype(jnp.float32) * residuals["out"].astype(jnp.float32), axis=3)
        row_dot = at.folded(row_dot[..., None])[..., 0]
    segments = None if segment_ids is None else at.pad(segment_ids)[:, None, :]
    separate = reads and not settings.tied
    streamed = at.streams_backward(settings, separate)
    w = at.tall(query if settings.tied else key if write_query is None else write_query)
    write_head = at.kv if write_query is None and not settings.tied else lambda h: h
    of_rows = (lambda x, of=None: None if x is None else calls.Input(x)) if streamed else whole
    folded = lambda x, w: calls.Input(x, (1, group, chunk, w), lambda h, s, _: (h, 0, j(s), 0)) if separate else None
    q, wide_dout = (at.folded(query), at.folded(dout)) if separate else (None, None)
    inputs = {
        "w": of_rows(w, write_head),
        "q": of_rows(q),
        "dout": of_rows(wide_dout),
        "lse_write": whole(merged("lse_write")) if settings.write.normalised else None,
        "lse_read": whole(merged("lse_read")) if row_dot is not None else None,
        "row_dot": whole(row_dot),
        "segments": whole(segments, at.of_batch),
        "keys": tall(k, width, at.kv),
        "own_w": tall(w, width, write_head),
        "own_q": folded(q, width),
        "own_dout": folded(wide_dout, value_width),
        "u": tall(u, value_width),
        "du": tall(du, value_width),
        "summary": tall(merged("summary"), value_width) if beta is not None else None,
        "v": tall(at.tall(value), value_width, at.kv),
        "read_share": tall(read_share, value_width),
        "alpha": None if alpha is None else row(at.row(alpha)),
        "beta": None if beta is None else row(at.row(beta)),
        "read_dot": row(read_dot),
    }
    grown = lambda *shape: (
        calls.Output((heads, *shape), jnp.float32)
        if streamed
        else calls.Output((heads, *shape), jnp.float32, (1, *shape), lambda h, s, _: (h, *[0] * len(shape)))
    )
    out_tall = lambda w: calls.Output((heads, length, w), jnp.float32, (1, chunk, w), lambda h, s, _: (h, j(s), 0))
    out_row = calls.Output((heads, 1, length), jnp.float32, (1, 1, chunk), lambda h, s, _: (h, 0, j(s)))
    outputs = {
        "dq": grown(group, width, length) if separate else None,
        "dw": grown(width, length),
        "adjoints": calls.Output((heads, length, value_width), at.write_dtype) if streamed else None,
        "dk": out_tall(width),
        "dv": out_tall(value_width),
        "dalpha": out_row if alpha is not None else None,
        "dbeta": out_row if beta is not None else None,
    }
    scratch = {
        "adjoint": pltpu.VMEM((chunk if streamed else length, value_width), at.write_dtype),
        "centre": pltpu.VMEM((1, length), jnp.float32),
    }
    if streamed:
        tiles = {
            "w": ((2, chunk, width), at.operand),
            "adjoint": ((2, chunk, value_width), at.write_dtype),
            "dw": ((2, width, chunk), jnp.float32),
        }
        if separate:
            tiles |= {
                "q": ((2, group, chunk, width), at.operand),
                "dout": ((2, group, chunk, value_width), at.operand),
                "dq": ((2, group, width, chunk), jnp.float32),
            }
        scratch |= {f"{name}_tiles": pltpu.VMEM(*tile) for name, tile in tiles.items()}
        scratch |= {f"{name}_semaphores": pltpu.SemaphoreType.DMA((2, 2)) for name in tiles}
        scratch["semaphore"] = pltpu.SemaphoreType.DMA(())
    results = calls.call(
        functools.partial(backward_kernel, settings=settings, steps=at.steps, write_head=write_head, **at.sizes()),
        "delta_backward",
        (heads, at.steps),
        at.last,
        inputs,
        outputs,
        scratch,
        vmem_bytes=limits.VMEM_BYTES,
        interpret=settings.interpret,
    )
    dk, dq, dw = results["dk"], None, results["dw"].swapaxes(1, 2) * settings.write.scale
    if settings.tied:
        # A row's own score: dS_ii = π_i (dO_i·u_i − dO_i·o_i).
        own = across(share * (jnp.sum(wide * u, axis=2)[:, None] - read)) * settings.write.scale
        dq = at.back(dw + own * jnp.repeat(k, at.heads // at.kv_heads, axis=0).astype(jnp.float32))
        dk, dw = dk + own * w.astype(jnp.float32), None
    elif separate:
        dq = at.unfolded(results["dq"].swapaxes(2, 3) * settings.read.scale)
    if not settings.tied:
        dk, dw = (dk + dw, None) if write_query is None else (dk, at.back(dw).astype(write_query.dtype))
    gate = lambda name, x: None if x is None else at.back(results[name].swapaxes(1, 2))[..., 0].astype(x.dtype)
    return (
        None if dq is None else dq.astype(query.dtype),
        dw,
        _sum_heads(at.back(dk), at.kv_heads).astype(key.dtype),
        _sum_heads(at.back(results["dv"]), at.kv_heads).astype(value.dtype),
        gate("dalpha", alpha),
        gate("dbeta", beta),
    )


def _sum_heads(x, heads):
    """[B,T,h,W] -> [B,T,heads,W]: the sums over the heads that share one."""
    if x.shape[2] == heads:
        return x
    return x.reshape(*x.shape[:2], heads, x.shape[2] // heads, x.shape[3]).sum(axis=3)
