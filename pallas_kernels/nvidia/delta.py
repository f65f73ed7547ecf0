"""DeltaFormer's forward and backward as a few kernel launches: what a `custom_vjp` of the op is made of.

    u_t = α_t v_t − β_t Σ_{i<t} κ₁(w_t, k_i) u_i,        o_t = Σ_{i≤t} κ₂(q_t, k_i) u_i

Letters: B rows, T tokens, H query heads, G key/value heads, Hu heads of the write query (G or H), K and V the widths.
Arrays are [B, T, heads, width] and are read where they lie. Forward: one launch to write, one to read; one for both
where one softmax serves both (tied). Backward the same. Memory O(T (K+V)) a head.

Precision: sums, u and everything between are float32. Products take bfloat16 operands where the inputs are bfloat16 and
the weights are softmax's; else three products for one, of bfloat16 (5 digits) where arrays have two bytes, of TF32
(7 digits) where they have four. Two-byte softmax systems are solved with TF32 operands.
"""

from __future__ import annotations

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.nvidia import launch as launching
from pallas_kernels.nvidia.launch import Launch, Output
from pallas_kernels.nvidia.read_backward import read_backward
from pallas_kernels.nvidia.read_forward import read_forward
from pallas_kernels.nvidia.table import Tile, choose
from pallas_kernels.nvidia.weights import LOG2_E
from pallas_kernels.nvidia.write_backward import write_backward
from pallas_kernels.nvidia.write_forward import write_forward
from pallas_kernels.transform import transformable

SIMILARITIES = ("linear", "relu", "exp", "softmax", "round")
DTYPES = ("bfloat16", "float16", "float32")
WIDEST = 256

# The implementations of the op that can be differentiated in any way.
_INSTEAD = "'parallel' or 'recurrent'"


@dataclasses.dataclass(frozen=True)
class Kappa:
    """A similarity: its name, the scale of its scores, and for "round" the number of decimals."""

    name: str
    scale: float
    decimals: int = 2

    @property
    def constants(self):
        return {"SIMILARITY": self.name, "POWER": float(10.0**self.decimals)}

    @property
    def score_scale(self):
        """What kernels multiply products by: softmax's exponentials are powers of two."""
        return np.float32(self.scale * (LOG2_E if self.name == "softmax" else 1))


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is known while tracing. `read` None: only u is wanted. `tied`: w = q, and `write`, one softmax, serves both.

    `compute_capability`: 90 for an H100; None asks the device, and is 90 where there is none. `tiles`: (kernel's name,
    Tile) pairs in the table's place, for tests and for choosing the table.
    """

    write: Kappa
    read: Kappa | None
    tied: bool = False
    compute_capability: int | None = None
    tiles: tuple[tuple[str, Tile], ...] = ()


def lacks(settings: Settings, key, value) -> str | None:
    """Why these kernels cannot do this call, or None."""
    if str(key.dtype) not in DTYPES or key.dtype != value.dtype:
        return f"its kernels take one dtype of {', '.join(DTYPES)}; key is {key.dtype} and value {value.dtype}"
    if max(key.shape[3], value.shape[3]) > WIDEST:
        return f"its kernels take widths up to {WIDEST}; keys have {key.shape[3]} and values {value.shape[3]}"
    try:
        for name, kappa in (("write", settings.write), ("read", settings.read)):
            if kappa is not None:
                for direction in ("forward", "backward"):
                    _tile(settings, f"{name}_{direction}", key, value, _is_narrow(kappa, value.dtype))
    except NotImplementedError as error:
        return str(error)
    return None


def forward(settings: Settings, query, write_query, key, value, alpha, beta, segment_ids, run=launching.run):
    """(out [B,T,H,V] or None, u [B,T,Hu,V], both in value's dtype; residuals for `backward`).

    query [B,T,H,K] (None without a read), write_query [B,T,Hu,K] (None: the key; with `tied`: the query), key
    [B,T,G,K], value [B,T,G,V], alpha, beta [B,T,Hu] or None, segment_ids [B,T] int32 or None. Padding (id 0) must be 0
    in all of them, and its rows come out as 0 in u. Under vmap the batch is folded.

    Raises NotImplementedError under jvp (the op's custom_vjp goes round it), and for what `lacks` says.
    """
    reason = lacks(settings, key, value)
    if reason:
        raise NotImplementedError(reason)
    arrays = (query, write_query, key, value, alpha, beta, segment_ids)
    if run is not launching.run:
        return _forward(settings, run, *arrays)
    function = functools.partial(_forward, settings, run)
    return transformable(function, "the Triton forward of delta attention", _INSTEAD)(*arrays)


def backward(settings: Settings, residuals, dout, du, run=launching.run):
    """The gradients (dquery, dwrite_query, dkey, dvalue, dalpha, dbeta) for the cotangents of `forward`'s out and u.

    Each in its argument's shape and dtype; None where the argument was None (and dwrite_query with `tied`).
    """
    if run is not launching.run:
        return _backward(settings, run, residuals, dout, du)
    function = functools.partial(_backward, settings, run)
    return transformable(function, "the Triton backward of delta attention", _INSTEAD)(residuals, dout, du)


def block_width(width: int) -> int:
    """The width a tile takes in a kernel: a power of two, 16 at least."""
    return max(16, 1 << (width - 1).bit_length())


def _is_narrow(kappa, dtype):
    """Whether products with these weights take two-byte operands."""
    return kappa is not None and kappa.name == "softmax" and np.dtype(dtype).itemsize == 2


def _precision(narrow, dtype):
    """How products of float32 operands are made: as exactly as the arrays are read.

    Between two-byte arrays three bfloat16 products, 2^-16 of the largest term, take the place of three TF32 ones: half
    the registers, and twice as fast on tensor cores.
    """
    exact = "bf16x3" if np.dtype(dtype).itemsize == 2 else "tf32x3"
    return {"SCORE_PRECISION": "tf32x3", "PRECISION": "tf32" if narrow else exact}


def _tile(settings, name, key, value, narrow) -> Tile:
    given = dict(settings.tiles).get(name)
    if given is not None:
        return given
    if settings.tied:
        name = name.replace("write", "tied")
    capability = settings.compute_capability or launching.target_capability()
    return choose(name, capability, max(block_width(key.shape[3]), block_width(value.shape[3])), narrow)


def _common(key, value, segment_ids, kappa, narrow):
    return dict(
        K=key.shape[3],
        V=value.shape[3],
        KV_HEADS=key.shape[2],
        BLOCK_K=block_width(key.shape[3]),
        BLOCK_V=block_width(value.shape[3]),
        HAS_SEGMENTS=segment_ids is not None,
        **kappa.constants,
        **_precision(narrow, key.dtype),
    )


def _present(array, otherwise):
    """An argument that is absent still has a place in a kernel's list; nothing reads it there."""
    return otherwise if array is None else array


def _gate(gate):
    """[B, T, heads] -> [B, heads, T] float32."""
    return None if gate is None else jnp.moveaxis(gate, 2, 1).astype(jnp.float32)


def first_columns(segment_ids, rows: int):
    """[B, blocks] int32: the first column that the first row of each block of `rows` sees."""
    if segment_ids is None:
        return None
    index = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)[None]
    begins = jnp.concatenate([jnp.ones_like(segment_ids[:, :1], bool), segment_ids[:, 1:] != segment_ids[:, :-1]], 1)
    return lax.cummax(jnp.where(begins, index, 0), axis=1)[:, ::rows]


def last_rows(segment_ids, columns: int):
    """[B, blocks] int32: one more than the last row that sees the last column of each block of `columns`."""
    if segment_ids is None:
        return None
    time = segment_ids.shape[1]
    index = jnp.arange(time, dtype=jnp.int32)[None]
    ends = jnp.concatenate([segment_ids[:, 1:] != segment_ids[:, :-1], jnp.ones_like(segment_ids[:, :1], bool)], 1)
    end = lax.cummin(jnp.where(ends, index + 1, time), axis=1, reverse=True)
    blocks = -(-time // columns)
    return end[:, np.minimum((np.arange(blocks) + 1) * columns, time) - 1]


def padded(row):
    """The shape of an array of numbers [B, heads, T] whose rows begin aligned, with zeros after T (memory.py)."""
    *leading, time = row
    return (*leading, -(-time // 64) * 64)


def write_forward_launch(settings, w, key, value, alpha, beta, segment_ids) -> Launch:
    """Outputs u, its narrow copy, log-sum-exps, s where there is a β; if tied also out, π, ρ."""
    batch, time, heads, _ = w.shape
    narrow = _is_narrow(settings.write, value.dtype)
    copy = narrow or _is_narrow(settings.read, value.dtype)
    tile = _tile(settings, "write_forward", key, value, narrow)
    alpha, beta = _gate(alpha), _gate(beta)
    tall, row, nothing = (batch, time, heads, value.shape[3]), (batch, heads, time), (1,)
    tied = lambda shape: shape if settings.tied else nothing
    # dβ needs s: from u = α v − β s it could not be had where β is 0.
    summary = settings.tied or beta is not None
    return Launch(
        write_forward,
        (
            w,
            key,
            value,
            *(_present(x, key) for x in (alpha, beta, segment_ids, first_columns(segment_ids, tile.rows))),
        ),
        (
            Output(tall, jnp.float32),
            Output(tall if copy else nothing, value.dtype),
            Output(padded(row) if settings.write.name == "softmax" else nothing, jnp.float32, zeroed=True),
            Output((1 + batch * heads,), jnp.int32, zeroed=True),
            Output(tall if summary else nothing, value.dtype),
            Output(tied(tall), value.dtype),
            Output(tied(row), jnp.float32),
            Output(tied(row), jnp.float32),
        ),
        (time, settings.write.score_scale),
        batch * heads * -(-time // tile.rows),
        dict(
            B=batch,
            HEADS=heads,
            HAS_ALPHA=alpha is not None,
            HAS_BETA=beta is not None,
            NARROW=narrow,
            COPY=copy,
            SUMMARY=summary,
            TIED=settings.tied,
            ROWS=tile.rows,
            COLUMNS=tile.columns,
            HALVES=tile.halves,
            GROUP=tile.group,
            **_common(key, value, segment_ids, settings.write, narrow),
        ),
        tile.warps,
        tile.stages,
    )


def read_forward_launch(settings, query, key, u, segment_ids) -> Launch:
    """Outputs out (u's dtype of the inputs, key's), log-sum-exps."""
    batch, time, heads, _ = query.shape
    narrow = _is_narrow(settings.read, key.dtype)
    tile = _tile(settings, "read_forward", key, u, narrow)
    return Launch(
        read_forward,
        (query, key, u, *(_present(x, key) for x in (segment_ids, first_columns(segment_ids, tile.rows)))),
        (
            Output((batch, time, heads, u.shape[3]), key.dtype),
            Output((batch, heads, time) if settings.read.name == "softmax" else (1,), jnp.float32),
        ),
        (time, settings.read.score_scale),
        batch * heads * -(-time // tile.rows),
        dict(
            HEADS=heads,
            U_HEADS=u.shape[2],
            ROWS=tile.rows,
            COLUMNS=tile.columns,
            **_common(key, u, segment_ids, settings.read, narrow),
        ),
        tile.warps,
        tile.stages,
    )


def read_backward_launch(settings, query, key, u, dout, lse, row_dot, segment_ids) -> Launch:
    """Outputs dq, and dk, du for the heads of u."""
    batch, time, heads, width = query.shape
    narrow = _is_narrow(settings.read, key.dtype)
    tile = _tile(settings, "read_backward", key, u, narrow)
    u_heads = u.shape[2]
    return Launch(
        read_backward,
        (
            query,
            key,
            u,
            dout,
            _present(lse, key),
            _present(row_dot, key),
            *(_present(x, key) for x in (segment_ids, last_rows(segment_ids, tile.columns))),
        ),
        (
            Output((batch, time, heads, width), jnp.float32, zeroed=True),
            Output((batch, time, u_heads, width), jnp.float32),
            Output((batch, time, u_heads, u.shape[3]), jnp.float32),
        ),
        (time, np.float32(settings.read.scale), settings.read.score_scale),
        batch * u_heads * -(-time // tile.columns),
        dict(
            HEADS=heads,
            U_HEADS=u_heads,
            ROWS=tile.rows,
            COLUMNS=tile.columns,
            STAGES=tile.stages,
            **_common(key, u, segment_ids, settings.read, narrow),
        ),
        tile.warps,
        tile.stages,
    )


def write_backward_launch(
    settings, w, key, value, alpha, beta, segment_ids, u, operand, summary, lse, du, tied=None
) -> Launch:
    """`summary`: s, unless there is no β; `tied`: (dout, ρ, dO·o) or None. Outputs dw, dk (without their factor
    of scale), dv, dalpha, dbeta; then what the kernel needs itself."""
    batch, time, heads, width = w.shape
    narrow = _is_narrow(settings.write, value.dtype)
    tile = _tile(settings, "write_backward", key, value, narrow)
    alpha, beta = _gate(alpha), _gate(beta)
    wide = lambda width: Output((batch, time, heads, width), jnp.float32)
    row = (batch, heads, time)
    return Launch(
        write_backward,
        (
            w,
            key,
            value,
            *(_present(x, key) for x in (alpha, beta, segment_ids, last_rows(segment_ids, tile.columns))),
            u,
            operand if narrow else u,
            _present(summary, u),
            _present(lse, u),
            du,
            *(tied or (u,) * 3),
        ),
        (
            dataclasses.replace(wide(width), zeroed=True),
            wide(width),
            wide(value.shape[3]),
            Output(row, jnp.float32),
            Output(row if beta is not None else (1,), jnp.float32),
            Output((batch, time, heads, value.shape[3]), value.dtype if narrow else jnp.float32),
            Output(padded(row) if settings.write.name == "softmax" else (1,), jnp.float32, zeroed=True),
            Output((1 + batch * heads,), jnp.int32, zeroed=True),
        ),
        (time, settings.write.score_scale),
        batch * heads * -(-time // tile.columns),
        dict(
            B=batch,
            HEADS=heads,
            HAS_ALPHA=alpha is not None,
            HAS_BETA=beta is not None,
            TIED=tied is not None,
            ROWS=tile.rows,
            COLUMNS=tile.columns,
            HALVES=tile.halves,
            GROUP=tile.group,
            STAGES=tile.stages,
            **_common(key, value, segment_ids, settings.write, narrow),
        ),
        tile.warps,
        tile.stages,
    )


def _run(launch, run, settings):
    return run(launch) if run is not launching.run else run(launch, settings.compute_capability)


def _forward(settings, run, query, write_query, key, value, alpha, beta, segment_ids):
    given = (query, write_query, key, value, alpha, beta, segment_ids)
    if settings.tied:
        write_query = query
    w = key if write_query is None else write_query
    launch = write_forward_launch(settings, w, key, value, alpha, beta, segment_ids)
    u, copy, lse_write, _, summary, *tied = _run(launch, run, settings)
    softmax = settings.write.name == "softmax"
    copy = copy if launch.constants["COPY"] else None
    summary = summary if launch.constants["SUMMARY"] else None
    kept = {"given": given, "u": u, "copy": copy, "summary": summary, "lse_write": lse_write if softmax else None}
    short_u = u.astype(value.dtype) if copy is None else copy
    if settings.tied:
        out, share, rest = tied
        return out, short_u, kept | {"share": share, "rest": rest}
    if settings.read is None:
        return None, short_u, kept
    source = copy if _is_narrow(settings.read, value.dtype) else u
    out, lse_read = _run(read_forward_launch(settings, query, key, source, segment_ids), run, settings)
    # Only softmax reads its own output again.
    normalised = settings.read.name == "softmax"
    return out, short_u, kept | {"out": out if normalised else None, "lse_read": lse_read if normalised else None}


def _row_dots(a, b):
    """Σ over the width: [B,T,h,V] twice -> [B,h,T] float32."""
    return jnp.moveaxis(jnp.sum(a.astype(jnp.float32) * b.astype(jnp.float32), axis=3), 2, 1)


def _sum_heads(x, heads):
    """[B,T,h,W] -> [B,T,heads,W]: the sums over the heads that share one."""
    if x.shape[2] == heads:
        return x
    return x.reshape(*x.shape[:2], heads, x.shape[2] // heads, x.shape[3]).sum(axis=3)


def _column(row):
    """[B,h,T] -> [B,T,h,1]."""
    return jnp.moveaxis(row, 1, 2)[..., None]


def _backward(settings, run, residuals, dout, du):
    query, write_query, key, value, alpha, beta, segment_ids = residuals["given"]
    u, copy = residuals["u"], residuals["copy"]
    kv_heads = key.shape[2]
    du = du.astype(jnp.float32)
    dquery, dkey_read, tied = None, 0, None
    if settings.tied:
        write_query = query
        share, rest = residuals["share"], residuals["rest"]
        wide = dout.astype(jnp.float32)
        read_dot = _row_dots(wide, _column(rest) * residuals["summary"].astype(jnp.float32) + _column(share) * u)
        du = du + _column(share) * wide
        tied = (dout, rest, read_dot)
    elif settings.read is not None:
        narrow = _is_narrow(settings.read, value.dtype)
        row_dot = _row_dots(dout, residuals["out"]) if settings.read.name == "softmax" else None
        launch = read_backward_launch(
            settings, query, key, copy if narrow else u, dout, residuals["lse_read"], row_dot, segment_ids
        )
        dquery, dkey_read, du_read = _run(launch, run, settings)
        dquery, du = dquery.astype(query.dtype), du + du_read
    w = key if write_query is None else write_query
    saved = (u, copy, residuals["summary"], residuals["lse_write"])
    launch = write_backward_launch(settings, w, key, value, alpha, beta, segment_ids, *saved, du, tied)
    dw, dkey, dvalue, dalpha, dbeta, *_ = _run(launch, run, settings)
    dw, dkey = dw * settings.write.scale, dkey * settings.write.scale + dkey_read
    if settings.tied:
        # A row's own score: dS_ii = π_i (dO_i·u_i − dO_i·o_i).
        own = _column(share * (_row_dots(wide, u) - read_dot)) * settings.write.scale
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
        _sum_heads(dkey, kv_heads).astype(key.dtype),
        _sum_heads(dvalue, kv_heads).astype(value.dtype),
        gate(dalpha, alpha),
        gate(dbeta, beta),
    )
