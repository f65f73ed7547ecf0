"""Parts of the chunked forms: tiles of rows and columns, matrix products, and running softmax sums (online softmax).

Arrays are [B, h, T, width] or [B, h, T], with T a multiple of the chunk size. Arrays that all heads share, such as
segment ids, are [B, 1, T]. The functions handle batch and heads themselves instead of one head under vmap, because JAX
traces a loop several times under vmap and turns slices into gathers.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from deltaformer_jax.ops.common.similarity import LOWEST


def accumulation_dtype(dtype) -> jnp.dtype:
    """The dtype of sums, states and log-sum-exps: float64 for float64, float32 for everything narrower."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def default_chunk(length: int, window: int | None = None) -> int:
    """512 rows, or `length` if that is less. Matrix products dominate at this size, and a tile fits a CPU's cache.

    With a window, a quarter of the power of two that holds it, from 128 to 512: larger chunks would compute more scores
    outside the window, and smaller ones are slower for each score.
    """
    most = 512 if window is None else min(512, max(128, (1 << (window - 1).bit_length()) // 4))
    return min(most, length)


def dot(a, b, operand_dtype):
    """a·b with operands rounded to `operand_dtype` and sums in its accumulation dtype.

    float32 operands are multiplied in full float32, not in TF32 or bfloat16 passes.
    """
    return jnp.matmul(
        a.astype(operand_dtype),
        b.astype(operand_dtype),
        precision=lax.Precision.HIGHEST,
        preferred_element_type=accumulation_dtype(operand_dtype),
    )


def scale_rows(rows, scale):
    """(rows, factor): the rows, scaled if that loses no digits, and the factor that the scores must still be scaled by.

    The rows are scaled if they have the accumulation dtype; the factor is then 1. Scaling the rows is cheaper: on a CPU
    scaling a tile of scores makes another array of the tile's size.
    """
    return (rows * scale, 1) if rows.dtype == accumulation_dtype(rows.dtype) else (rows, scale)


def take(x, i, size):
    """Rows i·size … (i+1)·size of x [B, h, T, …]; None stays None."""
    return None if x is None else lax.dynamic_slice_in_dim(x, i * size, size, axis=2)


def put(x, tile, i):
    """x [B, h, T, …] with tile number i, of tile.shape[2] rows, replaced by `tile`."""
    return lax.dynamic_update_slice_in_dim(x, tile.astype(x.dtype), i * tile.shape[2], axis=2)


def add_to(x, tile, i):
    """x with `tile` added to tile number i."""
    return put(x, take(x, i, tile.shape[2]) + tile, i)


def same_segment(row_segments, column_segments):
    """[B, 1, R, C] bools, True where row and column belong to one segment; None if there are no segments.

    Padding counts as a segment here. This is harmless, because the op zeroes its inputs and its outputs.
    """
    return None if row_segments is None else row_segments[..., :, None] == column_segments[..., None, :]


def both(a, b):
    """The mask a & b. None means that everything is visible."""
    if a is None:
        return b
    return a if b is None else a & b


def keep(visible, x):
    """x where visible, 0 elsewhere. None means that everything is visible."""
    return x if visible is None else jnp.where(visible, x, 0)


def within(ago, window, lasting):
    """Bools: whether a column `ago` tokens before its row is in the row's window, or lasts. `lasting` None: no column
    lasts."""
    near = ago < window
    return near if lasting is None else near | lasting


def selected(visible, i, j, chunk, window, lasting=None):
    """`visible`, a mask of the rows of tile i and the columns of tile j, without the columns that have left the window
    and do not last. `lasting` is [B, 1, T] or None. Without a window, `visible` itself."""
    if window is None:
        return visible
    index = jnp.arange(chunk, dtype=jnp.int32)
    ago = (index[:, None] - index[None, :])[None, None]
    columns = None if lasting is None else take(lasting, j, chunk)[:, :, None, :]
    return both(visible, within(ago, window - (i - j) * chunk, columns))


def strictly_below(rows):
    """[1, 1, rows, rows] bools, True where column < row."""
    index = jnp.arange(rows, dtype=jnp.int32)
    return (index[:, None] > index[None, :])[None, None]


def zeros(shape, dtype, like):
    """Zeros that vary over the same mesh axes as `like`. Inside shard_map, a loop's initial carry must vary over the
    same axes as its final carry."""
    return jnp.zeros_like(like, dtype, shape=shape)


def start_sum(shape, dtype, like):
    """The running sums (maximum m, normaliser l, weighted sum) before the first tile; `shape` [B, h, rows, width]."""
    lowest = jnp.full_like(like, LOWEST, dtype, shape=shape[:-1])
    return lowest, zeros(shape[:-1], dtype, like), zeros(shape, dtype, like)


def absorb(similarity, running, scores, visible, values, operand_dtype):
    """The running sums after one more tile of columns: the weighted sum Σ_j κ(s_ij) values_j grows by the tile's part.

    For softmax the weights are e^{s − m}, with m the running maximum. For the other similarities they are κ(s), and
    (m, l) do not change.
    """
    highest, total, weighted = running
    if not similarity.normalised:
        weights = keep(visible, similarity.weight(keep(visible, scores)))
        return highest, total, weighted + dot(weights, values, operand_dtype)
    weights, highest_now, shrink = new_weights(running, scores, visible)
    return (
        highest_now,
        total * shrink + jnp.sum(weights, axis=-1),
        weighted * shrink[..., None] + dot(weights, values, operand_dtype),
    )


def absorb_weights(similarity, running, scores, visible):
    """`absorb` for a tile whose values are not known yet: (weights, running sums).

    The running sums are rescaled to the new maximum. Their normaliser includes this tile; their weighted sum does not.
    """
    _, total, weighted = running
    if not similarity.normalised:
        return keep(visible, similarity.weight(keep(visible, scores))), running
    weights, highest_now, shrink = new_weights(running, scores, visible)
    return weights, (highest_now, total * shrink + jnp.sum(weights, axis=-1), weighted * shrink[..., None])


def new_weights(running, scores, visible):
    """(weights e^{s − m}, new running maximum m, factor e^{old m − m} for the old sums)."""
    highest = running[0]
    if visible is not None:
        scores = jnp.where(visible, scores, LOWEST)
    highest_now = jnp.maximum(highest, jnp.max(scores, axis=-1))
    # In a row that has seen nothing, hidden scores and maximum are both LOWEST, and exp gives 1. So mask again.
    weights = keep(visible, jnp.exp(scores - highest_now[..., None]))
    return weights, highest_now, jnp.exp(highest - highest_now)


def inverse_normaliser(similarity, running):
    """1/l of each row; 0 for a row that saw nothing; 1 if the similarity is not normalised."""
    total = running[1]
    if not similarity.normalised:
        return jnp.ones_like(total)
    return jnp.where(total > 0, 1 / jnp.where(total > 0, total, 1), 0)


def log_normaliser(similarity, running):
    """The log-sum-exp log Σ_j e^{s_ij} of each row; 0 for a row that saw nothing, whose weights are masked anyway; 0 if
    the similarity is not normalised."""
    highest, total, _ = running
    if not similarity.normalised:
        return jnp.zeros_like(total)
    return jnp.where(total > 0, highest + jnp.log(jnp.where(total > 0, total, 1)), 0)


def weights_again(similarity, scores, lse, visible):
    """κ, recomputed in the backward pass from the scores and the rows' log-sum-exps."""
    scores = keep(visible, scores)
    if similarity.normalised:
        # A hidden score may exceed its row's log-sum-exp, and exp could overflow. So mask before exp too.
        scores = keep(visible, scores - lse[..., None])
    return keep(visible, similarity.weight(scores))


def first_chunks(segment_ids: jax.Array | None, window: int | None, length: int, chunk: int) -> jax.Array:
    """[T/C] int32: for each chunk of rows, the first chunk of columns that any of its rows can see.

    `segment_ids` is [B, T] or None. All batch rows share one bound, so that a loop over chunks has one trip count. The
    bounds do not decrease, so that `last_chunks` can invert them.
    """
    start = jnp.zeros((length,), jnp.int32)
    if segment_ids is not None:
        start = jnp.min(segment_starts(segment_ids), axis=0)
    if window is not None:
        start = jnp.maximum(start, jnp.arange(length, dtype=jnp.int32) - (window - 1))
    return start[::chunk] // chunk


def segment_starts(segment_ids: jax.Array) -> jax.Array:
    """[B, T] int32: the position at which each token's segment begins."""
    index = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)[None]
    begins = jnp.concatenate(
        [jnp.ones_like(segment_ids[:, :1], bool), segment_ids[:, 1:] != segment_ids[:, :-1]], axis=1
    )
    return lax.cummax(jnp.where(begins, index, 0), axis=1)


def last_chunks(first: jax.Array) -> jax.Array:
    """[T/C] int32: for each chunk of columns, the last chunk of rows that can see any of them."""
    chunks = jnp.arange(first.shape[0], dtype=jnp.int32)
    return jnp.sum(first[None, :] <= chunks[:, None], axis=1, dtype=jnp.int32) - 1
