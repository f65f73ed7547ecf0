"""What an extension has changed: losses of short and long texts, recall by distance, and drift by layer.

Both models, the one before (the teacher) and the one after, see the same rows of the evaluation split:

    short   rows of the teacher's length                      nats a token and bits a byte
    long    rows of the new length, by position                the teacher beyond what it was trained on
    recall  nats saved on a passage that comes back            `recall.py`
    drift   Sim_l and KL_l on rows of the teacher's length     `training/on_mesh/drift.py`
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from deltaformer_jax.data import batches, count_batches
from deltaformer_jax.evaluate.by_position import evaluate_by_position
from deltaformer_jax.extension.recall import PASSAGE, SHORTEST, recall
from deltaformer_jax.sharding.mesh import batch_sharding, on_mesh, replicated, rows
from deltaformer_jax.sharding.rows import to_devices
from deltaformer_jax.training.checkpoints.restore import Restored
from deltaformer_jax.training.loss import batch_nats
from deltaformer_jax.training.on_mesh.drift import drift
from deltaformer_jax.training.on_mesh.over_rows import over_tokens

RECALL_ROWS = 32


def compared(
    before: Restored, after: Restored, corpus: Any, *, tokens: int, advance: Callable[[str], Any] = lambda _: None
) -> dict[str, Any]:
    """The measures of both models, as plain JSON. tokens: how many of the evaluation split each loss takes.

    advance(text) is called before each part. Raises ValueError if the evaluation split holds no text.
    """
    short, long = (run.config.data.sequence_length for run in (before, after))
    found: dict[str, Any] = {"short_length": short, "long_length": long}
    for name, run in (("before", before), ("after", after)):
        own = {"rope_base": run.config.model.rope_base, "step": run.step}
        for kind, length in (("short", short), ("long", long)):
            advance(f"{kind} texts, the model {name}")
            own[kind] = _losses(run, corpus, length, tokens)
        advance(f"recall, the model {name}")
        own["recall"] = recalled(run, corpus, long)
        found[name] = own
    advance("drift of the layers")
    found["drift"] = layer_drift(before, after, corpus, short)
    return found


def beyond(reports: list[dict[str, Any]], short: int) -> float:
    """The mean loss of the positions above `short`, of the ranges that lie there; NaN if there are none."""
    taken = [one for one in reports if one["from"] > short]
    tokens = sum(one["tokens"] for one in taken)
    return sum(one["loss"] * one["tokens"] for one in taken) / tokens if tokens else float("nan")


def _shape(run: Restored, length: int, tokens: int) -> dict[str, int]:
    """About `tokens` tokens of rows in a batch, at most as many as in a batch of training, for all devices."""
    parts = rows(run.program.mesh)
    data = run.config.data
    number = min(tokens, data.batch_size * data.sequence_length) // length
    return {"sequence_length": length, "batch_size": parts * max(1, number // parts)}


def _losses(run: Restored, corpus: Any, length: int, tokens: int) -> dict[str, Any]:
    shape = _shape(run, length, tokens)
    sums = evaluate_by_position(
        run.program.parts,
        run.program.mesh,
        run.params,
        batches(corpus, "eval", **shape, seed=0),
        sequence_length=length,
        token_bytes=corpus.tokenizer.token_bytes,
        limit=max(1, tokens // (length * shape["batch_size"])),
    )
    return {**sums.report(), "by_position": sums.by_position()}


def recalled(run: Restored, corpus: Any, length: int, examples: int = RECALL_ROWS) -> list[dict[str, float]]:
    """The recall of a passage by distance in rows of `length` tokens, over `examples` passages for each distance.

    [] for rows that are too short for the shortest distance, or where the evaluation split has no row that is full.
    """
    texts = count_batches(corpus, "eval", sequence_length=length + 1, batch_size=1) - 1  # the last row is padded
    if length <= SHORTEST + PASSAGE or texts < 1:
        return []
    mesh, sharding = run.program.mesh, batch_sharding(run.program.mesh)
    step = jax.jit(on_mesh(mesh, over_tokens(mesh, run.program.parts, batch_nats)), out_shardings=replicated(mesh))
    size = rows(mesh) * max(2, 16 // rows(mesh) // 2 * 2)
    nats = lambda batch: step(run.params, to_devices(batch, sharding))
    found = recall(nats, _texts(corpus, length), length, size, examples)
    return [{"distance": one.distance, "unseen": one.unseen, "seen": one.seen, "saved": one.saved} for one in found]


def _texts(corpus: Any, length: int) -> Iterator[np.ndarray]:
    """Running text of length + 1 tokens, over the ends of documents, again from the beginning when it is used up."""
    while True:
        for batch in batches(corpus, "eval", sequence_length=length + 1, batch_size=8, seed=0):
            for row, ids in zip(batch["tokens"], batch["segment_ids"]):
                if ids.all():
                    yield row


def layer_drift(before: Restored, after: Restored, corpus: Any, length: int, count: int = 4) -> dict[str, list]:
    """Means over the first `count` batches of rows of `length` tokens: similarity, read and write, [num_layers].

    None where a layer has no such attention.
    """
    mesh, shape = after.program.mesh, _shape(after, length, 4096)
    taken = itertools.islice(batches(corpus, "eval", **shape, seed=0), count)
    teacher, model = ((run.program.parts, run.params) for run in (before, after))
    found = drift(mesh, teacher, model, (to_devices(batch, batch_sharding(mesh)) for batch in taken))
    plain = lambda values: [None if np.isnan(value) else float(value) for value in values]
    return {name: plain(values) for name, values in found._asdict().items()}
