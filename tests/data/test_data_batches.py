"""Batches: batch n is a function of (seed, n), whatever the start, the processes and the threads."""

import itertools
import threading

import numpy as np
import pytest

from deltaformer_jax.data import batches, count_batches, prepare_corpus

SIZES = {"sequence_length": 32, "batch_size": 4}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "text").mkdir()
    for i in range(40):
        (folder / "text" / f"{i:02}.txt").write_text(f"document {i}: " + "word " * (i * 7 % 30) + "\n")
    return prepare_corpus(folder / "text", folder / "corpus", eval_fraction=0.3)


def take(iterator, n):
    return list(itertools.islice(iterator, n))


def assert_same(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right):
        assert a.keys() == b.keys() == {"tokens", "targets", "segment_ids"}
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


def test_shapes(corpus):
    batch = next(batches(corpus, "train", **SIZES, seed=0))
    assert {name: (array.shape, array.dtype) for name, array in batch.items()} == dict.fromkeys(
        ["tokens", "targets", "segment_ids"], ((4, 32), np.int32)
    )


def test_starting_late_is_skipping(corpus):
    whole = take(batches(corpus, "train", **SIZES, seed=5), 60)
    for start in (1, 7, 59):
        assert_same(take(batches(corpus, "train", **SIZES, seed=5, start_step=start), 60 - start), whole[start:])


@pytest.mark.parametrize("split", ["train", "eval"])
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_processes_hold_slices_of_the_global_batch(corpus, split, processes):
    whole = take(batches(corpus, split, **SIZES, seed=1), 30)
    parts = [
        take(batches(corpus, split, **SIZES, seed=1, process_index=p, process_count=processes), 30)
        for p in range(processes)
    ]
    assert all(part[0]["tokens"].shape == (4 // processes, 32) for part in parts)
    joined = [{name: np.concatenate([b[name] for b in step]) for name in step[0]} for step in zip(*parts, strict=True)]
    assert_same(joined, whole)


def test_any_rows_of_the_global_batch(corpus):
    """As a mesh asks for them whose axes cross hosts: other numbers, and several processes the same."""
    whole = take(batches(corpus, "train", **SIZES, seed=1), 10)
    for rows in ([1], [0, 3], [1, 2], [0, 1, 2, 3]):
        part = take(batches(corpus, "train", **SIZES, seed=1, rows=np.array(rows)), 10)
        assert_same(part, [{name: x[rows] for name, x in batch.items()} for batch in whole])


def test_threads_change_nothing(corpus):
    expected = take(batches(corpus, "train", **SIZES, seed=2, num_threads=0), 100)
    for threads in (1, 2, 8):
        assert_same(take(batches(corpus, "train", **SIZES, seed=2, num_threads=threads), 100), expected)


def test_threads_end_with_the_iterator(corpus):
    before = set(threading.enumerate())
    for _ in range(5):
        iterator = batches(corpus, "train", **SIZES, seed=2)
        next(iterator)
        del iterator
    for thread in set(threading.enumerate()) - before:
        thread.join(timeout=10)
        assert not thread.is_alive()


def test_seeds_differ(corpus):
    one, other = (next(batches(corpus, "train", **SIZES, seed=seed))["tokens"] for seed in (0, 1))
    assert (one != other).any()


def test_the_same_batch_size_reads_the_same_stream_of_rows(corpus):
    """Row r does not depend on the batch size: two batches of 4 are one of 8."""
    fours = take(batches(corpus, "train", **SIZES, seed=0), 20)
    eights = take(batches(corpus, "train", sequence_length=32, batch_size=8, seed=0), 10)
    joined = [{name: np.concatenate([a[name], b[name]]) for name in a} for a, b in zip(fours[::2], fours[1::2])]
    assert_same(joined, eights)


def test_eval_is_one_pass_in_order_filled_with_padding(corpus):
    split = corpus.split("eval")
    passed = list(batches(corpus, "eval", **SIZES, seed=9))
    assert len(passed) == count_batches(corpus, "eval", **SIZES) and passed[-1]["tokens"].shape == (4, 32)
    real = np.concatenate([batch["segment_ids"].ravel() for batch in passed]) > 0
    assert real.sum() == split.tokens + split.documents
    assert not real[real.sum() :].any()
    targets = np.concatenate([batch["targets"].ravel() for batch in passed])[real]
    text = [part for i in range(split.documents) for part in (*split.read(i), corpus.tokenizer.eot)]
    np.testing.assert_array_equal(targets, text)
    assert_same(list(batches(corpus, "eval", **SIZES, seed=0)), passed)
    assert_same(list(batches(corpus, "eval", **SIZES, seed=0, start_step=2)), passed[2:])
    assert list(batches(corpus, "eval", **SIZES, seed=0, start_step=10_000)) == []


def test_bytes_of_the_targets_are_the_bytes_of_the_text(corpus):
    """What bits per byte divides by."""
    targets = [batch["targets"][batch["segment_ids"] > 0] for batch in batches(corpus, "eval", **SIZES, seed=0)]
    total = corpus.tokenizer.token_bytes[np.concatenate(targets)].sum()
    assert total == corpus.manifest["splits"]["eval"]["bytes"]


def test_an_epoch_longer_or_shorter_than_a_batch(corpus):
    """A batch may hold several epochs: each pair comes as often as there are epochs in it."""
    split = corpus.split("train")
    rows = -(-(split.tokens + split.documents) // 2048)
    batch = next(batches(corpus, "train", sequence_length=2048, batch_size=3 * rows, seed=0))
    assert (batch["segment_ids"] > 0).sum() == 3 * (split.tokens + split.documents)
    assert (batch["targets"][batch["segment_ids"] > 0] == corpus.tokenizer.eot).sum() == 3 * split.documents


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"sequence_length": 0}, "sequence_length is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"start_step": -1}, "start_step is -1"),
        ({"process_count": 3}, "batch_size 4 must be a multiple of process_count 3"),
        ({"process_count": 0}, "process_count 0"),
        ({"process_count": 2, "process_index": 2}, "process_index 2"),
        ({"rows": np.array([0, 4])}, r"rows \[0 4\]: must be numbers in \[0, batch_size\), batch_size 4"),
        ({"rows": np.array([-1])}, r"rows \[-1\]: must be"),
        ({"rows": np.array([], int)}, r"rows \[\]: .* and at least one"),
        ({"rows": np.array([0]), "process_count": 2}, "rows and process_count 2: give one of them"),
        ({"num_threads": -1}, "num_threads is -1"),
        ({"split": "test"}, "split 'test' is not one of 'train', 'eval'"),
    ],
)
def test_errors_come_with_the_call(corpus, changed, message):
    arguments = {"split": "train", **SIZES, "seed": 0, **changed}
    with pytest.raises(ValueError, match=message):
        batches(corpus, arguments.pop("split"), **arguments)


def test_an_empty_split(tmp_path):
    (tmp_path / "a.txt").write_text("only one document")
    corpus = prepare_corpus(tmp_path / "a.txt", tmp_path / "corpus", eval_fraction=0)
    with pytest.raises(ValueError, match=r"the eval split of .* has no documents"):
        batches(corpus, "eval", **SIZES, seed=0)
    with pytest.raises(ValueError, match="has no documents"):
        count_batches(corpus, "eval", **SIZES)
