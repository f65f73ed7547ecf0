"""DeltaFormer's backward kernel on a TPU.

Grid: (B Hu heads of u, chunks). The steps of a head take the chunks of columns from the last to the first. A step
computes G, dK, dV, dα and dβ of its columns from all later rows, and adds to dW and dQ of those rows. H and c of the
later rows, which earlier columns need, stay in VMEM, and so do dW and dQ.

G = M⁻ᵀ dU is the gradient of the written values. For row i and the columns j that it sees,

    H_i = −β_i G_i,    c_i = −G_i·(α_i v_i − u_i)  for softmax, else 0
    G_j  = dU_j + Σ_{i≥j} κ₂(q_i, k_j) dO_i + Σ_{i>j} A_ij H_i           inside the chunk, a transposed solve
    dS_ij = κ₁'(s_ij) (H_i·u_j − c_i),      dR_ij = κ₂'(r_ij) (dO_i·u_j − D_i),   D_i = dO_i·o_i for softmax, else 0
    dV = α G,  dα = v·G,  dβ = −G·s,  dK = Σ_i dSᵀ w + dRᵀ q,  dW = dS K,  dQ = dR K

If tied, H_i = ρ_i dO_i − β_i G_i, and ρ_i D_i is added to c_i, with P the weights and ρ = 1 − π. These serve write and
read together; in G_j, Σ_{i>j} P_ij ρ_i dO_i is then part of Σ P_ij H_i.

Tiles of scores are laid out columns × rows. Numbers per row are then row vectors, and no tile is transposed: dQ and dW
are summed as [K, T]. Source: derived for this project from Xu et al., DeltaFormer (NeurIPS 2025), eq. 8 and 9.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.tpu.delta.hbm import HbmTiles, copy, over_tiles
from pallas_kernels.tpu.delta.kappa import Kappa, both, keep, weights_again
from pallas_kernels.tpu.delta.layout import Plan
from pallas_kernels.tpu.delta.triangular import solve_across_transposed
from pallas_kernels.tpu.matrix_unit import UPPER, WHOLE, TileProducts, tile_numbers, upper_times


def backward_kernel(last, refs, *, plan: Plan):
    """Computes one chunk of columns of one head of u. The refs (backward_call.py says which are present):

    inputs of all rows: w [1,T,K] (the write query, also if it is k or q), q [1,r,T,K], dout [1,r,T,V], lse_write,
      segments [1,1,T], lse_read, row_dot [1,r,T];
    inputs of the chunk: keys, own_w [1,C,K], own_q [1,r,C,K], own_dout [1,r,C,V], u, du, summary, v, read_share
      [1,C,V], alpha, beta, read_dot [1,1,C];
    outputs: dq [1,r,K,T], dw [1,K,T] (if tied, the gradient of q), dk [1,C,K], dv [1,C,V], dalpha, dbeta [1,1,C];
    scratch: adjoint [T,V] (H), centre [1,T] (c).

    If all rows do not fit in VMEM, w, q, dout, dq and dw stay in HBM, and H is written there as `adjoints` [.,T,V].
    Then `adjoint` is [C,V], and tiles are copied through NAME_tiles [2, ...] (hbm.py).

    `last` [B, T/C]: the last chunk of rows that sees a chunk of columns.
    """
    columns = _Columns(refs, plan)
    sums = columns.over_later(last)
    row, column = columns.numbers
    sums = columns.own_reads(sums, both(row >= column, columns.seen_by(columns.j)))
    visible = both(row > column, columns.seen_by(columns.j))
    w = refs["own_w"][0]
    read_share = refs["read_share"][0].astype(jnp.float32) if plan.tied else None
    grad = columns.solve(sums.grad, w, read_share, visible)
    v = refs["v"][0].astype(jnp.float32)
    alpha = refs["alpha"][0, 0, :][:, None] if "alpha" in refs else None
    adjoint, centre = columns.adjoint_and_centre(grad, v if alpha is None else alpha * v, read_share)
    dkeys = columns.own_write(w, adjoint, centre, visible)
    columns.store(sums.dkeys_write + dkeys, sums.dkeys_read, grad, v, alpha)


class _Sums(NamedTuple):
    """The sums of a chunk of columns over the rows: of G [C,V], of dK through the write's scores and of dK through the
    reads' scores [C,K], neither multiplied by its scale yet."""

    grad: jax.Array
    dkeys_write: jax.Array
    dkeys_read: jax.Array


class _Rows(NamedTuple):
    """A tile of rows of the write or of a read: query, w or q [R,K]; cotangent, H or dO [R,V]; for softmax, the
    log-sum-exps and centre, c or D [1,R]."""

    query: Any
    cotangent: Any
    lse: jax.Array | None
    centre: jax.Array | None


class _Columns:
    """The chunk of columns of one grid step: its position, its keys and u, and the parts of the algorithm."""

    def __init__(self, refs, plan: Plan):
        self.refs, self.plan = refs, plan
        self.head, step = pl.program_id(0), pl.program_id(1)
        self.j = plan.steps - 1 - step
        self.keys, self.u = refs["keys"][0], refs["u"][0]
        self.keys_across = self.keys.astype(jnp.float32).T
        self.streamed = "adjoints" in refs
        self.reads = range(plan.group if plan.reads else 0)
        self.numbers = tile_numbers(plan.chunk)
        self.own = self.rows_of(self.j)
        self.segments = refs["segments"][0, 0, self.own][:, None] if "segments" in refs else None

    def rows_of(self, i):
        """The slice of chunk i in all rows."""
        return pl.ds(pl.multiple_of(i * self.plan.chunk, self.plan.chunk), self.plan.chunk)

    def seen_by(self, i):
        """[columns, rows] mask of equal segments, for the rows of chunk i; None without segments."""
        if self.segments is None:
            return None
        return self.segments == self.refs["segments"][0, :, self.rows_of(i)]

    def weights(self, kappa: Kappa, rows: _Rows, visible, form: TileProducts):
        """(scores, weights) of a tile."""
        scores = form.outer(self.keys, rows.query, self.plan.operand) * kappa.factor
        return scores, weights_again(kappa, scores, rows.lse, visible)

    def tile(self, kappa: Kappa, rows: _Rows, visible, dtype, form: TileProducts):
        """The contributions of a tile: to G [C,V], to dK [C,K], and to dW or dQ of its rows [K,R]."""
        scores, weights = self.weights(kappa, rows, visible, form)
        dots = form.outer(self.u, rows.cotangent, dtype)
        if kappa.normalised:
            dots = dots - rows.centre
        dscores = keep(visible, kappa.sloped(scores, weights, dots))
        return (
            form.tile_times(weights, rows.cotangent, dtype),
            form.tile_times(dscores, rows.query, dtype),
            form.times_tile(self.keys_across, dscores, dtype),
        )

    def write_tile(self, i, visible, query, adjoint, centre, form=WHOLE):
        """`tile` of the write, for row chunk i."""
        lse = self.refs["lse_write"][0, :, self.rows_of(i)] if self.plan.write.normalised else None
        return self.tile(self.plan.write, _Rows(query, adjoint, lse, centre), visible, self.plan.write_dtype, form)

    def read_tile(self, h, i, visible, query, dout, form=WHOLE):
        """`tile` of the read by query head h, for row chunk i."""
        lse = centre = None
        if self.plan.read.normalised:
            lse, centre = (self.refs[name][0, h : h + 1, self.rows_of(i)] for name in ("lse_read", "row_dot"))
        return self.tile(self.plan.read, _Rows(query, dout, lse, centre), visible, self.plan.read_dtype, form)

    def over_later(self, last) -> _Sums:
        """The sums over all later chunks of rows. Also adds to dW and dQ of these rows."""
        nothing = jnp.zeros(self.keys.shape, jnp.float32)
        sums = _Sums(self.refs["du"][0].astype(jnp.float32), nothing, nothing)
        start, stop = self.j + 1, last[self.plan.batch_row(self.head), self.j] + 1
        if self.streamed:
            return over_tiles(start, stop, self.hbm_tiles(), self.later, sums)
        return lax.fori_loop(start, stop, lambda i, sums: self.later(i, self.resident_tiles(i), sums), sums)

    def later(self, i, at, sums: _Sums) -> _Sums:
        """`sums` after row chunk i > j; `at` holds the chunk's tiles."""
        grad, dkeys_write, dkeys_read = sums
        visible = self.seen_by(i)
        w, adjoint, centre = at["w"][...], at["adjoint"][...], self.refs["centre"][:, self.rows_of(i)]
        more, dkeys, grow = self.write_tile(i, visible, w, adjoint, centre)
        at["dw"][...] += grow
        grad, dkeys_write = grad + more, dkeys_write + dkeys
        for h in self.reads:
            more, dkeys, grow = self.read_tile(h, i, visible, at["q"][h], at["dout"][h])
            at["dq"][h] += grow
            grad, dkeys_read = grad + more, dkeys_read + dkeys
        return _Sums(grad, dkeys_write, dkeys_read)

    def resident_tiles(self, i):
        """The tiles of row chunk i, if the arrays of all rows are in VMEM."""
        refs, rows = self.refs, self.rows_of(i)
        at = {
            "w": refs["w"].at[0, rows, :],
            "adjoint": refs["adjoint"].at[rows, :],
            "dw": refs["dw"].at[0, :, rows],
        }
        if self.reads:
            at |= {
                "q": refs["q"].at[0, :, rows, :],
                "dout": refs["dout"].at[0, :, rows, :],
                "dq": refs["dq"].at[0, :, :, rows],
            }
        return at

    def hbm_tiles(self):
        """The tiles, for `over_tiles`, if the arrays of all rows are in HBM."""
        head, rows_of, every = self.head, self.rows_of, slice(None)

        def tiles_of(name, array, index, writes=False):
            refs = self.refs
            return HbmTiles(refs[array], index, refs[f"{name}_tiles"], refs[f"{name}_semaphores"], writes)

        tiles = {
            "w": tiles_of("w", "w", lambda i: (self.plan.write_head(head), rows_of(i))),
            "adjoint": tiles_of("adjoint", "adjoints", lambda i: (head, rows_of(i))),
            "dw": tiles_of("dw", "dw", lambda i: (head, every, rows_of(i)), writes=True),
        }
        if self.reads:
            tiles |= {
                "q": tiles_of("q", "q", lambda i: (head, every, rows_of(i))),
                "dout": tiles_of("dout", "dout", lambda i: (head, every, rows_of(i))),
                "dq": tiles_of("dq", "dq", lambda i: (head, every, every, rows_of(i)), writes=True),
            }
        return tiles

    def own_reads(self, sums: _Sums, visible) -> _Sums:
        """`sums` after the reads of the chunk's own rows. The diagonal tile is the first that a row chunk takes part
        in, so it sets the rows' dQ instead of adding to it."""
        refs, (grad, dkeys_write, dkeys_read) = self.refs, sums
        for h in self.reads:
            query, dout = refs["own_q"][0, h], refs["own_dout"][0, h]
            more, dkeys, grow = self.read_tile(h, self.j, visible, query, dout, UPPER)
            grad, dkeys_read = grad + more, dkeys_read + dkeys
            if self.streamed:
                refs["dq_tiles"][0, h] = grow
            else:
                refs["dq"][0, h, :, self.own] = grow
        if self.streamed and self.reads:
            copy(refs["dq_tiles"].at[0], refs["dq"].at[self.head, :, :, self.own], refs["semaphore"])
        return _Sums(grad, dkeys_write, dkeys_read)

    def solve(self, incoming, w, read_share, visible):
        """G [C,V], the solution of (I + diag(β) A)ᵀ G = incoming, with A the weights of the chunk's own rows.
        `read_share`: ρ dO if tied, else None."""
        lse = self.refs["lse_write"][0, :, self.own] if self.plan.write.normalised else None
        _, across = self.weights(self.plan.write, _Rows(w, None, lse, None), visible, UPPER)  # Aᵀ
        if read_share is not None:
            incoming = incoming + upper_times(across, read_share, self.plan.write_dtype)
        system = across * self.refs["beta"][0] if "beta" in self.refs else across
        return solve_across_transposed(system, incoming.T, self.plan.write_dtype).T

    def adjoint_and_centre(self, grad, written, read_share):
        """(H [C,V], c [1,C]) of the chunk's own rows; `written` is α v [C,V]. Stores c for earlier columns."""
        refs = self.refs
        adjoint = -grad * refs["beta"][0, 0, :][:, None] if "beta" in refs else -grad
        centre = -jnp.sum(grad * (written - self.u), axis=1, keepdims=True)
        if read_share is not None:
            adjoint = adjoint + read_share
            centre = centre + refs["read_dot"][0, 0, :][:, None]
        adjoint, centre = adjoint.astype(refs["adjoint"].dtype), centre[:, 0][None, :]
        refs["centre"][:, self.own] = centre
        return adjoint, centre

    def own_write(self, w, adjoint, centre, visible):
        """dK [C,K] through the write of the chunk's own rows. Sets the rows' dW, and stores H for earlier columns."""
        refs = self.refs
        _, dkeys, grow = self.write_tile(self.j, visible, w, adjoint, centre, UPPER)
        if self.streamed:
            refs["adjoint"][...] = adjoint
            refs["dw_tiles"][0] = grow
            copy(refs["adjoint"], refs["adjoints"].at[self.head, self.own], refs["semaphore"])
            copy(refs["dw_tiles"].at[0], refs["dw"].at[self.head, :, self.own], refs["semaphore"])
        else:
            refs["adjoint"][self.own, :] = adjoint
            refs["dw"][0, :, self.own] = grow
        return dkeys

    def store(self, dkeys_write, dkeys_read, grad, v, alpha):
        """Stores the gradients of the chunk's columns: dK, dV, dα, dβ."""
        refs, write, read = self.refs, self.plan.write, self.plan.read
        refs["dk"][0] = dkeys_write * write.scale + (0.0 if read is None else dkeys_read * read.scale)
        refs["dv"][0] = grad if alpha is None else alpha * grad
        if "dalpha" in refs:
            refs["dalpha"][0, 0, :] = jnp.sum(v * grad, axis=1)
        if "dbeta" in refs:
            refs["dbeta"][0, 0, :] = -jnp.sum(grad * refs["summary"][0].astype(jnp.float32), axis=1)
