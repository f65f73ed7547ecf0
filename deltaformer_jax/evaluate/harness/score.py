"""Log-likelihoods of windows of tokens: packed rows in batches of few shapes, whose logits never leave the device."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from deltaformer_jax.decoding.choose import power_of_two
from deltaformer_jax.evaluate.harness.windows import Window
from deltaformer_jax.model import LanguageModel

ROW = 256  # tokens of a row at least: several short windows share it


@partial(jax.jit, static_argnames="graphdef")
def _scores(graphdef, params, tokens, segment_ids, targets):
    """[B, T]: the targets' log-probabilities in nats; whether each target is the likeliest token."""
    logits, _ = nnx.merge(graphdef, params)(tokens, segment_ids=segment_ids)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1), jnp.argmax(logits, axis=-1) == targets


def packed(sizes: Sequence[int], batch_size: int) -> Iterator[tuple[int, list[list[int]]]]:
    """Batches of up to `batch_size` rows, each a list of windows: (tokens of a row, rows). sizes: the windows' tokens.

    The longest come first: what does not fit in memory fails at once. A row takes the longest windows that are left
    while they fit, then the shortest. Its length is a power of two, ROW at least, and that of the batch's first window.
    """
    left = collections.deque(sorted(range(len(sizes)), key=lambda i: -sizes[i]))
    while left:
        width, rows = power_of_two(sizes[left[0]], ROW), []
        while left and len(rows) < batch_size:
            row, room = [], width
            for take, end in ((left.popleft, 0), (left.pop, -1)):
                while left and sizes[left[end]] <= room:
                    row.append(take())
                    room -= sizes[row[-1]]
            rows.append(row)
        yield width, rows


def score(
    model: LanguageModel,
    windows: Sequence[Window],
    *,
    batch_size: int = 8,
    advance: Callable[[int], None] = lambda count: None,
) -> list[tuple[float, bool]]:
    """For each window: (the log-probability of its scored tokens in nats, whether greedy decoding would give them).

    log p = Σᵢ log_softmax(logits)[i - 1, tokensᵢ] over the scored tokens i, each in float32.

    Windows share the rows of a batch (`packed`), each a segment of its own that sees no other. A score is that of the
    window alone up to rounding in float32. `advance(count)` is called after each batch. Raises ValueError for a
    batch_size below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size = {batch_size}: give 1 or more")
    graphdef, params = nnx.split(model)
    results: list[tuple[float, bool]] = [(0.0, True)] * len(windows)
    for width, rows in packed([len(window.tokens) - 1 for window in windows], batch_size):
        tokens, targets, segments = np.zeros((3, batch_size, width), np.int32)
        segments[len(rows) :, 0] = 1  # rows that fill up the batch
        places = []
        for row, group in enumerate(rows):
            start = 0
            for number, i in enumerate(group, 1):
                ids, end = windows[i].tokens, start + len(windows[i].tokens) - 1
                tokens[row, start:end], targets[row, start:end], segments[row, start:end] = ids[:-1], ids[1:], number
                places.append((i, row, slice(end - windows[i].scored, end)))
                start = end
        logprobs, greedy = map(np.asarray, _scores(graphdef, params, tokens, segments, targets))
        for i, row, scored in places:
            results[i] = float(logprobs[row, scored].sum(dtype=np.float64)), bool(greedy[row, scored].all())
        advance(len(places))
    return results
