"""loss = sum over counted tokens of -log softmax(logits)[target] / number of counted tokens, in nats, in float32.

A token is counted if its segment id is not 0 and, if the batch has a `loss_mask`, the mask is true there.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from deltaformer_jax.layers.feed_forward.routing import Routing, router_losses
from deltaformer_jax.model import LanguageModel
from deltaformer_jax.ops.common.checks import as_int32
from deltaformer_jax.sharding.activations import summed_over_tokens
from deltaformer_jax.sharding.device_memory import memory_limit
from deltaformer_jax.sharding.shards import gathered

# How many logits may exist at once on a group of devices that shares rows: 256 MB of float32. With a vocabulary of 128k
# that is 512 tokens, enough for the product with the embedding table to be bound by arithmetic and not by reading it.
MAX_LOGITS = 2**26


def logits_at_once(mesh: Mesh) -> int:
    """How many logits a training step may have at once: MAX_LOGITS, or 1/64 of an accelerator's memory if that is more.

    Each piece of the logits adds to the gradient of the whole table, so a large device should make few pieces.
    """
    return max(MAX_LOGITS, (memory_limit(mesh) or 0) // 64 // 4)


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
    max_logits: int = MAX_LOGITS,
    active: jax.Array | None = None,
) -> jax.Array:
    """-log p(target) in nats of every counted token. batch: tokens, targets, segment_ids[, loss_mask], each [B, T].

    Returns float32 [B, T], 0 where a token is not counted. `active`: as of `LanguageModel.hidden`. Cost: see
    `over_logits`.
    """
    return over_logits(token_nats, graphdef, params, batch, max_logits, active)


def batch_nats_and_hits(
    graphdef: nnx.GraphDef,
    params: dict,
    batch: dict[str, jax.Array],
    *,
    max_logits: int = MAX_LOGITS,
    active: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """(nats as `batch_nats`, hits bool [B, T]): a hit is a counted token whose target has the largest logit."""
    return over_logits(_nats_and_hits, graphdef, params, batch, max_logits, active)


def summed_nats_and_hits(
    graphdef: nnx.GraphDef,
    params: dict,
    batch: dict[str, jax.Array],
    *,
    max_logits: int = MAX_LOGITS,
    active: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, Routing | None]:
    """(S, the number of hits, the Routing or None), as of `summed_nats` and `batch_nats_and_hits`."""
    *arrays, routing = _before_logits(graphdef, params, batch, max_logits, active)
    nats, hits = _over_pieces(_nats_and_hits, *arrays)
    return jnp.sum(nats), jnp.sum(hits, dtype=jnp.int32), routing


def _nats_and_hits(logits, targets, mask):
    return token_nats(logits, targets, mask), mask & (jnp.argmax(logits, axis=-1) == targets)


def summed_nats(
    graphdef: nnx.GraphDef,
    params: dict,
    batch: dict[str, jax.Array],
    *,
    max_logits: int = MAX_LOGITS,
    active: jax.Array | None = None,
) -> tuple[jax.Array, Routing | None]:
    """(S, the Routing of the layers of experts or None), for training: S = Σ_t nats_t, the sum of `batch_nats`. With
    p_t = softmax(E h_t) and y_t the one-hot target,

        dS/dh_t = Eᵀ (p_t − y_t),        dS/dE = Σ_t (p_t − y_t) h_tᵀ

    so that the gradient needs the logits once, even if they are cut into pieces. A piece's logits are turned into nats
    and into the gradients of hidden states and head at once, in the forward pass. The gradient of a sum needs nothing
    else: the backward pass scales these by one number. `over_logits` computes the logits of a piece twice, because it
    does not know what its caller does with the nats.

    Cost: 3 products of 2 d_model V FLOPs per token, the gradient included. Memory: as `over_logits`, and the gradients.
    Source: gradients of a loss made in its forward pass, chunk by chunk: Hsu et al., Liger Kernel, arXiv 2410.10989.
    """
    model, pieces, arrays, routing = _before_logits(graphdef, params, batch, max_logits, active)
    # A model with logits of its own computes more than its embedding's product.
    if pieces.number == 1 or type(model).logits is not LanguageModel.logits:
        return jnp.sum(_over_pieces(token_nats, model, pieces, arrays)), routing
    return _sum_of_pieces(pieces, model.embedding, *arrays), routing


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sum_of_pieces(pieces, embedding, hidden, targets, mask):
    nats = lambda piece: token_nats(embedding.logits(piece[0]), *piece[1:])
    return jnp.sum(pieces.join(jax.lax.map(nats, tuple(map(pieces.cut, (hidden, targets, mask))))))


def _sum_of_pieces_forward(pieces, embedding, hidden, targets, mask):
    def add_piece(d_embedding, piece):
        hidden, targets, mask = piece
        nats, pull = jax.vjp(lambda e, hidden: token_nats(e.logits(hidden), targets, mask), embedding, hidden)
        d_piece, d_hidden = pull(jnp.ones_like(nats))
        return jax.tree.map(jnp.add, d_embedding, d_piece), (nats, d_hidden)

    start = jax.tree.map(jnp.zeros_like, embedding)
    cut = tuple(map(pieces.cut, (hidden, targets, mask)))
    d_embedding, (nats, d_hidden) = jax.lax.scan(add_piece, start, cut)
    return jnp.sum(pieces.join(nats)), (d_embedding, pieces.join(d_hidden))


def _sum_of_pieces_backward(pieces, residuals, cotangent):
    scaled = lambda gradient: gradient * cotangent.astype(gradient.dtype)
    return *jax.tree.map(scaled, residuals), None, None


_sum_of_pieces.defvjp(_sum_of_pieces_forward, _sum_of_pieces_backward)


def over_logits(
    function: Callable,
    graphdef: nnx.GraphDef,
    params: dict,
    batch: dict[str, jax.Array],
    max_logits: int,
    active: jax.Array | None = None,
):
    """function(logits, targets, mask) for the model's logits of a batch: arrays [B, T].

    Memory: at most about `max_logits` logits at once on a group of devices that shares rows, instead of tokens ·
    vocabulary. If there would be more, they are computed for some positions at a time and recomputed in the backward
    pass. That adds a third to the work on the logits, 2 d_model V FLOPs per token.
    """
    return _over_pieces(function, *_before_logits(graphdef, params, batch, max_logits, active)[:3])


def _before_logits(graphdef, params, batch, max_logits, active):
    """(model, pieces, (hidden states, targets, mask), Routing or None). The model gets no positions, since they restart
    at every document and so follow from the segment ids."""
    model = nnx.merge(graphdef, nnx.State(params))
    switched = {} if active is None else {"active": active}
    if type(model).hidden is LanguageModel.hidden and model.has_experts:
        hidden, routing = model.routed(batch["tokens"], segment_ids=batch["segment_ids"], **switched)
    else:
        hidden, routing = model.hidden(batch["tokens"], segment_ids=batch["segment_ids"], **switched)[0], None
    # Gathered once, before the logits are cut into pieces: the pieces' gradients are summed before devices are.
    model.embedding = gathered(model.embedding, model.embedding.dtype, all_in_dtype=True)
    model.embedding = model.embedding.with_ready_head()  # not once for each piece
    targets, mask = as_int32(batch["targets"]), counted(batch)
    pieces = _Pieces.of(*targets.shape, model.embedding.rows, max_logits)
    return model, pieces, (hidden, targets, mask), routing


def router_terms(
    graphdef: nnx.GraphDef, params: dict, routing: Routing | None, batch: dict[str, jax.Array]
) -> tuple[jax.Array | float, dict[str, jax.Array]]:
    """(C (model.balance_loss · balance + model.router_z_loss · z), sums): what training adds to the summed nats.

    C: the batch's counted tokens. sums: C balance, C z and the tokens of each expert, for `routing_metrics`. Without
    layers of experts (0.0, {}).
    """
    if routing is None:
        return 0.0, {}
    model = nnx.merge(graphdef, nnx.State(params))
    if model.pool is not None:  # its balance is that of its use by all layers
        routing = jax.tree.map(lambda x: jnp.sum(x, axis=0, keepdims=True), routing)
    balance, squares = router_losses(routing)
    tokens = summed_over_tokens(jnp.sum(counted(batch))).astype(jnp.float32)
    sums = {"balance": tokens * balance, "z": tokens * squares, "counts": routing.counts}
    return model.balance_loss * sums["balance"] + model.router_z_loss * sums["z"], sums


def routing_metrics(sums: dict[str, jax.Array], share: jax.Array) -> dict[str, jax.Array]:
    """balance_loss and router_z_loss, the means over layers of experts; expert_load, the largest number of tokens of
    an expert over the mean of its layer's, 1 where all are used alike. share: 1 / the counted tokens of the batch."""
    if not sums:
        return {}
    load = jnp.max(sums["counts"] / jnp.maximum(jnp.mean(sums["counts"], axis=-1, keepdims=True), 1))
    return {"balance_loss": sums["balance"] * share, "router_z_loss": sums["z"] * share, "expert_load": load}


def _over_pieces(function, model, pieces, arrays):
    of_piece = lambda hidden, targets, mask: function(model.logits(hidden), targets, mask)
    if pieces.number == 1:
        return of_piece(*arrays)
    results = jax.lax.map(lambda piece: jax.checkpoint(of_piece)(*piece), tuple(map(pieces.cut, arrays)))
    return jax.tree.map(pieces.join, results)


class _Pieces(NamedTuple):
    """Arrays [B, T, ...] cut along T into `number` pieces of `positions` tokens, the last one padded with zeros.

    Only the time axis is cut, so that every device has its own rows of every piece.
    """

    length: int
    number: int
    positions: int

    @classmethod
    def of(cls, rows: int, length: int, vocabulary: int, max_logits: int) -> "_Pieces":
        """So many that a group of devices has at most about `max_logits` logits of a piece."""
        positions = max(1, max_logits // (rows * vocabulary))
        number = -(-length // min(positions, length))
        return cls(length, number, -(-length // number))

    def cut(self, x):
        """[B, T, ...] -> [number, B, positions, ...]."""
        x = jnp.pad(x, [(0, 0), (0, self.number * self.positions - self.length)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], self.number, self.positions, *x.shape[2:]), 1, 0)

    def join(self, x):
        """The inverse of `cut`."""
        x = jnp.moveaxis(x, 0, 1)
        return x.reshape(x.shape[0], self.number * self.positions, *x.shape[3:])[:, : self.length]
