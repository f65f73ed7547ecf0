"""How much each layer changes the residual stream: Block Influence and relative magnitude.

With x_l the stream that enters layer l, f_l(x_l) = x_{l+1} − x_l what the layer adds, and means over all real tokens:

    BI_l = 1 − E[ x_l·x_{l+1} / (‖x_l‖ ‖x_{l+1}‖) ],        RM_l = E[ ‖f_l(x_l)‖ / ‖x_{l+1}‖ ]

Source: Men et al., "ShortGPT", arXiv 2403.03853, eq. 1 and section 2; its code compares the last layer's input with the
stream after the final norm, which is larger. Here both are the stream.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

from deltaformer_jax.model import LanguageModel


def block_influence(model: LanguageModel, batches: Iterable[dict]) -> dict[str, np.ndarray]:
    """{"bi": [num_layers], "relative_magnitude": [num_layers]}, float64, over all real tokens of the batches.

    batches: dicts with tokens [B,T] and, unless every row is one document, segment_ids [B,T], where 0 is padding. Of
    rows whose stream is 0, cosine and ratio count as 0. Cost: a forward pass without logits. Raises ValueError if there
    is no real token.
    """
    sums, count = 0.0, 0
    for batch in batches:
        tokens, ids = jnp.asarray(batch["tokens"]), batch.get("segment_ids")
        ids = jnp.ones_like(tokens) if ids is None else jnp.asarray(ids)
        seen = _sums(model, tokens, ids)
        sums = sums + np.stack([np.asarray(x, np.float64) for x in seen])
        count += int(np.sum(np.asarray(ids) != 0))
    if count == 0:
        raise ValueError("batches: they hold no real token")
    cosine, ratio = sums / count
    return {"bi": 1.0 - cosine, "relative_magnitude": ratio}


@jax.jit
def _sums(model: LanguageModel, tokens: jax.Array, segment_ids: jax.Array):
    _, seen = model.look(tokens, _cosine_and_ratio, segment_ids=segment_ids)
    return seen


def _cosine_and_ratio(before: jax.Array, after: jax.Array, real: jax.Array):
    """(Σ cos(x_l, x_{l+1}), Σ ‖x_{l+1} − x_l‖ / ‖x_{l+1}‖) over real tokens, in float32."""
    before, after = (x.astype(jnp.float32) for x in (before, after))
    norm = functools.partial(jnp.linalg.norm, axis=-1)
    sizes = norm(before) * norm(after)
    cosine = jnp.sum(before * after, axis=-1) / jnp.where(sizes > 0, sizes, 1.0)
    ratio = norm(after - before) / jnp.where(norm(after) > 0, norm(after), 1.0)
    return tuple(jnp.sum(jnp.where(real, x, 0.0)) for x in (cosine, ratio))
