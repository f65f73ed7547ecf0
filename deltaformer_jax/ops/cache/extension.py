"""Continues an op from a cache: a block of new tokens attends to the cached tokens and to each other.

For a block of T tokens after N cached ones,

    U = (I + diag(β) A_new)⁻¹ (diag(α) V − diag(β) A_old U_old),      O = P_old U_old + P_new U

A row's similarity is normalised over both parts together. The parts, cached and new, stay separate arrays: to join them
would copy the scores. A block of one token is a decoding step. A prompt is processed block by block, so that at most
block × capacity scores per head exist at once. Work: O(T · capacity · (K+V)) per head.

JAX differentiates these functions itself. Heads are laid out [B, T, G, n, r, ·], with Hu = G·n write heads and
H = G·n·r query heads.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from deltaformer_jax.ops.cache.caches import (
    Entries,
    Selected,
    check_together,
    heads_apart,
    over_heads,
    slot_positions,
    store,
)
from deltaformer_jax.ops.common.score_decay import decay_between
from deltaformer_jax.ops.common.similarity import row_weights_of_parts
from deltaformer_jax.ops.common.tiles import accumulation_dtype, within
from deltaformer_jax.ops.common.triangular import solve_by_halves


def _einsum(equation, *arrays):
    """jnp.einsum that sums in the accumulation dtype. Arrays of different dtypes are cast to it first."""
    dtype = accumulation_dtype(arrays[0].dtype)
    if len({x.dtype for x in arrays}) > 1:
        arrays = [x.astype(dtype) for x in arrays]
    return jnp.einsum(equation, *arrays, precision=lax.Precision.HIGHEST, preferred_element_type=dtype)


def _scores(rows, old_keys, new_keys, scale):
    """Scores of rows [B,T,G,n,r,K] with the cached keys [B,G,N,K] and with the new keys [B,T,G,K]:
    ([B,G,n,r,T,N], [B,G,n,r,T,T])."""
    b, t, g, n, r, width = rows.shape
    rows = jnp.moveaxis(rows, 1, 4).reshape(b, g, n * r * t, width)
    old, new = _einsum("bgmk,bgsk->bgms", rows, old_keys), _einsum("bgmk,bsgk->bgms", rows, new_keys)
    return tuple(x.reshape(b, g, n, r, t, -1) * scale for x in (old, new))


def _values(weights, old, new):
    """Weights, [B,G,n,r,T,N] and [B,G,n,r,T,T], times the cached values [B,G,n,N,V] and the new values [B,T,G,n,V] ->
    [B,T,G,n,r,V]. `new` None: only the cached values are summed."""
    shape = weights[0].shape[:5]
    old_weights, new_weights = (x.reshape(*shape[:3], shape[3] * shape[4], -1) for x in weights)
    # The product's own order of axes: another one makes XLA transpose the whole cache instead of the small result.
    total = _einsum("bgnms,bgnsv->bgnmv", old_weights, old)
    if new is not None:
        total += _einsum("bgnms,bsgnv->bgnmv", new_weights, new)
    return jnp.moveaxis(total.reshape(*shape, -1), 4, 1)


def _new_positions(cache, real):
    """int32 [B, T]: the positions of new tokens."""
    return cache.length[:, None] + jnp.cumsum(real, axis=1, dtype=jnp.int32) - 1


def _biased(bias, scores, cache, real):
    """`scores`, a pair of parts [B,G,n,r,T,·], with the position bias of their G·n·r heads, which may be None."""
    if bias is None:
        return scores
    check_together(cache, "write_bias, read_bias and position_bias")
    position, slots = _new_positions(cache, real), slot_positions(cache)

    def of_part(scores, columns):
        b, g, n, r, t, _ = scores.shape
        ago = jnp.maximum(position[:, :, None] - columns[:, None, :], 0)
        return bias(scores.reshape(b, g * n * r, t, -1), ago, position)

    parts = [of_part(*part) for part in zip(scores, (slots, position))]
    whole = lambda x: jnp.broadcast_to(x, (real.shape[0], *x.shape[1:]))
    return [part + whole(x).reshape(part.shape) for x, part in zip(parts, scores)]


def _visible(cache, real, strict, window, lasting):
    """([B,1,1,1,T,N], [B,1,1,1,T,T]) bools: which cache slots and which new tokens each new token sees. `strict`
    excludes the token itself. `lasting` [B,T] or None: the new tokens that stay visible behind the window. Where heads
    are apart the first is [B,G,1,1,T,N]."""
    if heads_apart(cache):
        of_head = lambda one: _visible(one, real, strict, window, lasting)
        old, new = over_heads(of_head, cache, out_axes=(1, None))
        return old[:, :, 0], new
    position, slots = _new_positions(cache, real), slot_positions(cache)
    old = jnp.broadcast_to((slots >= 0)[:, None, :], (*real.shape, cache.capacity))
    index = jnp.arange(real.shape[1], dtype=jnp.int32)
    new = index[:, None] > index[None, :] if strict else index[:, None] >= index[None, :]
    new = new[None] & real[:, None, :]
    if window is not None:
        columns = cache.lasting[:, None, :] if isinstance(cache, Selected) else None
        old &= within(position[:, :, None] - slots[:, None, :], window, columns)
        columns = None if lasting is None else lasting[:, None, :]
        new &= within(position[:, :, None] - position[:, None, :], window, columns)
    return tuple((x & real[:, :, None])[:, None, None, None] for x in (old, new))


def _weights(similarity, scores, visible, dtype):
    """The similarity of rows whose scores are given in parts, for each part. Softmax weights are cast to `dtype`, the
    inputs' dtype; the weights of the other similarities stay in the accumulation dtype."""
    weights = row_weights_of_parts(similarity, scores, visible)
    return [x.astype(dtype) for x in weights] if similarity.normalised else weights


def extend_delta(cache, query, write_query, key, value, alpha, beta, lasting, real, plan, biases):
    """DeltaFormer of one block: (output [B,T,H,V], its Entries). `write_query` is [B,T,Hu,K]; `lasting` [B,T] or None;
    `real` [B,T] is False at padding; `biases` are `Biases`."""
    b, t, g, width = key.shape
    n = write_query.shape[2] // g
    group = query.shape[2] // (g * n)
    acc = accumulation_dtype(key.dtype)
    old_u = cache.value_by_head.reshape(b, g, n, cache.capacity, -1)
    gates = lambda x: jnp.ones((b, t, g, n), acc) if x is None else x.reshape(b, t, g, n).astype(acc)
    alpha, beta = gates(alpha), gates(beta)

    # Both products with the cached keys stand together, so that one program can make both and read the keys once.
    write_scores = _scores(write_query.reshape(b, t, g, n, 1, width), cache.key_by_head, key, plan.write_scale)
    read_scores = _scores(query.reshape(b, t, g, n, group, width), cache.key_by_head, key, plan.read_scale)
    write_scores = _biased(biases.write, write_scores, cache, real)
    visible = _visible(cache, real, True, plan.window, lasting)
    weights = _weights(plan.write_similarity, write_scores, visible, key.dtype)
    past = _values(weights, old_u, None)[:, :, :, :, 0]
    target = alpha[..., None] * value[:, :, :, None].astype(acc) - beta[..., None] * past
    new = weights[1][:, :, :, 0].astype(acc)
    if t > 1:
        # The solver reads only the strict lower triangle and takes the diagonal as 1.
        matrix = jnp.moveaxis(beta, 1, -1)[..., None] * new
        u = jnp.moveaxis(solve_by_halves(matrix, jnp.moveaxis(target, 1, 3)), 3, 1)
    else:
        u = target  # for a single token, I + diag(β) A_new is the identity

    read_scores = _biased(biases.read, read_scores, cache, real)
    visible = _visible(cache, real, False, plan.window, lasting)
    weights = _weights(plan.read_similarity, read_scores, visible, key.dtype)
    out = _values(weights, old_u, u)
    out = out.reshape(b, t, query.shape[2], -1).astype(value.dtype)
    return out, Entries(key, u.reshape(b, t, g * n, -1), real, lasting=lasting)


def extend_attention(cache, query, key, value, log_decay, lasting, real, sinks, similarity, scale, window, bias=None):
    """Softmax attention of one block: (output [B,T,H,V], its Entries). log_decay is [B,T,H] or None, lasting [B,T] or
    None, sinks [H] or None, bias a PositionBias or None."""
    b, t, g, width = key.shape
    scores = _scores(query.reshape(b, t, g, 1, -1, width), cache.key_by_head, key, scale)
    scores = _biased(bias, scores, cache, real)
    if log_decay is not None:
        decays = _decay(cache.decay_by_head, log_decay)
        scores = [x + decay.reshape(x.shape) for x, decay in zip(scores, decays)]
    visible = _visible(cache, real, False, window, lasting)
    if sinks is not None:
        # The sink is one more column of scores. Its value is 0, so it only adds e^b to the normaliser.
        column = sinks.astype(scores[0].dtype).reshape(1, g, 1, -1, 1, 1)
        column = jnp.broadcast_to(column, (*scores[0].shape[:-1], 1))
        scores, visible = (*scores, column), (*visible, jnp.ones_like(column, bool))
    weights = _weights(similarity, scores, visible, key.dtype)[:2]
    out = _values(weights, cache.value_by_head[:, :, None], value[:, :, :, None])
    return out.reshape(b, t, query.shape[2], -1).astype(value.dtype), Entries(key, value, real, log_decay, lasting)


def _decay(old, log_decay):
    """D, ([B,H,T,N], [B,H,T,T]): for each new token, the sum of the log decays after each cached and each new token up
    to it.

    old [B,H,N] is the cache's `decay_by_head`, the sums up to the block's start; log_decay is [B,T,H].
    """
    prefix = jnp.moveaxis(jnp.cumsum(log_decay, axis=1), 1, 2)
    among_new = jnp.moveaxis(decay_between(jnp.moveaxis(log_decay, 1, 0)), (2, 3), (0, 1))
    return old[:, :, None] + prefix[..., None], among_new


def extend_in_blocks(step, cache, arrays, size):
    """`step(cache, *arrays) -> (output, Entries)` over blocks of `size` tokens, each of which sees the blocks before:
    (output, the cache with all of them or, if it is read only, their Entries). The arrays are [B, T, …] or None.

    The last block is filled up with zeros. The last array is `real`, so that the filled rows are False there: padding.
    """
    length = arrays[0].shape[1]
    if size >= length:
        out, entries = step(cache, *arrays)
        return out, entries if cache.read_only else store(cache, entries)
    blocks = -(-length // size)

    def cut(x):
        x = jnp.pad(x, [(0, 0), (0, blocks * size - length)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], blocks, size, *x.shape[2:]), 1, 0)

    def joined(x):
        x = jnp.moveaxis(x, 0, 1)
        return x.reshape(x.shape[0], blocks * size, *x.shape[3:])[:, :length]

    def one(cache, block):
        out, entries = step(cache, *block)
        return store(cache, entries), (out, entries)

    after, parts = lax.scan(one, cache.with_arrays(read_only=False), jax.tree.map(cut, tuple(arrays)))
    out, entries = jax.tree.map(joined, parts)
    return out, entries if cache.read_only else after
