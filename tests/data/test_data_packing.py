"""Packing: every pair of an epoch once, segments contiguous, all of it by random access."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaformer_jax.data.packing import Packing, permuted

EOT = 100_000


class Documents:
    """What Packing asks of a Split, in memory; every token differs from every other."""

    masked = False

    def __init__(self, lengths):
        self.lengths = np.array(lengths, np.int64)
        self.documents, self.tokens, self.eot = len(lengths), int(sum(lengths)), EOT
        self.texts = np.split(np.arange(self.tokens), np.cumsum(lengths)[:-1])
        self.most_read = 0

    def read(self, document, start, stop):
        self.most_read = max(self.most_read, stop - start)
        return self.texts[document][start:stop]

    def pairs(self):
        return sorted(
            pair for text in self.texts for pair in zip([EOT, *text.tolist()], [*text.tolist(), EOT], strict=True)
        )


def epoch_rows(packing, epoch):
    first = epoch * packing.rows_per_epoch
    return packing.rows(np.arange(first, first + packing.rows_per_epoch))


lengths = st.lists(st.integers(1, 40), min_size=1, max_size=12)


@settings(max_examples=100)
@given(lengths, st.integers(1, 17), st.integers(0, 2**40), st.integers(0, 3))
def test_an_epoch_holds_every_pair_once(lengths, sequence_length, seed, epoch):
    documents = Documents(lengths)
    rows = epoch_rows(Packing(documents, sequence_length, seed), epoch)
    real = rows["segment_ids"] > 0
    pairs = sorted(zip(rows["tokens"][real].tolist(), rows["targets"][real].tolist(), strict=True))
    assert pairs == documents.pairs()
    assert all(array.dtype == np.int32 for array in rows.values())


@settings(max_examples=100)
@given(lengths, st.integers(1, 17), st.integers(0, 2**40))
def test_segments_are_contiguous_and_hold_one_document_each(lengths, sequence_length, seed):
    documents = Documents(lengths)
    where = {int(token): i for i, text in enumerate(documents.texts) for token in text}
    rows = epoch_rows(Packing(documents, sequence_length, seed), 0)
    for tokens, targets, segment_ids in zip(*(rows[name] for name in ("tokens", "targets", "segment_ids"))):
        count = np.count_nonzero(segment_ids)
        # Runs 1 1 2 3 3 .. then padding: an id never comes back.
        assert (segment_ids[count:] == 0).all() and not tokens[count:].any() and not targets[count:].any()
        assert segment_ids[0] == 1 and set(np.diff(segment_ids[:count]).tolist()) <= {0, 1}
        for segment in range(1, segment_ids.max() + 1):
            here = segment_ids == segment
            seen = [t for t in [*tokens[here].tolist(), *targets[here].tolist()] if t != EOT]
            assert len({where[t] for t in seen}) <= 1
            # Within a segment the next input is this target, and end-of-text comes in only at its two ends.
            np.testing.assert_array_equal(tokens[here][1:], targets[here][:-1])
            assert EOT not in tokens[here][1:]


@settings(max_examples=100)
@given(lengths, st.integers(1, 17), st.integers(0, 2**40))
def test_only_the_last_row_is_padded(lengths, sequence_length, seed):
    documents = Documents(lengths)
    packing = Packing(documents, sequence_length, seed)
    filled = np.count_nonzero(epoch_rows(packing, 0)["segment_ids"], axis=1)
    assert packing.rows_per_epoch == -(-(sum(lengths) + len(lengths)) // sequence_length)
    assert sorted(filled, reverse=True)[:-1] == [sequence_length] * (packing.rows_per_epoch - 1)


def test_without_a_seed_rows_run_in_order_and_end():
    packing = Packing(Documents([3, 1, 2]), 4, None)
    rows = packing.rows(np.arange(4))
    np.testing.assert_array_equal(rows["tokens"], [[EOT, 0, 1, 2], [EOT, 3, EOT, 4], [5, 0, 0, 0], [0] * 4])
    np.testing.assert_array_equal(rows["targets"], [[0, 1, 2, EOT], [3, EOT, 4, 5], [EOT, 0, 0, 0], [0] * 4])
    np.testing.assert_array_equal(rows["segment_ids"], [[1] * 4, [1, 1, 2, 2], [1, 0, 0, 0], [0] * 4])


def test_rows_are_random_access():
    packing = Packing(Documents([30, 1, 7, 22, 5]), 6, seed=3)
    together = packing.rows(np.arange(40))
    for indices in ([39, 0, 17], [5], list(range(39, -1, -1))):
        alone = Packing(Documents([30, 1, 7, 22, 5]), 6, seed=3).rows(np.array(indices))
        for name, array in alone.items():
            np.testing.assert_array_equal(array, together[name][indices])


def test_epochs_and_seeds_differ():
    lengths = list(range(1, 60))
    first = epoch_rows(Packing(Documents(lengths), 16, seed=0), 0)["tokens"]
    assert (first != epoch_rows(Packing(Documents(lengths), 16, seed=0), 1)["tokens"]).mean() > 0.5
    assert (first != epoch_rows(Packing(Documents(lengths), 16, seed=1), 0)["tokens"]).mean() > 0.5
    assert (first == epoch_rows(Packing(Documents(lengths), 16, seed=0), 0)["tokens"]).all()


@pytest.mark.parametrize("key", ["rows", "documents"])
def test_epochs_and_seeds_permute_rows_and_documents(key, monkeypatch):
    """Each of the two alone makes epochs differ and seeds differ."""
    monkeypatch.setattr(
        "deltaformer_jax.data.packing.permuted",
        lambda indices, size, name: permuted(indices, size, name) if name.endswith(key) else indices,
    )
    documents = Documents(list(range(1, 60)))
    first, epoch, seed = (epoch_rows(Packing(documents, 16, s), e)["tokens"] for s, e in ((0, 0), (0, 1), (1, 0)))
    assert all((a != b).mean() > 0.5 for a, b in ((first, epoch), (first, seed), (epoch, seed)))


def test_a_row_of_a_long_document_reads_no_more_than_itself():
    documents = Documents([100_000])
    rows = Packing(documents, 8, seed=0).rows(np.arange(50))
    assert documents.most_read <= 9 and (rows["segment_ids"] == 1).all()


def test_offsets_beyond_32_bits():
    """Three documents of 2^33 tokens: row numbers and offsets are 64-bit throughout."""

    class Huge:
        lengths = np.full(3, 2**33, np.int64)
        documents, tokens, eot = 3, 3 * 2**33, EOT

        def read(self, document, start, stop):
            assert 0 <= start <= stop <= 2**33
            return np.arange(start, stop) % 1000

    packing = Packing(Huge(), 2, None)
    row = 2**32 + 5
    rows = packing.rows(np.array([row]))
    begin = row * 2 - (2**33 + 1)  # pairs into the second document
    np.testing.assert_array_equal(rows["targets"][0], (begin + np.arange(2)) % 1000)


@given(st.integers(1, 3000), st.text(max_size=5))
def test_permuted_is_a_permutation(size, key):
    np.testing.assert_array_equal(np.sort(permuted(np.arange(size), size, key)), np.arange(size))


def test_permuted_needs_no_neighbours_and_large_sizes_are_cheap():
    size = 10**15 + 7
    some = np.array([0, 1, 2, size - 1, 123_456_789_012])
    together = permuted(some, size, "k")
    assert len(set(together.tolist())) == 5 and together.min() >= 0 and together.max() < size
    assert [int(permuted(some[i : i + 1], size, "k")[0]) for i in range(5)] == together.tolist()


@pytest.mark.parametrize("size", [2, 3, 5, 50, 1000])
def test_permuted_is_even(size):
    """Over 2000 keys, where 0 goes is spread evenly: chi-squared of d degrees stays below d + 7 sqrt(2 d) + 20."""
    bins = min(size, 50)
    places = np.array([permuted(np.zeros(1, np.int64), size, str(key))[0] for key in range(2000)])
    counts = np.bincount(places * bins // size, minlength=bins)
    chi2 = ((counts - 2000 / bins) ** 2 / (2000 / bins)).sum()
    assert chi2 < bins - 1 + 7 * np.sqrt(2 * (bins - 1)) + 20


def test_permuted_golden():
    """A change here changes the batches of every run already begun: resumed runs would no longer be the same runs."""
    np.testing.assert_array_equal(permuted(np.arange(10), 10, "0 0 rows"), [3, 0, 9, 1, 6, 5, 7, 2, 8, 4])
