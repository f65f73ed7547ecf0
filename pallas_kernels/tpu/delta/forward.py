"""DeltaFormer's forward, one head of u at a time, chunk by chunk: the write, and the reads of it in the same pass.

    u_t = α_t v_t − β_t Σ_{i<t} κ₁(w_t, k_i) u_i,        o_t = Σ_{i≤t} κ₂(q_t, k_i) u_i

A chunk's rows go over the earlier chunks once: each tile of k and u is loaded once and serves w and every query head
that shares it. Then the chunk's own triangular system is solved, its u joins those in VMEM, and the reads take the
diagonal tile. Tied (w = q, one softmax for both): o = (1 − π) s + π u, so that the read costs nothing.

Tiles are columns × rows and sums [V, rows]: what belongs to a row is a row vector, its maximum and sum go down the
sublanes, and the unit that moves data across lanes has nothing to do. The matrix units are kept busy by the order of
the products (`product_in_tiles`): scores of 128 rows are done before the next rows' begin, so that one part's weights
are made while others are multiplied. The weighted sums stay in VMEM: a loop's carry would be copied at every step.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.tpu.delta.solve import solve_across
from pallas_kernels.tpu.delta.stream import Stream, copy, over_tiles
from pallas_kernels.tpu.delta.weights import (
    absorb_weights,
    both,
    inverse_normaliser,
    log_normaliser,
    shrunk,
    start,
)
from pallas_kernels.tpu.products import dot, product_in_tiles, quotient, times_upper, upper_product


def forward_kernel(first, refs, *, settings, chunk, group, group_of_batch, kv_head, operand, write_dtype, read_dtype):
    """One chunk of one head. refs: k [1,T,K]; keys, w [1,C,K], q [1,r,C,K], v [1,C,V], alpha, beta [1,1,C], rows and
    columns (segment ids [1,1,C], [1,1,T]); out: u [1,C,V], out [1,r,C,V], summary [1,C,V], lse_write [1,1,C],
    lse_read [1,r,C], share, rest [1,1,C]; scratch: values [V,T], sums [V,C]. Which there are, delta.py says.

    Past what VMEM holds k [.,T,K] stays in HBM and u goes there too, as `operand` [.,V,T]; `values` is [V,C] then, and
    tiles of both come through k_tiles [2,C,K] and u_tiles [2,V,C].

    `first` [B, T/C]: the first chunk that a chunk's rows see. `operand`: dtype of keys and queries; `write_dtype`,
    `read_dtype`: of the products with u. `kv_head`: head of u -> head of k.
    """
    write, read = settings.write, settings.read
    head, c = pl.program_id(0), pl.program_id(1)
    sums, streamed = refs["sums"], "operand" in refs

    def block(j):
        return pl.ds(pl.multiple_of(j * chunk, chunk), chunk)

    own = block(c)
    own_keys = refs["keys"].at[0]
    queries = [refs["q"].at[0, h] for h in range(group)] if "q" in refs else []
    w = refs["w"].at[0] if "w" in refs else queries[0] if settings.tied else own_keys
    reads = [] if settings.tied else queries

    def segment_mask(columns):
        if "rows" not in refs:
            return None
        return refs["columns"][0, 0, columns][:, None] == refs["rows"][0]

    def scores(kappa, rows, keys):
        return product_in_tiles(keys, rows, operand) * kappa.factor

    def own_scores(kappa, rows):
        return upper_product(own_keys, rows, operand) * kappa.factor

    def over_earlier(kappa, rows, dtype):
        """The maxima and normalisers of all earlier chunks; the weighted sums are left in `sums`."""
        sums[...] = jnp.zeros(sums.shape, jnp.float32)
        begin, running = first[quotient(head, group_of_batch), c], start(chunk)

        def step(columns, keys, values, running):
            visible = segment_mask(columns)
            weights, shrink, running = absorb_weights(kappa, running, scores(kappa, rows, keys), visible)
            sums[...] = shrunk(sums[...], shrink) + dot(values[...], weights, dtype)
            return running

        if streamed:
            streams = {
                "k": Stream(refs["k"], lambda j: (kv_head(head), block(j)), refs["k_tiles"], refs["k_semaphores"]),
                "u": Stream(
                    refs["operand"], lambda j: (head, slice(None), block(j)), refs["u_tiles"], refs["u_semaphores"]
                ),
            }
            return over_tiles(begin, c, streams, lambda j, at, x: step(block(j), at["k"], at["u"], x), running)

        def resident(j, running):
            columns = block(j)
            return step(columns, refs["k"].at[0, columns, :], refs["values"].at[:, columns], running)

        return lax.fori_loop(begin, c, resident, running)

    running = over_earlier(write, w, write_dtype)
    row = lax.broadcasted_iota(jnp.int32, (chunk, chunk), 1)
    column = lax.broadcasted_iota(jnp.int32, (chunk, chunk), 0)
    visible = both(row > column, segment_mask(own))
    write_scores = own_scores(write, w)
    weights, shrink, running = absorb_weights(write, running, write_scores, visible)
    inverse = inverse_normaliser(write, running)
    weights, past = weights * inverse, shrunk(sums[...], shrink) * inverse
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
        summary = past + times_upper(u, weights, write_dtype)
        refs["summary"][0] = summary.T.astype(refs["summary"].dtype)
    if settings.tied:
        score = jnp.sum(jnp.where(row == column, write_scores, 0.0), axis=0, keepdims=True)
        seen = running[1] > 0
        ahead = jnp.where(seen, log_normaliser(running) - score, 0.0)
        share = jnp.where(seen, 1.0 / (1.0 + jnp.exp2(ahead)), 1.0)
        rest = jnp.where(seen, 1.0 / (1.0 + jnp.exp2(-ahead)), 0.0)
        refs["out"][0, 0] = (rest * summary + share * u).T.astype(refs["out"].dtype)
        refs["share"][0], refs["rest"][0] = share, rest

    visible = both(row >= column, segment_mask(own))
    for h, rows in enumerate(reads):
        running = over_earlier(read, rows, read_dtype)
        weights, shrink, running = absorb_weights(read, running, own_scores(read, rows), visible)
        summed = shrunk(sums[...], shrink) + times_upper(u, weights, read_dtype)
        refs["out"][0, h] = (summed * inverse_normaliser(read, running)).T.astype(refs["out"].dtype)
        if "lse_read" in refs:
            refs["lse_read"][0, h : h + 1, :] = log_normaliser(running)
