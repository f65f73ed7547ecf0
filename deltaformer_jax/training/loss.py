"""loss = sum over real tokens of -log softmax(logits)[target] / number of real tokens, in nats, in float32."""

import jax
import jax.numpy as jnp
import optax
from flax import nnx


def token_nats(logits: jax.Array, targets: jax.Array, mask: jax.Array) -> jax.Array:
    """-log softmax(logits)[target] where mask, else 0.

    Args: logits [B, T, V], any float dtype; targets [B, T] int, read only where mask; mask [B, T] bool.
    Returns float32 [B, T], in nats. What stands in a masked position, NaN included, reaches neither value nor gradient:
    the logits are replaced before the logarithm, not after it (0 * NaN is NaN).
    """
    logits = jnp.where(mask[..., None], logits.astype(jnp.float32), 0.0)
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.where(mask, targets, 0))
    return jnp.where(mask, nats, 0.0)


def batch_nats(graphdef: nnx.GraphDef, params: dict, batch: dict[str, jax.Array]) -> jax.Array:
    """Nats of every target of a batch {tokens, targets, segment_ids}, each int32 [B, T]; 0 at padding (segment id 0).

    Returns float32 [B, T]. Positions restart at every document, so nothing but the segment ids is needed.
    """
    model = nnx.merge(graphdef, nnx.State(params))
    segment_ids = batch["segment_ids"]
    logits, _ = model(batch["tokens"], segment_ids=segment_ids)
    return token_nats(logits, batch["targets"], segment_ids > 0)
