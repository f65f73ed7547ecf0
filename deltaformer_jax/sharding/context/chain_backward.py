"""The transposed chain of DeltaFormer's write over devices: backward.

With M = I + diag(β) A and G = M⁻ᵀ dU (the equations are in `ops/deltaformer/chunked_write.py`), block b of G needs all
blocks after it:

    G_j = dU_j − Σ_{i>j} A_ij β_i G_i

Blocks are taken from the last to the first, in the forward pass's schedule. Columns stay on their device, and solved
rows travel: w, G, β, the log-sum-exp and D of the solved block. Each device subtracts their part from its own earlier
columns and adds up dK. The block's own dW and dβ are sums over all columns, which go back to the block's device in the
same step.

dU comes from the read, whose gradients need no chain: `ring_read.py`.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax

from deltaformer_jax.ops.common import tiles
from deltaformer_jax.ops.common.triangular import solve_unit_lower_transposed
from deltaformer_jax.ops.deltaformer.chunked_write import backward_tile, product_dtype, times
from deltaformer_jax.sharding.context.chain_forward import Chain, Dealt, Streams, put, strictly_earlier, take


def chain_backward(chain: Chain, streams: Streams, first, u, lse, du):
    """The gradients (dw, dk, dv, dalpha, dbeta) of the write for the cotangent du [g, n, t, V], all in the accumulation
    dtype. `first` [N] (`tiles.first_chunks`): the first block of columns that each block of rows can see."""
    _, w, k, v, alpha, beta, segments = streams
    size, similarity, scale = chain.blocks.rows, chain.write_similarity, chain.write_scale
    dtype, dealt = tiles.accumulation_dtype(k.dtype), Dealt(chain, forward=False)
    operand = product_dtype(similarity, k.dtype)

    def step(carry, s):
        rest, g, dw, dk, dbeta = carry
        turn = dealt.turn(s)
        j, i, live = turn
        at = lambda x: take(x, j, i, size)
        rows, ids, gate, normaliser = at(w), at(segments), at(beta), at(lse)

        def solve(g, dw, dk, dbeta):
            keys, values, visible = at(k), at(u), strictly_earlier(size, ids)
            scores = tiles.dot(rows, keys.mT, k.dtype) * scale
            weights = tiles.weights_again(similarity, scores, normaliser, visible)
            grad = solve_unit_lower_transposed(times(gate, weights), at(rest))
            written = times(at(alpha), at(v).astype(dtype))
            row_dot = -jnp.sum(grad * (written - values), axis=-1)
            arrays = (rows, keys, values, visible, normaliser, grad, gate, row_dot)
            weights, products, dscores = backward_tile(similarity, scale, *arrays)
            dk = put(dk, at(dk) + tiles.dot(dscores.mT, rows, operand), j, i)
            dw = put(dw, at(dw) + tiles.dot(dscores, keys, operand), j, i)
            dbeta = put(dbeta, at(dbeta) - jnp.sum(weights * products, axis=-1), j, i)
            return (put(g, grad, j, i), dw, dk, dbeta), row_dot

        skip = lambda *unchanged: (unchanged, jnp.zeros_like(normaliser))
        (g, dw, dk, dbeta), row_dot = lax.cond(live, solve, skip, g, dw, dk, dbeta)
        messages = dealt.exchange.to_all((rows, at(g).astype(operand), gate, normaliser, row_dot, ids), turn)

        def retreat(j, number, carry):
            rest, dk, parts = carry
            rows, grad, gate, normaliser, row_dot, row_ids = dealt.message(messages, j, number)
            part = tuple(tiles.zeros((1, *x.shape[2:]), dtype, v) for x in parts)

            def columns(i, carry):
                rest, dk, (dw, dbeta) = carry
                keys, values = take(k, j, i, size), take(u, j, i, size)
                visible = tiles.same_segment(row_ids, take(segments, j, i, size))
                arrays = (rows, keys, values, visible, normaliser, grad, gate, row_dot)
                weights, products, dscores = backward_tile(similarity, scale, *arrays)
                below = tiles.dot(weights.mT, times(gate, grad.astype(dtype)), operand)
                rest = put(rest, take(rest, j, i, size) - below, j, i)
                dk = put(dk, take(dk, j, i, size) + tiles.dot(dscores.mT, rows, operand), j, i)
                dw = dw + tiles.dot(dscores, keys, operand)
                return rest, dk, (dw, dbeta - jnp.sum(weights * products, axis=-1))

            bounds = dealt.own_before(first[number]), dealt.own_before(number)
            rest, dk, part = lax.fori_loop(*bounds, columns, (rest, dk, part))
            slot = dealt.exchange.slot(j, number)
            parts = tuple(lax.dynamic_update_index_in_dim(x, y, slot, 0) for x, y in zip(parts, part))
            return rest, dk, parts

        # What goes back to the devices: dW and dβ of the blocks that they have solved.
        shape = (dealt.exchange.slots, 1, k.shape[1], size)
        parts = (tiles.zeros((*shape, k.shape[3]), dtype, v), tiles.zeros(shape, dtype, v))
        rest, dk, parts = dealt.over_groups(s, retreat, (rest, dk, parts))
        own_dw, own_dbeta = dealt.exchange.to_owner(parts, turn)
        dw, dbeta = put(dw, at(dw) + own_dw, j, i), put(dbeta, at(dbeta) + own_dbeta, j, i)
        return (rest, g, dw, dk, dbeta), None

    zeros = lambda x: tiles.zeros(x.shape, dtype, v)
    start = (du.astype(dtype), zeros(v), zeros(w), zeros(k), zeros(lse))
    (_, g, dw, dk, dbeta), _ = lax.scan(step, start, dealt.steps)
    return dw, dk, times(alpha, g), jnp.sum(v.astype(dtype) * g, axis=-1), dbeta
