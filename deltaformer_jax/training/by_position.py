"""Loss by position: nats of targets summed by how many tokens of their document the model saw before them."""

import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from deltaformer_jax.model_parts import ModelParts
from deltaformer_jax.sharding.mesh import replicated, rows
from deltaformer_jax.training.evaluation import has_target, to_devices
from deltaformer_jax.training.loss import batch_nats, batch_nats_and_hits


class PositionSums:
    """Sums over targets at each position; index p - 1 is position p, at which the model has seen p tokens.

    The separator before a document is the first of them; where a row begins in the middle of a document, positions
    begin there too, since the model sees nothing earlier. nats float64, tokens and bytes int64, each [sequence_length].
    """

    def __init__(self, sequence_length: int):
        self.nats = np.zeros(sequence_length, np.float64)
        self.tokens = np.zeros(sequence_length, np.int64)
        self.bytes = np.zeros(sequence_length, np.int64)
        self.hits: np.ndarray | None = None  # of a task: int64 [sequence_length]

    def add(
        self, nats: np.ndarray, batch: dict[str, np.ndarray], target_bytes: np.ndarray, hits: np.ndarray | None = None
    ) -> None:
        """nats, bytes and, of a task, hits of the targets of a batch, each [B, T], counted where it has a target."""
        asked = has_target(batch)
        places = positions(batch["segment_ids"])[asked]
        np.add.at(self.nats, places, nats[asked].astype(np.float64))
        np.add.at(self.tokens, places, 1)
        np.add.at(self.bytes, places, target_bytes[asked])
        if hits is not None:
            if self.hits is None:
                self.hits = np.zeros(len(self.nats), np.int64)
            np.add.at(self.hits, places, hits[asked])

    def report(self, first: int = 1, last: int | None = None) -> dict[str, Any]:
        """loss (nats per token), perplexity (e^loss), bits_per_byte, tokens, bytes of positions first .. last, and of a
        task accuracy, the share of the targets that were the likeliest.

        None where there are no tokens, or no bytes, to divide by.
        """
        nats, tokens, size = (float(values[first - 1 : last].sum()) for values in (self.nats, self.tokens, self.bytes))
        loss = nats / tokens if tokens else None
        accuracy = {}
        if self.hits is not None:
            accuracy["accuracy"] = float(self.hits[first - 1 : last].sum()) / tokens if tokens else None
        return {
            **accuracy,
            "loss": loss,
            "perplexity": None if loss is None else math.exp(min(loss, 700.0)),
            "bits_per_byte": nats / math.log(2) / size if size else None,
            "tokens": int(tokens),
            "bytes": int(size),
        }

    def by_position(self) -> list[dict[str, Any]]:
        """Reports of positions 1, 2, 3 .. 4, 5 .. 8, ..., as far as there are tokens, each with its "from" and "to"."""
        reports = []
        first = 1
        while first <= len(self.nats):
            last = min(1 << (first - 1).bit_length(), len(self.nats))
            report = self.report(first, last)
            if report["tokens"]:
                reports.append({"from": first, "to": last, **report})
            first = last + 1
        return reports


def positions(segment_ids: np.ndarray) -> np.ndarray:
    """int64 [B, T]: each place's index in its run of equal ids."""
    index = np.arange(segment_ids.shape[1])
    begins = np.ones(segment_ids.shape, bool)
    begins[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    return index - np.maximum.accumulate(np.where(begins, index, 0), axis=1)


def evaluate_by_position(
    parts: ModelParts,
    mesh: Mesh,
    params,
    batches: Iterable[dict[str, np.ndarray]],
    *,
    sequence_length: int,
    token_bytes: np.ndarray,
    sharding: NamedSharding,
    limit: int = 0,
    advance: Callable[[], Any] = lambda: None,
) -> PositionSums:
    """Run over the batches (the first `limit`, 0: all) of this one process; `advance()` is called after each.

    token_bytes: int32 [vocab], the bytes each token stands for (0 for the document separator, whose nats still count).
    Raises ValueError if there is no target with text.
    """

    def scores(params, batch):
        if "loss_mask" in batch:
            return batch_nats_and_hits(parts.graphdef, params, batch, row_shards=rows(mesh))
        return batch_nats(parts.graphdef, params, batch, row_shards=rows(mesh)), None

    step = jax.jit(scores, out_shardings=replicated(mesh))
    sums = PositionSums(sequence_length)
    waiting = None
    for batch in itertools.chain(itertools.islice(batches, limit or None), [None]):
        running = None if batch is None else (step(params, to_devices(batch, sharding)), batch)
        if waiting is not None:  # read one batch late: the devices are never idle
            (nats, hits), done = waiting
            hits = None if hits is None else np.asarray(hits)
            sums.add(np.asarray(nats), done, token_bytes[done["targets"]], hits)
            advance()
        waiting = running
    if sums.hits is None and not sums.bytes.sum():
        raise ValueError("data: the evaluation split holds no text; prepare a corpus with more documents")
    return sums
