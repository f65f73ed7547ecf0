"""What the chunked forms share: tiles of rows and columns, products, and softmax sums that grow tile by tile.

Arrays lead with batch and heads: [B, h, T, width] and [B, h, T], T a whole number of chunks of `chunk` rows; what all
heads of a row have in common, as segments, is [B, 1, T]. Written so and not for one head under vmap: JAX traces a loop
several times to map it, and slices become gathers.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from deltaformer_jax.ops.common.similarity import LOWEST


def accumulation_dtype(dtype) -> jnp.dtype:
    """float64 for float64, float32 for everything narrower: what sums, states and log-sum-exps are kept in."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def default_chunk(length: int) -> int:
    """512 rows, or all there are: long enough for products to dominate, short enough to stay in a cache."""
    return min(512, length)


def dot(a, b, operand_dtype):
    """a·b with operands rounded to `operand_dtype` and sums in its accumulation dtype. float32 means float32."""
    return jnp.matmul(
        a.astype(operand_dtype),
        b.astype(operand_dtype),
        precision=lax.Precision.HIGHEST,
        preferred_element_type=accumulation_dtype(operand_dtype),
    )


def scale_rows(rows, scale):
    """(rows · scale, 1) where that costs no digits, else (rows, scale): what is left to multiply the scores by.

    On a CPU a scaled tile of scores is an array of its own; a scaled row is not worth mentioning.
    """
    return (rows * scale, 1) if rows.dtype == accumulation_dtype(rows.dtype) else (rows, scale)


def take(x, i, size):
    """Rows i·size … (i+1)·size of x [B, h, T, …]; None stays None."""
    return None if x is None else lax.dynamic_slice_in_dim(x, i * size, size, axis=2)


def put(x, tile, i):
    """x [B, h, T, …] with tile number i, of tile.shape[2] rows, replaced."""
    return lax.dynamic_update_slice_in_dim(x, tile.astype(x.dtype), i * tile.shape[2], axis=2)


def add_to(x, tile, i):
    """x with `tile` added to tile number i."""
    return put(x, take(x, i, tile.shape[2]) + tile, i)


def same_segment(row_segments, column_segments):
    """[B, 1, R, C] booleans, or None when there are no segments: a row sees the columns of its own segment only.

    Padding counts as a segment here: its rows are zero when they come in and are zeroed when they go out.
    """
    return None if row_segments is None else row_segments[..., :, None] == column_segments[..., None, :]


def both(a, b):
    """a and b, where None means everything."""
    if a is None:
        return b
    return a if b is None else a & b


def keep(visible, x):
    """x where visible, 0 elsewhere; None means visible everywhere."""
    return x if visible is None else jnp.where(visible, x, 0)


def strictly_below(rows):
    """[1, 1, rows, rows] booleans: the columns before each row."""
    index = jnp.arange(rows, dtype=jnp.int32)
    return (index[:, None] > index[None, :])[None, None]


def zeros(shape, dtype, like):
    """Zeros that vary over the mesh axes that `like` varies over, where shard_map keeps account of them: a loop's carry
    must come in as it goes out."""
    return jnp.zeros_like(like, dtype, shape=shape)


def start_sum(shape, dtype, like):
    """(maximum, normaliser, weighted sum) of rows that have seen nothing yet; `shape` [B, h, rows, width]."""
    lowest = jnp.full_like(like, LOWEST, dtype, shape=shape[:-1])
    return lowest, zeros(shape[:-1], dtype, like), zeros(shape, dtype, like)


def absorb(similarity, running, scores, visible, values, operand_dtype):
    """The running sums Σ_j κ(s_ij) values_j after one more tile of columns.

    For softmax the weights are e^{s − m}, m the running maximum; otherwise κ(s) itself, and (m, l) stay as they are.
    """
    highest, total, weighted = running
    if not similarity.normalised:
        weights = keep(visible, similarity.weight(keep(visible, scores)))
        return highest, total, weighted + dot(weights, values, operand_dtype)
    weights, highest_now, shrink = _new_weights(running, scores, visible)
    return (
        highest_now,
        total * shrink + jnp.sum(weights, axis=-1),
        weighted * shrink[..., None] + dot(weights, values, operand_dtype),
    )


def absorb_weights(similarity, running, scores, visible):
    """The same for a tile whose values are not known yet: its weights, and the running sums rescaled to go with them.

    The tile's part is in the normaliser already, but not in the weighted sum.
    """
    _, total, weighted = running
    if not similarity.normalised:
        return keep(visible, similarity.weight(keep(visible, scores))), running
    weights, highest_now, shrink = _new_weights(running, scores, visible)
    return weights, (highest_now, total * shrink + jnp.sum(weights, axis=-1), weighted * shrink[..., None])


def _new_weights(running, scores, visible):
    highest = running[0]
    if visible is not None:
        scores = jnp.where(visible, scores, LOWEST)
    highest_now = jnp.maximum(highest, jnp.max(scores, axis=-1))
    # In a row that has seen nothing both are LOWEST and exp gives 1: mask again.
    weights = keep(visible, jnp.exp(scores - highest_now[..., None]))
    return weights, highest_now, jnp.exp(highest - highest_now)


def inverse_normaliser(similarity, running):
    """1/l of each row, 0 for a row that saw nothing, 1 where the similarity has no normaliser."""
    total = running[1]
    if not similarity.normalised:
        return jnp.ones_like(total)
    return jnp.where(total > 0, 1 / jnp.where(total > 0, total, 1), 0)


def log_normaliser(similarity, running):
    """log Σ_j e^{s_ij}; 0 in rows that saw nothing, where nothing multiplies it, and without a normaliser."""
    highest, total, _ = running
    if not similarity.normalised:
        return jnp.zeros_like(total)
    return jnp.where(total > 0, highest + jnp.log(jnp.where(total > 0, total, 1)), 0)


def weights_again(similarity, scores, lse, visible):
    """κ recomputed in a backward pass from the scores and the rows' log-sum-exps."""
    scores = keep(visible, scores)
    if similarity.normalised:
        # A hidden score may lie above its row's log-sum-exp: mask before exp too, or it overflows.
        scores = keep(visible, scores - lse[..., None])
    return keep(visible, similarity.weight(scores))


def first_chunks(segment_ids: jax.Array | None, window: int | None, length: int, chunk: int) -> jax.Array:
    """[T/C] int32: for each chunk of rows, the first chunk that holds a column one of its rows can see.

    `segment_ids` [B, T] or None. One bound serves all rows of the batch, so that loops over chunks stay loops with one
    trip count. Non-decreasing, and therefore invertible by `last_chunks`.
    """
    start = jnp.zeros((length,), jnp.int32)
    if segment_ids is not None:
        index = jnp.arange(length, dtype=jnp.int32)[None]
        begins = jnp.concatenate(
            [jnp.ones_like(segment_ids[:, :1], bool), segment_ids[:, 1:] != segment_ids[:, :-1]], axis=1
        )
        start = jnp.min(lax.cummax(jnp.where(begins, index, 0), axis=1), axis=0)
    if window is not None:
        start = jnp.maximum(start, jnp.arange(length, dtype=jnp.int32) - (window - 1))
    return start[::chunk] // chunk


def last_chunks(first: jax.Array) -> jax.Array:
    """[T/C] int32: for each chunk of columns, the last chunk of rows that can see one of them."""
    chunks = jnp.arange(first.shape[0], dtype=jnp.int32)
    return jnp.sum(first[None, :] <= chunks[:, None], axis=1, dtype=jnp.int32) - 1
