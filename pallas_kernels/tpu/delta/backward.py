"""DeltaFormer's backward, one head of u at a time: one sweep over chunks of columns, from the last to the first.

With G = M⁻ᵀ dU, the adjoint of the written values, and for each row i, over the columns j it sees,

    H_i = −β_i G_i,    c_i = −G_i·(α_i v_i − u_i)  for softmax, else 0
    G_j  = dU_j + Σ_{i≥j} κ₂(q_i, k_j) dO_i + Σ_{i>j} A_ij H_i           inside the chunk a transposed solve
    dS_ij = κ₁'(s_ij) (H_i·u_j − c_i),      dR_ij = κ₂'(r_ij) (dO_i·u_j − D_i),   D_i = dO_i·o_i for softmax, else 0
    dV = α G,  dα = v·G,  dβ = −G·s,  dK = Σ_i dSᵀ w + dRᵀ q,  dW = dS K,  dQ = dR K

Tied: H_i = ρ_i dO_i − β_i G_i and c_i = ρ_i D_i + c_i serve for both, and G_j has Σ_{i>j} P_ij ρ_i dO_i in it by H.

Tiles are columns × rows, so that what belongs to a row is a row vector and no tile is transposed: dQ and dW grow as
[K, T]. Source: derived for this project from Xu et al., DeltaFormer (NeurIPS 2025), eq. 8 and 9.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.tpu.delta.solve import solve_across_transposed
from pallas_kernels.tpu.delta.stream import Stream, copy, over_tiles
from pallas_kernels.tpu.delta.weights import both, keep, weights_again
from pallas_kernels.tpu.products import UPPER, WHOLE, quotient, upper_times


def backward_kernel(
    last, refs, *, settings, chunk, group, group_of_batch, write_head, steps, operand, write_dtype, read_dtype
):
    """One chunk of columns of one head. refs, of all rows: w [1,T,K] (the write query, be it k or q), q [1,r,T,K],
    dout [1,r,T,V]; lse_write, segments [1,1,T], lse_read, row_dot [1,r,T]; of the chunk: keys, own_w [1,C,K],
    own_q [1,r,C,K], own_dout [1,r,C,V], u, du, summary, v, read_share [1,C,V], alpha, beta, read_dot [1,1,C]; out:
    dq [1,r,K,T], dw [1,K,T], dk [1,C,K], dv [1,C,V], dalpha, dbeta [1,1,C]; scratch: adjoint [T,V] (H), centre [1,T]
    (c). Which there are, delta.py says. With `tied` dw is the gradient of q.

    Past what VMEM holds, the arrays of all rows, dq and dw stay in HBM, and H goes there as `adjoints` [.,T,V];
    `adjoint` is [C,V] then, and tiles come through NAME_tiles [2, ...].

    `last` [B, T/C]: the last chunk of rows that sees a chunk of columns. `write_head`: head of u -> head of w.
    """
    write, read = settings.write, settings.read
    head, step = pl.program_id(0), pl.program_id(1)
    j = steps - 1 - step
    keys, u = refs["keys"][0], refs["u"][0]
    keys_across = keys.astype(jnp.float32).T
    streamed = "adjoints" in refs
    reads = range(0 if settings.tied or read is None else group)
    row = lax.broadcasted_iota(jnp.int32, (chunk, chunk), 1)
    column = lax.broadcasted_iota(jnp.int32, (chunk, chunk), 0)

    def rows_of(i):
        return pl.ds(pl.multiple_of(i * chunk, chunk), chunk)

    own = rows_of(j)
    column_segments = refs["segments"][0, 0, own][:, None] if "segments" in refs else None

    def segment_mask(i):
        return None if column_segments is None else column_segments == refs["segments"][0, :, rows_of(i)]

    def scores_and_weights(kappa, rows, lse, visible, by):
        scores = by.outer(keys, rows, operand) * kappa.factor
        return scores, weights_again(kappa, scores, lse, visible)

    def write_tile(i, visible, w, adjoint, centre, by=WHOLE):
        """What row chunk i gives to G_j and dK_j, and what it gets: its part of dW, [K, C]."""
        lse = refs["lse_write"][0, :, rows_of(i)] if write.normalised else None
        scores, weights = scores_and_weights(write, w, lse, visible, by)
        dots = by.outer(u, adjoint, write_dtype)
        if write.normalised:
            dots = dots - centre
        dscores = keep(visible, write.sloped(scores, weights, dots))
        return (
            by.tile_times(weights, adjoint, write_dtype),
            by.tile_times(dscores, w, write_dtype),
            by.times_tile(keys_across, dscores, write_dtype),
        )

    def read_tile(h, i, visible, q, dout, by=WHOLE):
        """The same for one of the query heads."""
        lse = refs["lse_read"][0, h : h + 1, rows_of(i)] if read.normalised else None
        scores, weights = scores_and_weights(read, q, lse, visible, by)
        dots = by.outer(u, dout, read_dtype)
        if read.normalised:
            dots = dots - refs["row_dot"][0, h : h + 1, rows_of(i)]
        dscores = keep(visible, read.sloped(scores, weights, dots))
        return (
            by.tile_times(weights, dout, read_dtype),
            by.tile_times(dscores, q, read_dtype),
            by.times_tile(keys_across, dscores, read_dtype),
        )

    def later(i, at, sums):
        """Row chunk i > j; `at` are its tiles."""
        incoming, dkeys_write, dkeys_read = sums
        visible = segment_mask(i)
        more, dkeys, grow = write_tile(i, visible, at["w"][...], at["adjoint"][...], refs["centre"][:, rows_of(i)])
        at["dw"][...] += grow
        incoming, dkeys_write = incoming + more, dkeys_write + dkeys
        for h in reads:
            more, dkeys, grow = read_tile(h, i, visible, at["q"][h], at["dout"][h])
            at["dq"][h] += grow
            incoming, dkeys_read = incoming + more, dkeys_read + dkeys
        return incoming, dkeys_write, dkeys_read

    def resident(i, sums):
        rows = rows_of(i)
        at = {
            "w": refs["w"].at[0, rows, :],
            "adjoint": refs["adjoint"].at[rows, :],
            "dw": refs["dw"].at[0, :, rows],
        }
        if reads:
            at |= {
                "q": refs["q"].at[0, :, rows, :],
                "dout": refs["dout"].at[0, :, rows, :],
                "dq": refs["dq"].at[0, :, :, rows],
            }
        return later(i, at, sums)

    def tiles_of(name, array, index, writes=False):
        return Stream(refs[array], index, refs[f"{name}_tiles"], refs[f"{name}_semaphores"], writes)

    nothing = jnp.zeros(keys.shape, jnp.float32)
    sums = (refs["du"][0].astype(jnp.float32), nothing, nothing)
    start, stop = j + 1, last[quotient(head, group_of_batch), j] + 1
    if streamed:
        tiles = {
            "w": tiles_of("w", "w", lambda i: (write_head(head), rows_of(i))),
            "adjoint": tiles_of("adjoint", "adjoints", lambda i: (head, rows_of(i))),
            "dw": tiles_of("dw", "dw", lambda i: (head, slice(None), rows_of(i)), writes=True),
        }
        if reads:
            every = slice(None)
            tiles |= {
                "q": tiles_of("q", "q", lambda i: (head, every, rows_of(i))),
                "dout": tiles_of("dout", "dout", lambda i: (head, every, rows_of(i))),
                "dq": tiles_of("dq", "dq", lambda i: (head, every, every, rows_of(i)), writes=True),
            }
        sums = over_tiles(start, stop, tiles, later, sums)
    else:
        sums = lax.fori_loop(start, stop, resident, sums)
    incoming, dkeys_write, dkeys_read = sums

    visible = both(row >= column, segment_mask(j))
    for h in reads:
        more, dkeys, grow = read_tile(h, j, visible, refs["own_q"][0, h], refs["own_dout"][0, h], UPPER)
        incoming, dkeys_read = incoming + more, dkeys_read + dkeys
        # The diagonal is the first that a row chunk meets, and begins its sum.
        if streamed:
            refs["dq_tiles"][0, h] = grow
        else:
            refs["dq"][0, h, :, own] = grow
    if streamed and reads:
        copy(refs["dq_tiles"].at[0], refs["dq"].at[head, :, :, own], refs["semaphore"])

    visible = both(row > column, segment_mask(j))
    w = refs["own_w"][0]
    lse = refs["lse_write"][0, :, own] if write.normalised else None
    _, across = scores_and_weights(write, w, lse, visible, UPPER)  # Aᵀ
    if settings.tied:
        read_share = refs["read_share"][0].astype(jnp.float32)
        incoming = incoming + upper_times(across, read_share, write_dtype)
    beta = refs["beta"][0] if "beta" in refs else None  # [1, C]
    system = across if beta is None else across * beta
    grad = solve_across_transposed(system, incoming.T, write_dtype).T

    v = refs["v"][0].astype(jnp.float32)
    alpha = refs["alpha"][0, 0, :][:, None] if "alpha" in refs else None
    written = v if alpha is None else alpha * v
    adjoint = -grad if beta is None else -grad * refs["beta"][0, 0, :][:, None]
    centre = -jnp.sum(grad * (written - u), axis=1, keepdims=True)
    if settings.tied:
        adjoint = adjoint + read_share
        centre = centre + refs["read_dot"][0, 0, :][:, None]
    adjoint, centre = adjoint.astype(refs["adjoint"].dtype), centre[:, 0][None, :]
    refs["centre"][:, own] = centre
    _, dkeys, grow = write_tile(j, visible, w, adjoint, centre, UPPER)
    if streamed:
        refs["adjoint"][...] = adjoint
        refs["dw_tiles"][0] = grow
        copy(refs["adjoint"], refs["adjoints"].at[head, own], refs["semaphore"])
        copy(refs["dw_tiles"].at[0], refs["dw"].at[head, :, own], refs["semaphore"])
    else:
        refs["adjoint"][own, :] = adjoint
        refs["dw"][0, :, own] = grow

    refs["dk"][0] = (dkeys_write + dkeys) * write.scale + (0.0 if read is None else dkeys_read * read.scale)
    refs["dv"][0] = grad if alpha is None else alpha * grad
    if "dalpha" in refs:
        refs["dalpha"][0, 0, :] = jnp.sum(v * grad, axis=1)
    if "dbeta" in refs:
        refs["dbeta"][0, 0, :] = -jnp.sum(grad * refs["summary"][0].astype(jnp.float32), axis=1)
