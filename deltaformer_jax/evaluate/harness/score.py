"""Log-likelihoods of windows of tokens: batches of few shapes, whose log-probabilities never leave the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from deltaformer_jax.decoding.choose import power_of_two
from deltaformer_jax.evaluate.harness.windows import Window
from deltaformer_jax.model import LanguageModel


@partial(jax.jit, static_argnames="graphdef")
def _scores(graphdef, params, tokens, real, targets, scored):
    """([B] the sum of the targets' log-probabilities in nats, [B] whether each target is the likeliest token)."""
    logits, _ = nnx.merge(graphdef, params)(tokens, segment_ids=real)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    logprob = chosen - jax.nn.logsumexp(logits, axis=-1)
    greedy = jnp.where(scored, jnp.argmax(logits, axis=-1) == targets, True)
    return jnp.sum(jnp.where(scored, logprob, 0), axis=1), jnp.all(greedy, axis=1)


def score(
    model: LanguageModel,
    windows: Sequence[Window],
    *,
    batch_size: int = 8,
    advance: Callable[[int], None] = lambda count: None,
) -> list[tuple[float, bool]]:
    """For each window: (the log-probability of its scored tokens in nats, whether greedy decoding would give them).

    log p = Σᵢ log_softmax(logits)[i - 1, tokensᵢ] over the scored tokens i, in float32.

    Windows of like lengths share a batch of `batch_size` rows, padded to a power of two, the longest first: what does
    not fit in memory fails at once. `advance(count)` is called after each batch. Raises ValueError for a batch_size
    below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size = {batch_size}: give 1 or more")
    graphdef, params = nnx.split(model)
    results: list[tuple[float, bool]] = [(0.0, True)] * len(windows)
    order = sorted(range(len(windows)), key=lambda i: -len(windows[i].tokens))
    for start in range(0, len(order), batch_size):
        group = order[start : start + batch_size]
        width = power_of_two(len(windows[group[0]].tokens) - 1)
        tokens, targets, real = np.zeros((3, batch_size, width), np.int32)
        scored = np.zeros((batch_size, width), bool)
        real[:, 0] = 1  # rows that fill up the batch
        for row, i in enumerate(group):
            ids, end = windows[i].tokens, len(windows[i].tokens) - 1
            tokens[row, :end], targets[row, :end], real[row, :end] = ids[:-1], ids[1:], 1
            scored[row, end - windows[i].scored : end] = True
        sums, greedy = map(np.asarray, _scores(graphdef, params, tokens, real, targets, scored))
        for row, i in enumerate(group):
            results[i] = float(sums[row]), bool(greedy[row])
        advance(len(group))
    return results
