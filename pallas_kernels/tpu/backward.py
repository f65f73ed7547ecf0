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

from pallas_kernels.tpu.products import NT, dot
from pallas_kernels.tpu.solve import solve_transposed
from pallas_kernels.tpu.weights import both, keep, weights_again


def backward_kernel(last, refs, *, settings, chunk, group, group_of_batch, steps, operand, write_dtype, read_dtype):
    """One chunk of columns of one head. refs: k, w [1,T,K], q [1,r,T,K], dout [1,r,T,V], lse_write, segments [1,1,T],
    lse_read, row_dot [1,r,T], of all rows; keys [1,C,K], u, du, summary, v, read_share [1,C,V], alpha, beta,
    read_dot [1,1,C], of the chunk; out: dq [1,r,K,T], dw [1,K,T], dk [1,C,K], dv [1,C,V], dalpha, dbeta [1,1,C];
    scratch: adjoint [T,V] (H), centre [1,T] (c). Which there are, delta.py says.

    `last` [B, T/C]: the last chunk of rows that sees a chunk of columns.
    """
    write, read = settings.write, settings.read
    head, step = pl.program_id(0), pl.program_id(1)
    j = steps - 1 - step
    own = pl.ds(pl.multiple_of(j * chunk, chunk), chunk)
    keys, u = refs["keys"][0], refs["u"][0]
    keys_across = keys.astype(jnp.float32).T
    all_w = refs["q"].at[0, 0] if settings.tied else refs["w"].at[0] if "w" in refs else refs["k"].at[0]
    column_segments = refs["segments"][0, 0, own][:, None] if "segments" in refs else None
    reads = range(0 if settings.tied or read is None else group)
    row = lax.broadcasted_iota(jnp.int32, (chunk, chunk), 1)
    column = lax.broadcasted_iota(jnp.int32, (chunk, chunk), 0)

    @pl.when(step == 0)
    def _():
        for name in ("dq", "dw"):
            if name in refs:
                refs[name][...] = jnp.zeros(refs[name].shape, jnp.float32)

    def rows_of(i):
        return pl.ds(pl.multiple_of(i * chunk, chunk), chunk)

    def segment_mask(i):
        return None if column_segments is None else column_segments == refs["segments"][0, :, rows_of(i)]

    def scores_and_weights(kappa, rows, lse, visible):
        scores = dot(keys, rows, operand, NT) * kappa.factor
        return scores, weights_again(kappa, scores, lse, visible)

    def write_tile(i, visible, adjoint, centre):
        """What row chunk i gives to G_j and dK_j; its dW is added where it grows."""
        rows, w = rows_of(i), all_w[rows_of(i), :]
        lse = refs["lse_write"][0, :, rows] if write.normalised else None
        scores, weights = scores_and_weights(write, w, lse, visible)
        dots = dot(u, adjoint, write_dtype, NT)
        if write.normalised:
            dots = dots - centre
        dscores = keep(visible, write.sloped(scores, weights, dots))
        grow = refs["dq"].at[0, 0] if settings.tied else refs["dw"].at[0]
        grow[:, rows] += dot(keys_across, dscores, write_dtype)
        return dot(weights, adjoint, write_dtype), dot(dscores, w, write_dtype)

    def read_tile(h, i, visible):
        rows = rows_of(i)
        q, dout = refs["q"][0, h, rows, :], refs["dout"][0, h, rows, :]
        lse = refs["lse_read"][0, h : h + 1, rows] if read.normalised else None
        scores, weights = scores_and_weights(read, q, lse, visible)
        dots = dot(u, dout, read_dtype, NT)
        if read.normalised:
            dots = dots - refs["row_dot"][0, h : h + 1, rows]
        dscores = keep(visible, read.sloped(scores, weights, dots))
        refs["dq"][0, h, :, rows] += dot(keys_across, dscores, read_dtype)
        return dot(weights, dout, read_dtype), dot(dscores, q, read_dtype)

    def add(a, b):
        return tuple(x + y for x, y in zip(a, b))

    def later(i, sums):
        incoming, dkeys_write, dkeys_read = sums
        visible = segment_mask(i)
        rows = rows_of(i)
        incoming, dkeys_write = add(
            (incoming, dkeys_write), write_tile(i, visible, refs["adjoint"][rows, :], refs["centre"][:, rows])
        )
        for h in reads:
            incoming, dkeys_read = add((incoming, dkeys_read), read_tile(h, i, visible))
        return incoming, dkeys_write, dkeys_read

    nothing = jnp.zeros(keys.shape, jnp.float32)
    sums = (refs["du"][0].astype(jnp.float32), nothing, nothing)
    sums = lax.fori_loop(j + 1, last[head // group_of_batch, j] + 1, later, sums)
    incoming, dkeys_write, dkeys_read = sums

    visible = both(row >= column, segment_mask(j))
    for h in reads:
        incoming, dkeys_read = add((incoming, dkeys_read), read_tile(h, j, visible))

    visible = both(row > column, segment_mask(j))
    w = all_w[own, :]
    lse = refs["lse_write"][0, :, own] if write.normalised else None
    _, across = scores_and_weights(write, w, lse, visible)  # Aᵀ
    if settings.tied:
        read_share = refs["read_share"][0].astype(jnp.float32)
        incoming = incoming + dot(across, read_share, write_dtype)
    beta = refs["beta"][0] if "beta" in refs else None  # [1, C]
    system = across if beta is None else across * beta
    grad = solve_transposed(system.T, incoming, write_dtype)

    v = refs["v"][0].astype(jnp.float32)
    alpha = refs["alpha"][0, 0, :][:, None] if "alpha" in refs else None
    written = v if alpha is None else alpha * v
    adjoint = -grad if beta is None else -grad * refs["beta"][0, 0, :][:, None]
    centre = -jnp.sum(grad * (written - u), axis=1, keepdims=True)
    if settings.tied:
        adjoint = adjoint + read_share
        centre = centre + refs["read_dot"][0, 0, :][:, None]
    adjoint, centre = adjoint.astype(refs["adjoint"].dtype), centre[:, 0][None, :]
    refs["adjoint"][own, :], refs["centre"][:, own] = adjoint, centre
    _, dkeys = write_tile(j, visible, adjoint, centre)

    refs["dk"][0] = (dkeys_write + dkeys) * write.scale + (0.0 if read is None else dkeys_read * read.scale)
    refs["dv"][0] = grad if alpha is None else alpha * grad
    if "dalpha" in refs:
        refs["dalpha"][0, 0, :] = jnp.sum(v * grad, axis=1)
    if "dbeta" in refs:
        refs["dbeta"][0, 0, :] = -jnp.sum(grad * refs["summary"][0].astype(jnp.float32), axis=1)
