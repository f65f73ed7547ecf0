"""Conversations in rows: whole, apart, with the loss on the answers alone, from the file to the gradient and a run."""

import json
import math

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import training_cases as cases
from support.data.chat_cases import conversation, conversations, json_lines, tokenizer_folder

from deltaformer_jax.data import batches, count_batches, has_loss_mask, load_data, prepare_corpus
from deltaformer_jax.data.whole_packing import WholePacking
from deltaformer_jax.evaluate.__main__ import main as evaluate
from deltaformer_jax.evaluate.by_position import PositionSums
from deltaformer_jax.model import LanguageModel
from deltaformer_jax.model_parts import model_parts, new_params
from deltaformer_jax.training import evaluation
from deltaformer_jax.training.step import loss_and_gradient

EOT = 100_000


class Documents:
    """What WholePacking asks of a Split, in memory; every token differs from every other, odd ones bear loss."""

    masked = True

    def __init__(self, lengths):
        self.lengths = np.array(lengths, np.int64)
        self.documents, self.tokens, self.eot = len(lengths), int(sum(lengths)), EOT
        self.texts = np.split(np.arange(self.tokens), np.cumsum(lengths)[:-1])

    def read_with_mask(self, document, start, stop):
        text = self.texts[document][start:stop]
        return text, text % 2 == 1

    def pairs(self):
        return sorted(
            (first, then, then != EOT and then % 2 == 1)
            for text in self.texts
            for first, then in zip([EOT, *text.tolist()], [*text.tolist(), EOT], strict=True)
        )


lengths = st.lists(st.integers(1, 40), min_size=1, max_size=12)


@settings(max_examples=100)
@given(lengths, st.integers(1, 17), st.integers(0, 2**40), st.integers(0, 3))
def test_an_epoch_holds_every_pair_once_with_its_mask(lengths, sequence_length, seed, epoch):
    documents = Documents(lengths)
    packing = WholePacking(documents, sequence_length, seed)
    first = epoch * packing.rows_per_epoch
    rows = packing.rows(np.arange(first, first + packing.rows_per_epoch))
    real = rows["segment_ids"] > 0
    columns = (rows[name][real].tolist() for name in ("tokens", "targets", "loss_mask"))
    assert sorted(zip(*columns, strict=True)) == documents.pairs()
    assert not rows["loss_mask"][~real].any() and not rows["targets"][~real].any()
    one = packing.rows(np.array([first]))
    assert all((one[name][0] == rows[name][0]).all() for name in rows)


@settings(max_examples=100)
@given(lengths, st.integers(1, 17), st.integers(0, 2**40))
def test_a_conversation_that_fits_is_in_one_row_and_a_longer_one_is_cut_at_rows_ends(lengths, sequence_length, seed):
    documents = Documents(lengths)
    where = {int(token): i for i, text in enumerate(documents.texts) for token in text}
    packing = WholePacking(documents, sequence_length, seed)
    rows = packing.rows(np.arange(packing.rows_per_epoch))
    parts = {}
    for row, (tokens, targets, segments) in enumerate(zip(rows["tokens"], rows["targets"], rows["segment_ids"])):
        count = np.count_nonzero(segments)
        assert count and not segments[count:].any() and (np.diff(segments[:count]) >= 0).all()
        for segment in range(1, segments.max() + 1):
            here = segments == segment
            owners = {where[token] for token in [*tokens[here].tolist(), *targets[here].tolist()] if token != EOT}
            assert len(owners) == 1
            parts.setdefault(owners.pop(), []).append((row, int(here.sum())))
    for i, length in enumerate(documents.lengths):
        whole, last = divmod(int(length) + 1, sequence_length)
        assert sorted(size for _, size in parts[i]) == sorted([sequence_length] * whole + [last] * (last > 0))


def test_rows_are_filled_well_and_reordered_in_each_epoch():
    documents = Documents(np.random.default_rng(0).integers(1, 60, 2000).tolist())
    packing = WholePacking(documents, 64, 0)
    pairs = documents.tokens + documents.documents
    assert pairs / (packing.rows_per_epoch * 64) > 0.98
    one, two = (packing.rows(np.arange(packing.rows_per_epoch) + k * packing.rows_per_epoch)["tokens"] for k in (0, 1))
    assert (one != two).any() and sorted(map(bytes, one)) == sorted(map(bytes, two))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    file = tokenizer_folder(folder / "tokenizer")
    (folder / "a.jsonl").write_text(json_lines(conversations(60)), encoding="utf-8")
    return prepare_corpus(
        folder / "a.jsonl", folder / "corpus", tokenizer=str(file), chat="template", eval_fraction=0.2
    )


@pytest.fixture(scope="module")
def gradient(corpus):
    """params, and the function batch -> (loss, gradient, tokens) of a small DeltaFormer."""
    config = cases.small_config("", model__vocab_size=corpus.tokenizer.vocab_size, model__num_layers=1)
    parts = model_parts(config.model)
    params = jax.jit(lambda key: new_params(config.model, LanguageModel, key))(jax.random.key(0))
    return jax.jit(lambda batch: loss_and_gradient(parts, params, batch, 1))


LENGTH = 256


def packed(corpus):
    packing = WholePacking(corpus.split("train"), LENGTH, None)
    return packing.rows(np.arange(packing.rows_per_epoch))


def test_packed_and_unpacked_gradients_agree(corpus, gradient):
    split = corpus.split("train")
    together = packed(corpus)
    alone = {name: np.zeros((split.documents, LENGTH), array.dtype) for name, array in together.items()}
    for i in range(split.documents):
        text, mask = split.read_with_mask(i)
        n = len(text)
        assert n < LENGTH
        alone["tokens"][i, : n + 1] = [split.eot, *text]
        alone["targets"][i, : n + 1] = [*text, split.eot]
        alone["segment_ids"][i, : n + 1] = 1
        alone["loss_mask"][i, :n] = mask
    assert len(together["tokens"]) < split.documents / 1.5  # several are in one row
    loss, gradients, _ = gradient(together)
    loss_alone, gradients_alone, _ = gradient(alone)
    assert together["loss_mask"].sum() == alone["loss_mask"].sum()
    np.testing.assert_allclose(loss, loss_alone, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(gradients_alone), strict=True):
        # float32 sums of some thousand terms in another order.
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())


def test_what_the_user_and_the_system_say_bears_no_loss(corpus, gradient):
    batch = packed(corpus)
    said = batch["targets"][batch["loss_mask"]]
    names = corpus.tokenizer.special_tokens
    assert (said == names["<|im_end|>"].id).sum() == sum(
        1 for row in packed_texts(corpus) for _ in range(row.count("assistant\n"))
    )
    assert names["<|im_start|>"].id not in said and corpus.tokenizer.eot not in said
    other = np.where(batch["loss_mask"], batch["targets"], 7)
    loss, gradients, _ = gradient(batch)
    loss_other, gradients_other, _ = gradient({**batch, "targets": other})
    assert (other != batch["targets"]).any() and float(loss) == float(loss_other)
    for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(gradients_other), strict=True):
        np.testing.assert_array_equal(a, b)
    everything = {name: array for name, array in batch.items() if name != "loss_mask"}
    assert abs(float(gradient(everything)[0]) - float(loss)) > 1e-3


def packed_texts(corpus):
    split = corpus.split("train")
    return [corpus.tokenizer.decode(split.read(i)) for i in range(split.documents)]


def test_batches_are_the_same_for_any_number_of_processes(corpus):
    options = dict(sequence_length=64, batch_size=4, seed=3)
    whole = batches(corpus, "train", **options)
    halves = [batches(corpus, "train", **options, process_index=i, process_count=2) for i in range(2)]
    for _ in range(6):
        batch, parts = next(whole), [next(half) for half in halves]
        for name, array in batch.items():
            np.testing.assert_array_equal(array, np.concatenate([part[name] for part in parts]))
    found = list(batches(corpus, "eval", **options))
    assert len(found) == count_batches(corpus, "eval", sequence_length=64, batch_size=4)


def test_a_mixture_with_text_counts_every_token_of_the_text(corpus, tmp_path):
    (tmp_path / "a.txt").write_text("what is the delta rule " * 200, encoding="utf-8")
    text = prepare_corpus(
        tmp_path / "a.txt", tmp_path / "text", tokenizer=str(corpus.path / "tokenizer.json"), eval_fraction=0
    )
    spec = f"{corpus.path}=1,{text.path}=1"
    assert has_loss_mask(spec) and has_loss_mask(corpus.path) and not has_loss_mask(text.path)
    batch = next(batches(load_data(spec), "train", sequence_length=64, batch_size=64, seed=0))
    real = batch["segment_ids"] > 0
    is_chat = (batch["tokens"] == corpus.tokenizer.special_tokens["<|im_start|>"].id).any(axis=1)
    assert 10 < is_chat.sum() < 54
    np.testing.assert_array_equal(batch["loss_mask"][~is_chat], real[~is_chat])
    assert (batch["loss_mask"][is_chat].sum(axis=1) < real[is_chat].sum(axis=1)).all()


def test_a_run_on_conversations_trains_and_evaluates_and_is_repeatable(corpus, tmp_path, capsys):
    config = cases.small_config(corpus.path, data__sequence_length=64)
    run = cases.run_training(config, tmp_path / "run")
    records = cases.read_metrics(tmp_path / "run")
    losses = [record["loss"] for record in records if "loss" in record]
    assert losses[-1] < losses[0] and run.step == 12
    assert list(records[-1]) == ["step", "eval_loss", "eval_accuracy", "eval_bits_per_byte"]
    assert 0 <= records[-1]["eval_accuracy"] <= 1
    # The bytes of the answers' text and the tokens that bear loss, from the conversations themselves.
    split = corpus.split("eval")
    whole = lambda talk: "".join(f"{message['role']}\n{message['content']}\n" for message in talk)
    asked = {corpus.tokenizer.decode(split.read(i)) for i in range(split.documents)}
    said = [message for talk in conversations(60) if whole(talk) in asked for message in talk]
    size = sum(len(message["content"].encode()) for message in said if message["role"] == "assistant")
    tokens = sum(split.read_with_mask(i)[1].sum() for i in range(split.documents))
    bits = records[-1]["eval_loss"] * tokens / np.log(2) / size
    assert records[-1]["eval_bits_per_byte"] == pytest.approx(bits, rel=1e-12)
    capsys.readouterr()
    evaluate(["--workdir", str(tmp_path / "run")])
    printed = capsys.readouterr()
    result = json.loads(printed.out)
    assert (result["bytes"], result["tokens"]) == (size, tokens)
    for name in ("loss", "accuracy", "bits_per_byte"):  # the same nats, each row's summed in float32 there
        assert result[name] == pytest.approx(records[-1][f"eval_{name}"], rel=1e-6)
    assert "perplexity  accuracy  bits per byte" in printed.err
    twice = cases.run_training(config, tmp_path / "again")
    for a, b in zip(jax.tree.leaves(run.state.params), jax.tree.leaves(twice.state.params), strict=True):
        np.testing.assert_array_equal(a, b)


def test_bits_per_byte_count_the_nats_of_special_tokens_and_no_bytes_of_them(monkeypatch):
    # Token 0 is end-of-text, 1 ends an answer, 2 and 3 have two bytes and three. Nats are sums of powers of two.
    token_bytes = np.array([0, 0, 2, 3], np.int32)
    batch = {
        "tokens": np.array([[0, 3, 2, 1, 0], [0, 2, 3, 0, 0]]),
        "targets": np.array([[3, 2, 1, 3, 0], [2, 3, 1, 0, 0]]),
        "segment_ids": np.array([[1, 1, 1, 1, 0], [1, 1, 1, 0, 0]]),
        "loss_mask": np.array([[False, True, True, True, False], [False, True, True, False, False]]),
    }
    nats = np.where(batch["loss_mask"], np.array([[8, 0.5, 0.25, 1, 8], [8, 2, 0.125, 8, 8]]), 0)
    hits = batch["loss_mask"] & (nats < 1)
    step = lambda params, batch: {"nats": nats.sum(axis=1), "hits": hits.sum(axis=1)}
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    found = evaluation.evaluate(step, None, [batch], token_bytes=token_bytes, sharding=sharding)
    sums = PositionSums(5)
    sums.add(nats, batch, token_bytes[batch["targets"]], hits)
    bits = (0.5 + 0.25 + 1 + 2 + 0.125) / math.log(2) / (2 + 0 + 3 + 3 + 0)
    assert found == (3.875 / 5, bits, 5, 8, 3 / 5)
    assert {name: sums.report()[name] for name in found._fields} == found._asdict()
    # Answers without text: there is nothing to divide by, as in a task.
    empty = {**batch, "targets": np.ones_like(batch["targets"])}
    assert evaluation.evaluate(step, None, [empty], token_bytes=token_bytes, sharding=sharding).bits_per_byte is None
    # With another process that has more than 32 bits count.
    monkeypatch.setattr(evaluation.common, "gather", lambda name, counts: [counts, [2**31, 2**33]])
    more = evaluation.evaluate(step, None, [batch], token_bytes=token_bytes, sharding=sharding)
    assert (more.tokens, more.bytes) == (5 + 2**31, 8 + 2**33)


def test_a_batch_without_an_answer_changes_nothing(corpus, gradient):
    batch = packed(corpus)
    loss, gradients, _ = gradient({**batch, "loss_mask": np.zeros_like(batch["loss_mask"])})
    assert float(loss) == 0
    assert all(not np.asarray(leaf).any() for leaf in jax.tree.leaves(gradients))


def test_a_conversation_longer_than_a_row_is_learnt_in_parts(tmp_path):
    talk = conversation("ab", "c" * 50)
    (tmp_path / "a.jsonl").write_text(json_lines([talk]), encoding="utf-8")
    corpus = prepare_corpus(tmp_path / "a.jsonl", tmp_path / "out", chat="plain", eval_fraction=0)
    rows = WholePacking(corpus.split("train"), 32, None).rows(np.arange(3))
    assert (rows["segment_ids"] > 0).sum() == corpus.split("train").tokens + 1
    assert sorted(rows["targets"][rows["loss_mask"]].tolist()) == sorted([*b"c" * 50, 256])
