"""Loss by position: the nats of the targets, summed by how many tokens of the document the model saw before each."""

import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from deltaformer_jax.model_parts import ModelParts
from deltaformer_jax.sharding.mesh import batch_sharding, on_mesh, replicated
from deltaformer_jax.sharding.rows import to_devices
from deltaformer_jax.training.evaluation import bits_per_byte, has_target
from deltaformer_jax.training.loss import batch_nats, batch_nats_and_hits
from deltaformer_jax.training.on_mesh.over_rows import over_tokens


class PositionSums:
    """Sums over the targets at each position. Index p - 1 is position p, at which the model has seen p tokens.

    The separator before a document counts as its first token. If a row begins in the middle of a document, positions
    start from 1 there, since the model sees nothing earlier.

    Attributes, each [sequence_length]: nats float64; tokens and bytes int64; hits int64, or None if the data are
    neither a task nor conversations.
    """

    def __init__(self, sequence_length: int):
        self.nats = np.zeros(sequence_length, np.float64)
        self.tokens = np.zeros(sequence_length, np.int64)
        self.bytes = np.zeros(sequence_length, np.int64)
        self.hits: np.ndarray | None = None  # set for a task or conversations: int64 [sequence_length]

    def add(
        self, nats: np.ndarray, batch: dict[str, np.ndarray], target_bytes: np.ndarray, hits: np.ndarray | None = None
    ) -> None:
        """Add a batch: nats, bytes and, for a task or conversations, hits of its targets, each [B, T].

        Only places with a target count.
        """
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
        """loss (nats per token), perplexity (e^loss), bits_per_byte, tokens and bytes of positions first .. last.

        For a task or conversations also accuracy: the fraction of targets that have the largest logit. A value is None
        if there are no tokens, or no bytes, to divide by.
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
            "bits_per_byte": bits_per_byte(nats, int(size)),
            "tokens": int(tokens),
            "bytes": int(size),
        }

    def by_position(self) -> list[dict[str, Any]]:
        """Reports of positions 1, 2, 3 .. 4, 5 .. 8, ..., each with its "from" and "to", where there are tokens."""
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
    """int64 [B, T]: the index of each token in its run of equal segment ids."""
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
    limit: int = 0,
    advance: Callable[[], Any] = lambda: None,
) -> PositionSums:
    """The sums over the batches of this one process: the first `limit`, or all for 0. Calls `advance()` after each.

    token_bytes: int32 [vocab], the number of bytes of each token. It is 0 for the document separator and other special
    tokens, whose nats still count (`training.evaluation`). Raises ValueError if no target stands for text.
    """

    def scores(graphdef, params, batch):
        if "loss_mask" in batch:
            return batch_nats_and_hits(graphdef, params, batch)
        return batch_nats(graphdef, params, batch), None

    step = jax.jit(on_mesh(mesh, over_tokens(mesh, parts, scores)), out_shardings=replicated(mesh))
    sharding = batch_sharding(mesh)
    sums = PositionSums(sequence_length)
    waiting = None
    for batch in itertools.chain(itertools.islice(batches, limit or None), [None]):
        running = None if batch is None else (step(params, to_devices(batch, sharding)), batch)
        if waiting is not None:  # read one batch late, so that the devices are never idle
            (nats, hits), done = waiting
            hits = None if hits is None else np.asarray(hits)
            sums.add(np.asarray(nats), done, token_bytes[done["targets"]], hits)
            advance()
        waiting = running
    if sums.hits is None and not sums.bytes.sum():
        raise ValueError("data: the evaluation split holds no text; prepare a corpus with more documents")
    return sums
