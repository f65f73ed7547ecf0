"""DeltaFormer's forward, one head of u at a time, chunk by chunk: the write, and the reads of it in the same pass.

    u_t = α_t v_t − β_t Σ_{i<t} κ₁(w_t, k_i) u_i,        o_t = Σ_{i≤t} κ₂(q_t, k_i) u_i

A chunk's rows go over the earlier chunks once: each tile of k and u is loaded once and serves w and every query head
that shares it. Then the chunk's own triangular system is solved, its u joins those in VMEM, and the reads take the
diagonal tile. Tied (w = q, one softmax for both): o = (1 − π) s + π u, so that the read costs nothing.

Tiles are columns × rows and sums [V, rows]: what belongs to a row is a row vector, its maximum and sum go down the
sublanes, and the unit that moves data across lanes has nothing to do.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.tpu.products import NT, dot, quotient
from pallas_kernels.tpu.solve import solve_across
from pallas_kernels.tpu.stream import Stream, copy, over_tiles
from pallas_kernels.tpu.weights import (
    absorb_weights,
    both,
    inverse_normaliser,
    log_normaliser,
    start_sum,
)

# Columns of the longest tile: on v5e two of 512 take 2690 bundles, one of 1024 2640.
LONGEST = 1024


def forward_kernel(
    first, refs, *, settings, chunk, group, group_of_batch, kv_head, operand, write_dtype, read_dtype
):
    """One chunk of one head. refs: k [1,T,K]; keys, w [1,C,K], q [1,r,C,K], v [1,C,V], alpha, beta [1,1,C], rows and
    columns (segment ids [1,1,C], [1,1,T]); out: u [1,C,V], out [1,r,C,V], summary [1,C,V], lse_write [1,1,C],
    lse_read [1,r,C], share, rest [1,1,C]; scratch: values [V,T]. Which there are, delta.py says.

    Past what VMEM holds k [.,T,K] stays in HBM and u goes there too, as `operand` [.,V,T]; `values` is [V,C] then, and
    tiles of both come through k_tiles [2,C,K] and u_tiles [2,V,C].

    `first` [B, T/C]: the first chunk that a chunk's rows see. `operand`: dtype of keys and queries; `write_dtype`,
    `read_dtype`: of the products with u. `kv_head`: head of u -> head of k.
    """
    write, read = settings.write, settings.read
    head, c = pl.program_id(0), pl.program_id(1)
    own = pl.ds(pl.multiple_of(c * chunk, chunk), chunk)
    width = refs["u"].shape[2]
    streamed = "operand" in refs

    def block(j, chunks=1):
        return pl.ds(pl.multiple_of(j * chunk, chunk), chunks * chunk)

    # In chunks; no longer than what there is before the last one.
    longest = max(1, min(LONGEST // chunk, refs["k"].shape[1] // chunk - 1))
    lengths = [2**n for n in reversed(range(longest.bit_length()))]
    own_keys = refs["keys"][0]
    queries = [refs["q"][0, h] for h in range(group)] if "q" in refs else []
    w = refs["w"][0] if "w" in refs else queries[0] if settings.tied else own_keys
    reads = [] if settings.tied else queries

    def segment_mask(columns):
        if "rows" not in refs:
            return None
        return refs["columns"][0, 0, columns][:, None] == refs["rows"][0]

    def scores(kappa, rows, keys):
        return dot(keys, rows, operand, NT) * kappa.factor

    def absorb(kappa, running, rows, keys, values, visible, dtype):
        weights, running = absorb_weights(kappa, running, scores(kappa, rows, keys), visible)
        return *running[:2], running[2] + dot(values, weights, dtype)

    def over_earlier(kappa, rows, dtype):
        """The sums of all earlier chunks."""
        done, running = first[quotient(head, group_of_batch), c], start_sum(width, chunk)

        def step(columns, keys, values, running):
            return absorb(kappa, running, rows, keys, values, segment_mask(columns), dtype)

        if streamed:
            place = lambda j: (head, slice(None), block(j))
            tiles = {
                "k": Stream(refs["k"], lambda j: (kv_head(head), block(j)), refs["k_tiles"], refs["k_semaphores"]),
                "u": Stream(refs["operand"], place, refs["u_tiles"], refs["u_semaphores"]),
            }
            return over_tiles(done, c, tiles, lambda j, at, x: step(block(j), at["k"][...], at["u"][...], x), running)
        for chunks in lengths:
            start, count = done, quotient(c - done, chunks)

            def tile(n, running, start=start, chunks=chunks):
                columns = block(start + n * chunks, chunks)
                return step(columns, refs["k"][0, columns, :], refs["values"][:, columns], running)

            running = lax.fori_loop(0, count, tile, running)
            done = start + count * chunks
        return running

    running = over_earlier(write, w, write_dtype)
    row = lax.broadcasted_iota(jnp.int32, (chunk, chunk), 1)
    column = lax.broadcasted_iota(jnp.int32, (chunk, chunk), 0)
    visible = both(row > column, segment_mask(own))
    own_scores = scores(write, w, own_keys)
    weights, running = absorb_weights(write, running, own_scores, visible)
    inverse = inverse_normaliser(write, running)
    weights, past = weights * inverse, running[2] * inverse
    target = refs["v"][0].astype(jnp.float32).T
    if "alpha" in refs:
        target = target * refs["alpha"][0]
    system, forced = weights, past
    if "beta" in refs:
        beta = refs["beta"][0]
        system, forced = weights * beta, past * beta
    u = solve_across(system, target - forced, write_dtype)
    refs["u"][0] = u.T
    if streamed:
        refs["values"][...] = u.astype(refs["values"].dtype)
        copy(refs["values"], refs["operand"].at[head, :, own], refs["semaphore"])
    else:
        refs["values"][:, own] = u.astype(refs["values"].dtype)
    if "lse_write" in refs:
        refs["lse_write"][0] = log_normaliser(running)
    summary = None
    if "summary" in refs:
        summary = past + dot(u, weights, write_dtype)
        refs["summary"][0] = summary.T.astype(refs["summary"].dtype)
    if settings.tied:
        score = jnp.sum(jnp.where(row == column, own_scores, 0.0), axis=0, keepdims=True)
        seen = running[1] > 0
        ahead = jnp.where(seen, log_normaliser(running) - score, 0.0)
        share = jnp.where(seen, 1.0 / (1.0 + jnp.exp2(ahead)), 1.0)
        rest = jnp.where(seen, 1.0 / (1.0 + jnp.exp2(-ahead)), 0.0)
        refs["out"][0, 0] = (rest * summary + share * u).T.astype(refs["out"].dtype)
        refs["share"][0], refs["rest"][0] = share, rest

    visible = both(row >= column, segment_mask(own))
    for h, rows in enumerate(reads):
        running = over_earlier(read, rows, read_dtype)
        running = absorb(read, running, rows, own_keys, u, visible, read_dtype)
        refs["out"][0, h] = (running[2] * inverse_normaliser(read, running)).T.astype(refs["out"].dtype)
        if "lse_read" in refs:
            refs["lse_read"][0, h : h + 1, :] = log_normaliser(running)
