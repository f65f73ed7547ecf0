"""DeltaFormer's forward kernel on a TPU: the write, and the reads in the same pass.

    u_t = α_t v_t − β_t Σ_{i<t} κ₁(w_t, k_i) u_i,        o_t = Σ_{i≤t} κ₂(q_t, k_i) u_i

Grid: (B Hu heads of u, chunks). The chunks of a head run in order, because a chunk needs u of the earlier chunks, which
stays in VMEM. A step computes one chunk of rows: it sums over the earlier chunks for the write query, solves the
chunk's own triangular system, stores u, and then sums over the earlier and the own chunk for each query head that
shares the head of u. If tied (w = q, one softmax for both), the read is o = (1 − π) s + π u and needs no sums of its
own.

Tiles of scores are laid out columns × rows, and sums are [V, rows]. Numbers per row are then row vectors, and maximum
and sum of a row are reductions over sublanes, which do not use the cross-lane unit. The order of the products
(`product_in_tiles`) keeps the matrix units busy: the scores of some rows are complete before those of the next rows
begin, so that their weights are computed while other scores are multiplied. The weighted sums are in scratch memory,
because a loop's carry would be copied at every step.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.tpu.delta.hbm import HbmTiles, copy, over_tiles
from pallas_kernels.tpu.delta.kappa import absorb, both, inverse_normaliser, log_normaliser, nothing_seen, shrunk
from pallas_kernels.tpu.delta.layout import Plan
from pallas_kernels.tpu.delta.triangular import solve_across
from pallas_kernels.tpu.matrix_unit import dot, product_in_tiles, tile_numbers, times_upper, upper_product


def forward_kernel(first, refs, *, plan: Plan):
    """Computes one chunk of one head of u. The refs (forward_call.py says which are present):

    inputs: k [1,T,K], all keys; keys (the chunk's), w [1,C,K], q [1,r,C,K], v [1,C,V], alpha, beta [1,1,C]; segment ids
      of the chunk and of all tokens, rows [1,1,C] and columns [1,1,T];
    outputs: u [1,C,V], out [1,r,C,V], summary (s) [1,C,V], lse_write [1,1,C], lse_read [1,r,C], share (π), rest (1 − π)
      [1,1,C];
    scratch: values [V,T], u of all chunks so far; sums [V,C], the weighted sums.

    If all rows do not fit in VMEM, k [.,T,K] stays in HBM, and u is written to HBM too, as `u_operand` [.,V,T]. Then
    `values` is [V,C], and tiles of k and u are copied through k_tiles [2,C,K] and u_tiles [2,V,C] (hbm.py).

    `first` [B, T/C]: the first chunk that a chunk's rows see.
    """
    rows = _Rows(refs, plan, first)
    running = rows.over_earlier(plan.write, rows.w, plan.write_dtype)
    row, column = tile_numbers(plan.chunk)
    u = rows.write(running, row, column)
    visible = both(row >= column, rows.sees(rows.own))
    for h, query in enumerate(rows.queries if plan.reads else []):
        rows.read(h, query, u, visible)


class _Rows:
    """The chunk of rows of one grid step: its position, its queries, and the parts of the algorithm."""

    def __init__(self, refs, plan: Plan, first):
        self.refs, self.plan, self.first = refs, plan, first
        self.head, self.c = pl.program_id(0), pl.program_id(1)
        self.streamed = "u_operand" in refs
        self.own = self.block(self.c)
        self.keys = refs["keys"].at[0]
        self.queries = [refs["q"].at[0, h] for h in range(plan.group)] if "q" in refs else []
        self.w = refs["w"].at[0] if "w" in refs else self.queries[0] if plan.tied else self.keys

    def block(self, j):
        """The slice of chunk j in all rows."""
        return pl.ds(pl.multiple_of(j * self.plan.chunk, self.plan.chunk), self.plan.chunk)

    def sees(self, columns):
        """[columns, rows] mask of equal segments; None without segments."""
        if "rows" not in self.refs:
            return None
        return self.refs["columns"][0, 0, columns][:, None] == self.refs["rows"][0]

    def over_earlier(self, kappa, queries, dtype):
        """The running maxima and normalisers over all earlier chunks. The weighted sums are left in the ref `sums`."""
        refs, sums = self.refs, self.refs["sums"]
        sums[...] = jnp.zeros(sums.shape, jnp.float32)
        begin, running = self.first[self.plan.batch_row(self.head), self.c], nothing_seen(self.plan.chunk)

        def step(columns, keys, values, running):
            visible = self.sees(columns)
            scores = product_in_tiles(keys, queries, self.plan.operand) * kappa.factor
            weights, shrink, running = absorb(kappa, running, scores, visible)
            sums[...] = shrunk(sums[...], shrink) + dot(values[...], weights, dtype)
            return running

        def resident(j, running):
            columns = self.block(j)
            return step(columns, refs["k"].at[0, columns, :], refs["values"].at[:, columns], running)

        if not self.streamed:
            return lax.fori_loop(begin, self.c, resident, running)
        of_k = lambda j: (self.plan.kv_head(self.head), self.block(j))
        of_u = lambda j: (self.head, slice(None), self.block(j))
        tiles = {
            "k": HbmTiles(refs["k"], of_k, refs["k_tiles"], refs["k_semaphores"]),
            "u": HbmTiles(refs["u_operand"], of_u, refs["u_tiles"], refs["u_semaphores"]),
        }
        return over_tiles(begin, self.c, tiles, lambda j, at, x: step(self.block(j), at["k"], at["u"], x), running)

    def own_scores(self, kappa, queries):
        return upper_product(self.keys, queries, self.plan.operand) * kappa.factor

    def write(self, running, row, column):
        """u [V, C] of the chunk. Also stores everything that the backward pass, the reads and later chunks need.
        `running`: the maxima and normalisers over the earlier chunks."""
        refs, kappa = self.refs, self.plan.write
        visible = both(row > column, self.sees(self.own))
        scores = self.own_scores(kappa, self.w)
        weights, shrink, running = absorb(kappa, running, scores, visible)
        inverse = inverse_normaliser(kappa, running)
        weights, past = weights * inverse, shrunk(refs["sums"][...], shrink) * inverse
        u = self.solve(weights, past)
        refs["u"][0] = u.T
        self.keep_for_later(u)
        if "lse_write" in refs:
            refs["lse_write"][0] = log_normaliser(running)
        summary = None
        if "summary" in refs:
            summary = past + times_upper(u, weights, self.plan.write_dtype)
            refs["summary"][0] = summary.T.astype(refs["summary"].dtype)
        if self.plan.tied:
            score = jnp.sum(jnp.where(row == column, scores, 0.0), axis=0, keepdims=True)
            self.read_tied(score, running, summary, u)
        return u

    def solve(self, weights, past):
        """u [V, C], the solution of u (I + diag(β) A)ᵀ = α v − β past; A is `weights`, of the chunk's own columns."""
        refs = self.refs
        target = refs["v"][0].astype(jnp.float32).T
        if "alpha" in refs:
            target = target * refs["alpha"][0]
        system, forced = weights, past
        if "beta" in refs:
            beta = refs["beta"][0]
            system, forced = weights * beta, past * beta
        return solve_across(system, target - forced, self.plan.write_dtype)

    def keep_for_later(self, u):
        """Stores u for later chunks: in VMEM, or in HBM if streamed."""
        refs = self.refs
        if self.streamed:
            refs["values"][...] = u.astype(refs["values"].dtype)
            copy(refs["values"], refs["u_operand"].at[self.head, :, self.own], refs["semaphore"])
        else:
            refs["values"][:, self.own] = u.astype(refs["values"].dtype)

    def read_tied(self, score, running, summary, u):
        """Stores out, π and 1 − π. π is the weight of a row's own column, whose score is `score`, in the row's read."""
        refs = self.refs
        seen = running[1] > 0
        ahead = jnp.where(seen, log_normaliser(running) - score, 0.0)
        share = jnp.where(seen, 1.0 / (1.0 + jnp.exp2(ahead)), 1.0)
        rest = jnp.where(seen, 1.0 / (1.0 + jnp.exp2(-ahead)), 0.0)
        refs["out"][0, 0] = (rest * summary + share * u).T.astype(refs["out"].dtype)
        refs["share"][0], refs["rest"][0] = share, rest

    def read(self, h, query, u, visible):
        """Computes and stores out of query head h."""
        refs, kappa, dtype = self.refs, self.plan.read, self.plan.read_dtype
        running = self.over_earlier(kappa, query, dtype)
        weights, shrink, running = absorb(kappa, running, self.own_scores(kappa, query), visible)
        summed = shrunk(refs["sums"][...], shrink) + times_upper(u, weights, dtype)
        refs["out"][0, h] = (summed * inverse_normaliser(kappa, running)).T.astype(refs["out"].dtype)
        if "lse_read" in refs:
            refs["lse_read"][0, h : h + 1, :] = log_normaliser(running)
