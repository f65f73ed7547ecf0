"""A ledger of tokens: a run that goes on with other numbers of processes loses none and repeats none."""

import collections

import numpy as np
import pytest

from deltaformer_jax.data.batches import _Batches
from deltaformer_jax.data.mixture import MixedPacking
from deltaformer_jax.data.packing import Packing

BATCH, LENGTH, EOT = 8, 48, 10_000_000


class Documents:
    """What Packing asks of a Split, in memory; tokens from `first` on, each another."""

    masked = False

    def __init__(self, lengths, first):
        self.lengths = np.array(lengths, np.int64)
        self.documents, self.tokens, self.eot = len(lengths), int(sum(lengths)), EOT
        self.texts = np.split(np.arange(first, first + self.tokens), np.cumsum(lengths)[:-1])

    def read(self, document, start, stop):
        return self.texts[document][start:stop]


def corpora():
    draw = np.random.default_rng(0).integers
    return [Documents(draw(1, 90, 40), 0), Documents(draw(1, 200, 25), 1_000_000)]


PACKINGS = {
    "one corpus": lambda: Packing(corpora()[0], LENGTH, 3),
    "a mixture": lambda: MixedPacking(corpora(), [2.0, 1.0], LENGTH, 3),
}


def targets(packed, processes, start, steps):
    """The targets of the batches start .. start + steps - 1, read by `processes` processes, each its own rows."""
    part = BATCH // processes
    own = [np.arange(p * part, (p + 1) * part) for p in range(processes)]
    sources = [_Batches(packed, BATCH, start, steps, rows) for rows in own]
    read = [source[i] for i in range(steps) for source in sources]
    return np.concatenate([np.where(one["segment_ids"] > 0, one["targets"], EOT).ravel() for one in read])


@pytest.mark.parametrize("restarts", [(8, 4, 2, 8), (4, 2, 4)], ids=str)
@pytest.mark.parametrize("packing", PACKINGS)
def test_no_record_is_lost_or_repeated(packing, restarts):
    steps = 13
    read = [targets(PACKINGS[packing](), processes, steps * i, steps) for i, processes in enumerate(restarts)]
    found = np.concatenate(read)
    np.testing.assert_array_equal(found, targets(PACKINGS[packing](), 1, 0, steps * len(restarts)))
    if packing == "one corpus":  # a mixture shuffles over blocks of 10,000 rows: test_data_mixture.py
        counts = collections.Counter(found[found != EOT].tolist())
        assert len(counts) == corpora()[0].tokens and max(counts.values()) - min(counts.values()) <= 1
