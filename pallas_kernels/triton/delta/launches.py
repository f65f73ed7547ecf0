"""The launches of DeltaFormer's Triton kernels, as data: the inputs and outputs of each kernel, its grid and its tile.

`settings` is the Settings of api.py; the letters of shapes are those of api.py.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.triton import launch as launching
from pallas_kernels.triton.delta.form import Form, operands
from pallas_kernels.triton.delta.read_backward import read_backward
from pallas_kernels.triton.delta.read_forward import read_forward
from pallas_kernels.triton.delta.table import Tile, choose, heads_at_once
from pallas_kernels.triton.delta.write.backward import write_backward
from pallas_kernels.triton.delta.write.forward import write_forward
from pallas_kernels.triton.delta.write.invert_blocks import invert_blocks
from pallas_kernels.triton.launch import Launch, Output
from pallas_kernels.triton.memory import block_width


def tile_of(settings, name, key, value) -> Tile:
    """The tile of the kernel `name`, with its group: from `settings.tiles`, or else from the table."""
    tile = dict(settings.tiles).get(name) or _chosen(settings, name, key, value)
    # The read has no order of heads: with a group its kernels would be compiled anew for other lengths.
    if tile.group or not name.startswith("write"):
        return tile
    width = key.shape[3] + value.shape[3]
    return dataclasses.replace(tile, group=heads_at_once(key.shape[1], width))


def _chosen(settings, name, key, value) -> Tile:
    kappa = settings.write if name.startswith("write") else settings.read
    if settings.tied:
        name = name.replace("write", "tied")
    capability = settings.compute_capability or launching.target_capability()
    width = max(block_width(key.shape[3]), block_width(value.shape[3]))
    return choose(name, capability, width, operands(kappa, key.dtype))


def _wide_u(settings, dtype, beta) -> bool:
    """`Form.wide_u`: of softmax's backward pass if there is no β, of a tied one, and of a read with other operands."""
    taken = operands(settings.write, dtype)
    if taken != "narrow":
        return taken == "exact"
    return settings.tied or beta is None or (settings.read is not None and operands(settings.read, dtype) != taken)


def _form(kappa, key, value, heads: int, u_heads: int, alpha=None, beta=None, segment_ids=None, tied=False) -> Form:
    return Form(
        heads=heads,
        u_heads=u_heads,
        kv_heads=key.shape[2],
        key_width=key.shape[3],
        value_width=value.shape[3],
        similarity=kappa.name,
        power=kappa.power,
        operands=operands(kappa, key.dtype),
        tied=tied,
        has_alpha=alpha is not None,
        has_beta=beta is not None,
        has_segments=segment_ids is not None,
    )


def _present(array, otherwise):
    """`array`, or `otherwise` if it is None. A kernel takes an array in every place of its list; it does not read that
    of an absent argument."""
    return otherwise if array is None else array


def _gate(gate):
    """[B, T, heads] -> [B, heads, T] float32; None stays None."""
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
    """The shape [B, heads, T padded to a multiple of 64]: rows begin aligned, with zeros after T (`memory.padded`)."""
    *leading, time = row
    return (*leading, -(-time // 64) * 64)


def invert_blocks_launch(settings, name, w, key, value, beta, segment_ids) -> Launch:
    """The inverses for the kernel `name` ("write_forward" or "write_backward"), needed if its operands are "pair".

    Outputs: the high and the low part of the inverses.
    """
    batch, time, heads, _ = w.shape
    tile = tile_of(settings, name, key, value)
    rows = (tile.rows if name == "write_forward" else tile.columns) // tile.halves
    beta = _gate(beta)
    padded_time = -(-time // (2 * rows)) * 2 * rows
    return Launch(
        invert_blocks,
        (w, key, *(_present(x, key) for x in (beta, segment_ids))),
        (Output((batch, heads, padded_time, rows), jnp.bfloat16),) * 2,
        (time, settings.write.score_scale),
        batch * heads * (padded_time // rows),
        dict(FORM=_form(settings.write, key, value, heads, heads, None, beta, segment_ids), ROWS=rows),
        4,
        1,
    )


def write_forward_launch(settings, w, key, value, alpha, beta, segment_ids, inverse=(None, None)) -> Launch:
    """`inverse`: the outputs of `invert_blocks_launch` if operands are "pair".

    Outputs: u in float32 (scratch, unless FORM.wide_u); operand and residue, u as products take it; log-sum-exps;
    counters (order.py); s, if there is a β or tied; out, π and ρ, if tied. What is not needed has one element.
    """
    batch, time, heads, _ = w.shape
    taken = operands(settings.write, value.dtype)
    tile = tile_of(settings, "write_forward", key, value)
    alpha, beta = _gate(alpha), _gate(beta)
    tall, row, nothing = (batch, time, heads, value.shape[3]), (batch, heads, time), (1,)
    tied = lambda shape: shape if settings.tied else nothing
    form = _form(settings.write, key, value, heads, heads, alpha, beta, segment_ids, settings.tied)
    form = dataclasses.replace(form, wide_u=_wide_u(settings, value.dtype, beta))
    return Launch(
        write_forward,
        (
            w,
            key,
            value,
            *(_present(x, key) for x in (alpha, beta, segment_ids, first_columns(segment_ids, tile.rows), *inverse)),
        ),
        (
            Output(tall, jnp.float32),
            Output(nothing if taken == "exact" else tall, value.dtype),
            Output(tall if taken == "pair" else nothing, value.dtype),
            Output(padded(row) if settings.write.name == "softmax" else nothing, jnp.float32, zeroed=True),
            Output((1 + batch * heads,), jnp.int32, zeroed=True),
            Output(tall if form.has_summary else nothing, value.dtype),
            Output(tied(tall), value.dtype),
            Output(tied(row), jnp.float32),
            Output(tied(row), jnp.float32),
        ),
        (time, settings.write.score_scale),
        batch * heads * -(-time // tile.rows),
        dict(B=batch, FORM=form, TILE=tile),
        tile.warps,
        tile.stages,
    )


def read_forward_launch(settings, query, key, u, residue, segment_ids) -> Launch:
    """u, residue: u as products take it; residue is None unless operands are "pair". Outputs: out, log-sum-exps."""
    batch, time, heads, _ = query.shape
    tile = tile_of(settings, "read_forward", key, u)
    return Launch(
        read_forward,
        (query, key, u, *(_present(x, key) for x in (residue, segment_ids, first_columns(segment_ids, tile.rows)))),
        (
            Output((batch, time, heads, u.shape[3]), key.dtype),
            Output((batch, heads, time) if settings.read.name == "softmax" else (1,), jnp.float32),
        ),
        (time, settings.read.score_scale),
        batch * heads * -(-time // tile.rows),
        dict(FORM=_form(settings.read, key, u, heads, u.shape[2], segment_ids=segment_ids), TILE=tile),
        tile.warps,
        tile.stages,
    )


def read_backward_launch(settings, query, key, u, residue, dout, lse, row_dot, segment_ids) -> Launch:
    """Outputs: dq, for the heads of q; dk and du, for the heads of u."""
    batch, time, heads, width = query.shape
    tile = tile_of(settings, "read_backward", key, u)
    u_heads = u.shape[2]
    return Launch(
        read_backward,
        (
            query,
            key,
            u,
            _present(residue, u),
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
        dict(FORM=_form(settings.read, key, u, heads, u.shape[2], segment_ids=segment_ids), TILE=tile),
        tile.warps,
        tile.stages,
    )


def write_backward_launch(
    settings, w, key, value, alpha, beta, segment_ids, inverse, u, operand, residue, summary, lse, du, tied=None
) -> Launch:
    """`inverse`: as in `write_forward_launch`. u: in float32, read only for a softmax without β. operand,
    residue: u as products take it. summary: s, or None if there is no β. tied: (dout, ρ, dO·o) or None.

    Outputs: dw and dk, not yet multiplied by the scale; dv; dalpha; dbeta; then scratch arrays of the kernel.
    """
    batch, time, heads, width = w.shape
    tile = tile_of(settings, "write_backward", key, value)
    if tile.rows > 64:
        raise ValueError(f"{tile}: rows must be at most 64, because the kernel reads arrays padded to a multiple of 64")
    alpha, beta = _gate(alpha), _gate(beta)
    wide = lambda width: Output((batch, time, heads, width), jnp.float32)
    row = (batch, heads, time)
    return Launch(
        write_backward,
        (
            w,
            key,
            value,
            *(_present(x, key) for x in (alpha, beta, segment_ids, last_rows(segment_ids, tile.columns), *inverse)),
            *(_present(x, operand) for x in (u, operand, residue, summary, lse)),
            du,
            *(tied or (operand,) * 3),
        ),
        (
            dataclasses.replace(wide(width), zeroed=True),
            wide(width),
            wide(value.shape[3]),
            Output(row if alpha is not None else (1,), jnp.float32),
            Output(row if beta is not None else (1,), jnp.float32),
            Output((batch, time, heads, value.shape[3]), operand.dtype),
            Output((batch, time, heads, value.shape[3]) if residue is not None else (1,), operand.dtype),
            Output(padded(row) if settings.write.name == "softmax" else (1,), jnp.float32, zeroed=True),
            Output((1 + batch * heads,), jnp.int32, zeroed=True),
        ),
        (time, settings.write.score_scale),
        batch * heads * -(-time // tile.columns),
        dict(
            B=batch,
            FORM=_form(settings.write, key, value, heads, heads, alpha, beta, segment_ids, tied is not None),
            TILE=tile,
        ),
        tile.warps,
        tile.stages,
    )
