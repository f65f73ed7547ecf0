"""Several corpora mixed by weight: of every BLOCK rows each corpus gives a fixed number, in shuffled places.

Row r is in block r // BLOCK. A permutation that depends on (seed, block) assigns the places of the block to the
corpora. So the corpus of a row, and its row number in that corpus, can be computed from (seed, r) alone.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deltaformer_jax.data.corpus import SPLITS, Corpus, Split, holds_conversations, load_corpus
from deltaformer_jax.data.packing import Packing, permuted
from deltaformer_jax.data.task_data import TaskData, is_task
from deltaformer_jax.data.whole_packing import WholePacking
from deltaformer_jax.host.paths import expand

BLOCK = 10_000  # rows in a block; weights are rounded to multiples of 1 / BLOCK


class Mixture:
    """Corpora with the same tokenizer that `batches` reads as one.

    In training, corpus i gives weights[i] / sum(weights) of the *rows*. Each corpus has its own epochs, so a small
    corpus with a large weight is read more often. Evaluation makes one pass over all corpora, without the weights, with
    their rows spread evenly among each other.

    Attributes: corpora; weights; path (what it was loaded from); tokenizer; hash (of the corpora and weights, not of
    their paths); manifest (as of a Corpus, with the counts of the splits summed); remote (of any corpus).
    """

    def __init__(self, corpora: Sequence[Corpus], weights: Sequence[float], path: str = "mixture"):
        if len(corpora) != len(weights) or not corpora:
            raise ValueError(f"a mixture of {len(corpora)} corpora with {len(weights)} weights: give one for each")
        for weight in weights:
            if not 0 < weight < math.inf:
                raise ValueError(f"weight {weight} in a mixture: must be a number above 0")
        for corpus in corpora:
            if corpus.tokenizer.hash != corpora[0].tokenizer.hash:
                raise ValueError(
                    f"{corpus.path}: made with another tokenizer than {corpora[0].path}; prepare it with "
                    f"--tokenizer {corpora[0].path / 'tokenizer.json'}"
                )
        self.corpora = tuple(corpora)
        self.weights = tuple(map(float, weights))
        self.path = path
        self.remote = any(corpus.remote for corpus in corpora)
        self.tokenizer = corpora[0].tokenizer
        quotas(self.weights)
        parts = [f"{corpus.hash} {weight!r}" for corpus, weight in zip(corpora, self.weights)]
        self.hash = hashlib.sha256("\n".join(parts).encode()).hexdigest()
        self.manifest: dict[str, Any] = {
            "splits": {
                name: {
                    count: sum(corpus.manifest["splits"][name][count] for corpus in corpora)
                    for count in ("documents", "tokens", "bytes")
                }
                for name in SPLITS
            }
        }

    def split(self, name: str) -> list[Split]:
        return [corpus.split(name) for corpus in self.corpora]


def load_data(spec: str | os.PathLike) -> Corpus | Mixture | TaskData:
    """The corpus in a folder, the mixture "FOLDER=WEIGHT,FOLDER=WEIGHT,...", or the task "task:NAME,option=value,...".

    A text without "," and "=", or one that exists as a path, is one folder. Raises ValueError or FileNotFoundError as
    `load_corpus` does, and ValueError for a weight that is not a number above 0 or is below 1 / BLOCK of the sum.
    """
    text = os.fspath(spec)
    if is_task(text):
        return TaskData(text)
    parts = _mixed(text)
    if parts is None:
        return load_corpus(text)
    return Mixture([load_corpus(folder) for folder, _ in parts], [weight for _, weight in parts], text)


def has_loss_mask(spec: str | os.PathLike) -> bool:
    """Whether the batches of `load_data(spec)` have a loss_mask: a task's, and those of conversations.

    Reads manifests only. A corpus that is not there has none.
    """
    text = os.fspath(spec)
    if is_task(text):
        return True
    return any(holds_conversations(folder) for folder, _ in _mixed(text) or [(text, 1.0)] if folder)


def parts_of_mixture(spec: str) -> list[str]:
    """The folders of `load_data(spec)`; none for a task and for ""."""
    return [] if not spec or is_task(spec) else [folder for folder, _ in _mixed(spec) or [(spec, 1.0)]]


def _mixed(text: str) -> list[tuple[str, float]] | None:
    """The folders and weights of a mixture, None if `text` is one folder."""
    if Path(expand(text)).exists() or not ("," in text or "=" in text):
        return None
    found = []
    for part in filter(None, map(str.strip, text.split(","))):
        folder, equals, weight = part.rpartition("=")
        if not equals or not folder:
            raise ValueError(f"{text!r}: {part!r} has no weight; a mixture is FOLDER=WEIGHT,FOLDER=WEIGHT")
        try:
            found.append((folder, float(weight)))
        except ValueError:
            raise ValueError(f"{text!r}: the weight {weight!r} of {folder} is not a number") from None
    return found


def quotas(weights: Sequence[float]) -> np.ndarray:
    """Rows of each corpus in a block, int64, with sum BLOCK: exact shares, of which the largest remainders round up.

    Raises ValueError if a weight is too small for one row.
    """
    shares = np.asarray(weights, np.float64) / sum(weights) * BLOCK
    counts = np.floor(shares).astype(np.int64)
    order = np.argsort(-(shares - counts), kind="stable")
    counts[order[: BLOCK - counts.sum()]] += 1
    if not counts.all():
        weight = weights[int(np.argmin(counts))]
        raise ValueError(f"weight {weight} in a mixture: below 1/{BLOCK} of their sum {sum(weights)}; leave it out")
    return counts


def packing_of(split: Split, sequence_length: int, seed: int | str | None) -> Packing | WholePacking:
    """The rows of a split: conversations are packed whole, texts are laid end to end."""
    return (WholePacking if split.masked else Packing)(split, sequence_length, seed)


class MixedPacking:
    """Rows of a mixture, with the interface of `Packing`. `rows_per_epoch` has a meaning only without a seed."""

    def __init__(self, splits: Sequence[Split], weights: Sequence[float], sequence_length: int, seed: int | None):
        self.sequence_length = sequence_length
        self.seed = seed
        self._quotas = quotas(weights)
        self._starts = np.concatenate([[0], np.cumsum(self._quotas)])
        # Each corpus has its own seed: two copies of one corpus would otherwise give the same rows.
        self._packings = [
            packing_of(split, sequence_length, None if seed is None else f"{seed} of corpus {i}")
            for i, split in enumerate(splits)
        ]
        self._masked = any(split.masked for split in splits)
        counts = [packing.rows_per_epoch for packing in self._packings]
        self.rows_per_epoch = sum(counts)
        if seed is None:
            # Spread evenly, so that the first batches contain every corpus.
            middles = np.concatenate([(np.arange(count) + 0.5) / count for count in counts])
            self._order = np.argsort(middles, kind="stable")
            self._ends = np.cumsum(counts)

    def place(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(corpus, row in that corpus), each int64 [N], of the rows `indices` int64 [N]."""
        indices = np.asarray(indices, np.int64)
        if self.seed is None:
            flat = self._order[indices]
            corpus = np.searchsorted(self._ends, flat, side="right")
            return corpus, flat - (self._ends - np.diff(self._ends, prepend=0))[corpus]
        blocks, places = np.divmod(indices, BLOCK)
        for block in np.unique(blocks):
            here = blocks == block
            places[here] = permuted(places[here], BLOCK, f"{self.seed} {block} mixture")
        corpus = np.searchsorted(self._starts, places, side="right") - 1
        return corpus, blocks * self._quotas[corpus] + places - self._starts[corpus]

    def rows(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """As `Packing.rows`. Without a seed, rows past the end are all padding.

        If a corpus is of conversations, also loss_mask: bool, True at every target of the texts of other corpora.
        """
        indices = np.asarray(indices, np.int64)
        out = {
            name: np.zeros((len(indices), self.sequence_length), np.int32)
            for name in ("tokens", "targets", "segment_ids")
        }
        if self._masked:
            out["loss_mask"] = np.zeros((len(indices), self.sequence_length), bool)
        (real,) = np.nonzero(indices < self.rows_per_epoch) if self.seed is None else (np.arange(len(indices)),)
        corpus, rows = self.place(indices[real])
        for i in np.unique(corpus):
            mine = corpus == i
            found = self._packings[i].rows(rows[mine])
            if self._masked:
                found.setdefault("loss_mask", found["segment_ids"] > 0)
            for name, array in found.items():
                out[name][real[mine]] = array
        return out
