"""loss = sum over counted tokens of -log softmax(logits)[target] / number of counted tokens, in nats, in float32.

A token is counted if its segment id is not 0 and, if the batch has a `loss_mask`, the mask is true there.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from deltaformer_jax.ops.common.checks import as_int32

# How many logits may exist at once on a device: 256 MB of float32. With a vocabulary of 128k that is 512 tokens, enough
# for the product with the embedding table to be bound by arithmetic and not by reading the table.
MAX_LOGITS = 2**26


@jax.custom_vjp
def token_nats(logits: jax.Array, targets: jax.Array, mask: jax.Array) -> jax.Array:
    """-log softmax(logits)[target] = log Σ_v e^{logits_v} - logits_target where mask, else 0.

    Args: logits [B, T, V], any float dtype; targets [B, T] int, read only where mask; mask [B, T] bool.
    Returns float32 [B, T], in nats. Masked positions, even with NaN, affect neither value nor gradient.

    The gradient is softmax(logits) - onehot(target), computed in one expression. It needs one array of the size of the
    logits beside them; automatic differentiation of the same formula keeps five.
    """
    return _token_nats_forward(logits, targets, mask)[0]


def _token_nats_forward(logits, targets, mask):
    wide, targets = logits.astype(jnp.float32), as_int32(targets)
    log_sum = jax.nn.logsumexp(wide, axis=-1)
    safe = jnp.where(mask, targets, 0)
    chosen = jnp.take_along_axis(wide, safe[..., None], axis=-1)[..., 0]
    return jnp.where(mask, log_sum - chosen, 0.0), (logits, safe, mask, log_sum)


def _token_nats_backward(residuals, cotangent):
    logits, targets, mask, log_sum = residuals
    softmax = jnp.exp(logits.astype(jnp.float32) - log_sum[..., None])
    hit = jax.lax.broadcasted_iota(targets.dtype, logits.shape, 2) == targets[..., None]
    slope = jnp.where(mask[..., None], cotangent[..., None] * (softmax - hit.astype(softmax.dtype)), 0.0)
    return slope.astype(logits.dtype), None, None


token_nats.defvjp(_token_nats_forward, _token_nats_backward)


def counted(batch: dict[str, jax.Array]) -> jax.Array:
    """bool [B, T]: the tokens whose loss is counted."""
    real = batch["segment_ids"] > 0
    return real & batch["loss_mask"].astype(bool) if "loss_mask" in batch else real


def batch_nats(
    graphdef: nnx.GraphDef,
    params: dict,
    batch: dict[str, jax.Array],
    *,
    row_shards: int = 1,
    max_logits: int = MAX_LOGITS,
) -> jax.Array:
    """-log p(target) in nats of every counted token. batch: tokens, targets, segment_ids[, loss_mask], each [B, T].

    Returns float32 [B, T], 0 where a token is not counted. Cost: see `over_logits`.
    """
    return over_logits(token_nats, graphdef, params, batch, row_shards, max_logits)


def batch_nats_and_hits(
    graphdef: nnx.GraphDef,
    params: dict,
    batch: dict[str, jax.Array],
    *,
    row_shards: int = 1,
    max_logits: int = MAX_LOGITS,
) -> tuple[jax.Array, jax.Array]:
    """(nats as `batch_nats`, hits bool [B, T]): a hit is a counted token whose target has the largest logit."""

    def scores(logits, targets, mask):
        return token_nats(logits, targets, mask), mask & (jnp.argmax(logits, axis=-1) == targets)

    return over_logits(scores, graphdef, params, batch, row_shards, max_logits)


def over_logits(
    function: Callable,
    graphdef: nnx.GraphDef,
    params: dict,
    batch: dict[str, jax.Array],
    row_shards: int,
    max_logits: int,
):
    """function(logits, targets, mask) for the model's logits of a batch: arrays [B, T].

    The model gets no positions, since they restart at every document and so follow from the segment ids. The rows of
    the batch are sharded over `row_shards` groups of devices.

    Memory: at most about `max_logits` logits at once on a group of devices, instead of tokens · vocabulary. If there
    would be more, they are computed for some positions at a time and recomputed in the backward pass. That adds a third
    to the work on the logits, 2 d_model V FLOPs per token.
    """
    model = nnx.merge(graphdef, nnx.State(params))
    hidden, _ = model.hidden(batch["tokens"], segment_ids=batch["segment_ids"])
    targets, mask = as_int32(batch["targets"]), counted(batch)
    rows, length = targets.shape
    positions = max(1, max_logits // (-(-rows // row_shards) * model.embedding.rows))
    if positions >= length:
        return function(model.logits(hidden), targets, mask)
    pieces = -(-length // positions)
    positions = -(-length // pieces)

    def cut(x):
        x = jnp.pad(x, [(0, 0), (0, pieces * positions - length)] + [(0, 0)] * (x.ndim - 2))
        # Only the time axis is cut, so that every device has its own rows of every piece.
        return jnp.moveaxis(x.reshape(rows, pieces, positions, *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def of_piece(hidden, targets, mask):
        return function(model.logits(hidden), targets, mask)

    results = jax.lax.map(lambda piece: of_piece(*piece), (cut(hidden), cut(targets), cut(mask)))
    join = lambda x: jnp.moveaxis(x, 0, 1).reshape(rows, pieces * positions)[:, :length]
    return jax.tree.map(join, results)
