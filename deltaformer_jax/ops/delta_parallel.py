"""DeltaFormer as two T×T matrices, for reading and for small T:

    U = (I + diag(β) A)⁻¹ diag(α) V,      O = P₂ U

A the strictly lower triangular matrix of κ₁(w_i, k_j), P₂ the lower triangular one of κ₂(q_i, k_j).
Memory O(T²) a head. The system is solved by products, not by LAPACK: on a CPU with two threads jaxlib's batched
triangular solves wait for each other for ever where two of them can run at once, as forward and backward of one
program can (jaxlib 0.10.2). Source: Xu et al., DeltaFormer (NeurIPS 2025), section 3.
"""

from __future__ import annotations

import jax.numpy as jnp

from deltaformer_jax.ops.similarity import row_weights
from deltaformer_jax.ops.triangular import solve_by_halves


def _visible(segments, strict):
    row, column = jnp.arange(segments.shape[0])[:, None], jnp.arange(segments.shape[0])[None, :]
    visible = (column < row if strict else column <= row) & (segments[:, None] == segments[None, :])
    return visible & (segments != 0)[:, None]


def write_parallel(w, k, v, alpha, beta, segments, *, similarity, scale):
    """One head: w, k [T, K], v [T, V], alpha, beta, segments [T] -> u [T, V]."""
    weights = row_weights(similarity, w @ k.T * scale, _visible(segments, strict=True))
    return solve_by_halves(beta[:, None] * weights, alpha[:, None] * v)


def read_parallel(q, k, u, segments, *, similarity, scale):
    """One head of keys, r query heads: q [T, r, K], k [T, K], u [T, V], segments [T] -> o [T, r, V]."""
    visible = _visible(segments, strict=False)[:, None, :]
    scores = jnp.einsum("irk,jk->irj", q, k) * scale
    return row_weights(similarity, scores, jnp.broadcast_to(visible, scores.shape)) @ u
