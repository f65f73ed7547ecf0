"""Mixtures: weights hold in every block, each corpus's rows come once, batch n is a function of (seed, n)."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaformer_jax.data import Mixture, batches, count_batches, load_data, prepare_corpus
from deltaformer_jax.data.batches import _Batches
from deltaformer_jax.data.mixture import BLOCK, MixedPacking, quotas
from deltaformer_jax.data.packing import Packing

EOT = 10_000_000


class Documents:
    """What Packing asks of a Split, in memory; tokens from `first` on, each another."""

    masked = False

    def __init__(self, lengths, first=0):
        self.lengths = np.array(lengths, np.int64)
        self.documents, self.tokens, self.eot = len(lengths), int(sum(lengths)), EOT
        self.texts = np.split(np.arange(first, first + self.tokens), np.cumsum(lengths)[:-1])

    def read(self, document, start, stop):
        return self.texts[document][start:stop]


weights = st.lists(st.floats(0.01, 100), min_size=1, max_size=5)


@settings(max_examples=100)
@given(weights)
def test_quotas_are_the_shares(weights):
    counts = quotas(weights)
    assert counts.sum() == BLOCK
    assert np.abs(counts - np.array(weights) / sum(weights) * BLOCK).max() < 1


@given(weights, st.integers(0, 2**40), st.integers(0, 10**9))
def test_every_block_holds_its_quota_of_each_corpus_in_step(weights, seed, block):
    mixed = MixedPacking([Documents([5])] * len(weights), weights, 4, seed)
    corpus, rows = mixed.place(np.arange(block * BLOCK, (block + 1) * BLOCK))
    for i, quota in enumerate(quotas(weights)):
        np.testing.assert_array_equal(np.sort(rows[corpus == i]), np.arange(block * quota, (block + 1) * quota))


@given(weights, st.integers(0, 2**40))
def test_the_order_is_shuffled(weights, seed):
    """Any 1,000 rows are near the weights: the deviation of a draw without replacement stays below 7 sigma."""
    corpus, _ = MixedPacking([Documents([5])] * len(weights), weights, 4, seed).place(np.arange(3000, 4000))
    share = quotas(weights) / BLOCK
    counts = np.bincount(corpus, minlength=len(weights))
    assert (np.abs(counts - 1000 * share) <= 7 * np.sqrt(1000 * share * (1 - share)) + 1).all()


lengths = st.lists(st.integers(1, 20), min_size=1, max_size=6)


@settings(max_examples=60)
@given(st.lists(lengths, min_size=1, max_size=3), st.integers(1, 9))
def test_evaluation_passes_once_over_every_corpus(corpora, sequence_length):
    splits = [Documents(one, 1000 * i) for i, one in enumerate(corpora)]
    mixed = MixedPacking(splits, [1.0] * len(splits), sequence_length, None)
    rows = mixed.rows(np.arange(mixed.rows_per_epoch + 3))
    alone = [Packing(split, sequence_length, None) for split in splits]
    expected = [one.rows(np.arange(one.rows_per_epoch)) for one in alone]
    for name in ("tokens", "targets", "segment_ids"):
        joined = np.concatenate([one[name] for one in expected])
        assert sorted(map(tuple, rows[name][:-3].tolist())) == sorted(map(tuple, joined.tolist()))
        assert not rows[name][-3:].any()


@settings(max_examples=60)
@given(
    st.lists(lengths, min_size=1, max_size=3),
    st.integers(1, 9),
    st.integers(0, 2**40),
    st.integers(0, 10**6),
    st.sampled_from([(1, 1), (2, 1), (2, 2), (4, 2), (6, 3), (8, 8), (12, 4)]),
    st.booleans(),
)
def test_a_batch_is_the_same_however_many_processes_read_it(corpora, length, seed, start, sizes, mixed):
    batch_size, processes = sizes
    splits = [Documents(one, 1000 * i) for i, one in enumerate(corpora)]

    def rows():  # each process makes its own
        weights = range(1, len(splits) + 1)
        return MixedPacking(splits, weights, length, seed) if mixed else Packing(splits[0], length, seed)

    every = np.arange(batch_size)
    whole = [_Batches(rows(), batch_size, start, 10, every)[i] for i in range(3)]
    parts = [[_Batches(rows(), batch_size, start, 10, own)[i] for i in range(3)] for own in np.split(every, processes)]
    later = _Batches(rows(), batch_size, start + 2, 10, every)[0]
    for name in ("tokens", "targets", "segment_ids"):
        for i in range(3):
            np.testing.assert_array_equal(np.concatenate([part[i][name] for part in parts]), whole[i][name])
        np.testing.assert_array_equal(later[name], whole[2][name])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpora")
    for name in ("code", "web"):
        (folder / "text" / name).mkdir(parents=True)
        for i in range(30):
            (folder / "text" / name / f"{i:02}.txt").write_text(f"{name[0]}" * (10 + i))
        prepare_corpus(folder / "text" / name, folder / name, eval_fraction=0.3)
    return folder


def test_a_mixture_of_prepared_corpora(folders):
    mixture = load_data(f"{folders}/code=3,{folders}/web=1")
    assert isinstance(mixture, Mixture) and mixture.weights == (3, 1) and mixture.tokenizer.kind == "bytes"
    stream = batches(mixture, "train", sequence_length=16, batch_size=50, seed=0)
    tokens = np.concatenate([batch["tokens"].ravel() for batch in itertools.islice(stream, 40)])
    code, web = (tokens == ord("c")).sum(), (tokens == ord("w")).sum()
    assert 0.72 < code / (code + web) < 0.78
    late = batches(mixture, "train", sequence_length=16, batch_size=50, seed=0, start_step=39)
    np.testing.assert_array_equal(next(late)["tokens"].ravel(), tokens[-800:])
    entries = [corpus.manifest["splits"]["eval"] for corpus in mixture.corpora]
    total = mixture.manifest["splits"]["eval"]
    assert total["tokens"] == sum(entry["tokens"] for entry in entries)
    passed = list(batches(mixture, "eval", sequence_length=16, batch_size=4, seed=0))
    assert len(passed) == count_batches(mixture, "eval", sequence_length=16, batch_size=4)
    real = np.concatenate([batch["segment_ids"].ravel() for batch in passed]) > 0
    assert real.sum() == total["tokens"] + total["documents"]
    first = np.concatenate([batch["tokens"].ravel() for batch in passed[: len(passed) // 2]])
    assert ord("c") in first and ord("w") in first  # a limited evaluation sees both


def test_the_hash_follows_corpora_and_weights(folders):
    specs = ("code=3,{0}/web=1", "code=1,{0}/web=3", "web=1,{0}/code=3", "code=3")
    hashes = {load_data(f"{folders}/{spec}".format(folders)).hash for spec in specs}
    assert len(hashes) == 4
    assert load_data(f"{folders}/code=3,{folders}/web=1").hash in hashes
    assert load_data(folders / "code").hash not in hashes


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("{0}/code,{0}/web", ValueError, "code' has no weight; a mixture is FOLDER=WEIGHT,FOLDER=WEIGHT"),
        ("{0}/code=1,{0}/web", ValueError, "web' has no weight"),
        ("{0}/code=much", ValueError, "the weight 'much' of .*code is not a number"),
        ("{0}/code=1,{0}/web=0", ValueError, "weight 0.0 in a mixture: must be a number above 0"),
        ("{0}/code=1,{0}/web=-1", ValueError, "weight -1.0"),
        ("{0}/code=1,{0}/web=nan", ValueError, "weight nan"),
        ("{0}/code=1,{0}/web=1e-9", ValueError, "weight 1e-09 in a mixture: below 1/10000"),
        ("{0}/code=1,{0}/none=1", FileNotFoundError, "none: no such folder"),
        ("{0}/none", FileNotFoundError, "none: no such folder"),
        ("=1", ValueError, "has no weight"),
    ],
)
def test_errors(folders, spec, error, message):
    with pytest.raises(error, match=message):
        load_data(spec.format(folders))


def test_tokenizers_must_agree(folders, tmp_path):
    other = prepare_corpus(folders / "text" / "web", tmp_path / "bpe", tokenizer="bpe:260")
    with pytest.raises(ValueError, match=r"bpe: made with another tokenizer than .*code; prepare it with --tokenizer"):
        load_data(f"{folders}/code=1,{other.path}=1")


def test_without_evaluation_documents(folders, tmp_path):
    bare = prepare_corpus(folders / "text" / "web", tmp_path / "bare", eval_fraction=0)
    mixture = load_data(f"{folders}/code=1,{bare.path}=1")
    sizes = {"sequence_length": 16, "batch_size": 4}
    assert count_batches(mixture, "eval", **sizes) == count_batches(mixture.corpora[0], "eval", **sizes)
    with pytest.raises(ValueError, match=r"the eval split of .*bare has no documents"):
        count_batches(load_data(f"{bare.path}=1"), "eval", **sizes)
