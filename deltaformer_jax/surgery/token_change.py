"""How much the residual stream changes from a token to the next.

With h_t the stream of token t behind a layer, and the mean over all real tokens that are not the first of a document:

    M = E[ ‖h_t − h_{t−1}‖ / ‖h_{t−1}‖ ]

Source: "Shift-FFN", arXiv 2505.17153, whose M(X) is the mean over layers and tokens.
"""

from __future__ import annotations

from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

from deltaformer_jax.model import LanguageModel


def token_change(model: LanguageModel, batches: Iterable[dict]) -> np.ndarray:
    """M of each layer, float64 [num_layers]; M(X) is its mean.

    batches: dicts with tokens [B,T] and, unless every row is one document, segment_ids [B,T], where 0 is padding. After
    a token whose stream is 0 the ratio counts as 0. Cost: a forward pass without logits. Raises ValueError if no token
    follows another of its document.
    """
    sums, count = 0.0, 0
    for batch in batches:
        tokens, ids = jnp.asarray(batch["tokens"]), batch.get("segment_ids")
        ids = jnp.ones_like(tokens) if ids is None else jnp.asarray(ids)
        seen, follows = _sums(model, tokens, ids)
        sums, count = sums + np.asarray(seen, np.float64), count + int(follows)
    if count == 0:
        raise ValueError("batches: no token follows another of its document")
    return sums / count


@jax.jit
def _sums(model: LanguageModel, tokens: jax.Array, segment_ids: jax.Array):
    """(Σ of the ratios [num_layers], how many they are)."""
    _, ratios = model.look(tokens, _ratios, segment_ids=segment_ids)
    follows = (segment_ids[:, 1:] == segment_ids[:, :-1]) & (segment_ids[:, 1:] != 0)
    return jnp.sum(jnp.where(follows[None], ratios, 0.0), axis=(1, 2)), jnp.sum(follows)


def _ratios(before: jax.Array, after: jax.Array, real: jax.Array) -> jax.Array:
    """‖h_t − h_{t−1}‖ / ‖h_{t−1}‖ [B,T−1] of neighbours in a row, float32."""
    del before, real
    after = after.astype(jnp.float32)
    size = jnp.linalg.norm(after[:, :-1], axis=-1)
    return jnp.linalg.norm(after[:, 1:] - after[:, :-1], axis=-1) / jnp.where(size > 0, size, jnp.inf)
