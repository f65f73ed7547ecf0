"""A run that was stopped, or died, and one that never did: the same lines and the same weights, bit for bit."""

import json
import math

import jax
import numpy as np
import pytest
from support import training_cases as cases

from deltaformer_jax.data import batches
from deltaformer_jax.model_parts import merge
from deltaformer_jax.training import setup
from deltaformer_jax.training.loop import RunError, train
from deltaformer_jax.training.setup import prepare


@pytest.fixture(scope="module", autouse=True)
def compile_once(tmp_path_factory):
    yield from cases.compile_once(tmp_path_factory.mktemp("compiled"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return cases.make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    """A run that was never stopped: (its folder, its last state)."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    return workdir, cases.run_training(cases.small_config(corpus), workdir).state


def test_the_metrics_file(whole):
    records = cases.read_metrics(whole[0], timeless=False)
    training = [record for record in records if "loss" in record]
    evaluations = [record for record in records if "eval_loss" in record]
    assert len(training) + len(evaluations) == len(records)
    assert [record["step"] for record in training] == list(range(1, 13))
    assert [record["step"] for record in evaluations] == [5, 10, 12]  # the last of them at the end of the run
    for record in training:
        assert list(record) == ["step", "loss", "tokens_per_second", "grad_norm", "learning_rate"]
        assert record["tokens_per_second"] > 0
    for record in evaluations:
        assert list(record) == ["step", "eval_loss", "eval_bits_per_byte"]
    assert training[-1]["loss"] < training[0]["loss"]
    assert training[1]["learning_rate"] == pytest.approx(3e-3 * 2 / 3, rel=1e-5)
    # An evaluation stands between the last update it has seen and the next one.
    order = [(record["step"], "loss" in record) for record in records]
    assert order.index((5, False)) == order.index((5, True)) + 1 == order.index((6, True)) - 1


def test_what_a_run_leaves(whole):
    folder = whole[0]
    assert {path.name for path in folder.iterdir()} == cases.FILES
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"4", "8", "12"}
    config = json.loads((folder / "config.json").read_text())
    assert config["model"]["d_model"] == 32 and len(config["tokenizer_hash"]) == 64


@pytest.mark.parametrize("step", [pytest.param(1, marks=pytest.mark.rare), 5, pytest.param(7, marks=pytest.mark.rare)])
def test_stopped_and_resumed(corpus, whole, tmp_path, step):
    config = cases.small_config(corpus)
    run = cases.run_training(config, tmp_path / "run", stop=lambda steps: cases.StopAt(steps, step))
    assert run.step == step and (tmp_path / "run" / "checkpoints" / str(step)).exists()
    again = cases.run_training(config, tmp_path / "run")
    assert again.resumed and again.step == 12
    assert cases.read_metrics(tmp_path / "run") == cases.read_metrics(whole[0])
    cases.assert_same_bits(again.state, whole[1])


@pytest.mark.parametrize("step", [pytest.param(2, marks=pytest.mark.rare), 7])
def test_died_and_resumed(corpus, whole, tmp_path, step):
    """Nothing is saved at the death; lines after the last checkpoint, and half a line, are cut away."""
    config = cases.small_config(corpus)
    with pytest.raises(cases.ProcessDied):
        cases.run_training(config, tmp_path, stop=lambda steps: cases.DieAt(steps, step))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    run, position, state = prepare(config, tmp_path, devices=jax.devices()[:1])
    assert position.step == (4 if step == 7 else 0) and run.resumed == (step == 7)
    assert all(record["step"] <= position.step for record in cases.read_metrics(tmp_path))
    ending = train(run, position, state, cases.Interruption(), quiet=True)
    assert cases.read_metrics(tmp_path) == cases.read_metrics(whole[0])
    cases.assert_same_bits(ending.state, whole[1])


def test_a_finished_run_goes_on(corpus, whole, tmp_path):
    cases.run_training(cases.small_config(corpus, run__steps=8), tmp_path)
    longer = cases.run_training(cases.small_config(corpus), tmp_path)
    # One line more: the evaluation at what was then the end.
    lines = [record for record in cases.read_metrics(tmp_path) if not (record["step"] == 8 and "eval_loss" in record)]
    assert lines == cases.read_metrics(whole[0]) and len(lines) + 1 == len(cases.read_metrics(tmp_path))
    cases.assert_same_bits(longer.state, whole[1])
    before = (tmp_path / "metrics.jsonl").read_text()
    cases.run_training(cases.small_config(corpus), tmp_path)  # there is nothing left to do
    assert (tmp_path / "metrics.jsonl").read_text() == before
    with pytest.raises(ValueError, match=r"run.steps = 3: .* has made 12"):
        prepare(cases.small_config(corpus, run__steps=3), tmp_path)


@pytest.mark.long
def test_resumed_on_another_mesh(corpus, whole, tmp_path):
    config = cases.small_config(corpus)
    cases.run_training(config, tmp_path, stop=lambda steps: cases.StopAt(steps, 6))
    run = cases.run_training(cases.small_config(corpus, mesh__fsdp=2, mesh__tensor=2), tmp_path, devices=8)
    assert run.program.mesh.size == 8
    here, there = cases.read_metrics(tmp_path), cases.read_metrics(whole[0])
    for a, b in zip(here, there, strict=True):
        assert a == pytest.approx(b, abs=1e-4, rel=1e-3)


def test_evaluation_is_the_exact_number_over_the_split(corpus, whole):
    config = cases.small_config(corpus)
    run, _, state = prepare(config, whole[0], devices=jax.devices()[:1])
    run.checkpoints.close()
    forward = jax.jit(lambda params, tokens, ids: merge(run.program.parts, params)(tokens, segment_ids=ids)[0])
    nats = count = size = 0
    for batch in batches(run.corpus, "eval", sequence_length=32, batch_size=8, seed=0):
        logits = np.asarray(forward(state.params, batch["tokens"], batch["segment_ids"]), np.float64)
        row, column = np.nonzero(batch["segment_ids"])
        targets = batch["targets"][row, column]
        nats += (np.log(np.exp(logits).sum(-1))[row, column] - logits[row, column, targets]).sum()
        count, size = count + len(targets), size + (targets != 256).sum()
    split = run.corpus.split("eval")
    assert (count, size) == (split.tokens + split.documents, split.tokens)
    last = cases.read_metrics(whole[0])[-1]
    assert last["eval_loss"] == pytest.approx(nats / count, rel=1e-6)
    assert last["eval_bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-6)


def test_eval_batches_is_a_limit(corpus, tmp_path):
    cases.run_training(cases.small_config(corpus, run__steps=1, run__eval_batches=1), tmp_path / "one")
    cases.run_training(cases.small_config(corpus, run__steps=1), tmp_path / "all")
    one, every = (cases.read_metrics(tmp_path / name)[-1]["eval_loss"] for name in ("one", "all"))
    assert one != every


def test_other_data_is_refused(corpus, whole, tmp_path):
    other = cases.make_corpus(tmp_path, words=("another", "text"))
    with pytest.raises(ValueError, match=f"{other}: its text .* is not that of the run in {whole[0]}"):
        prepare(cases.small_config(other), whole[0])
    saved = json.loads((whole[0] / "config.json").read_text())
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "config.json").write_text(json.dumps({**saved, "tokenizer_hash": "0" * 64}))
    with pytest.raises(ValueError, match=r"its tokenizer .* is not the one of the run"):
        prepare(cases.small_config(corpus), copy)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model__vocab_size": 100}, "model.vocab_size = 100: the tokenizer has 257"),
        ({"data__path": "/no/such/folder"}, "/no/such/folder"),
        ({"data__batch_size": 9}, "data.batch_size = 9: not a multiple of"),
        ({"model__num_heads": 3, "model__num_kv_heads": 2}, "num_heads"),
        ({"model__implementation": "fastest"}, "fastest"),
    ],
)
def test_what_cannot_run_leaves_no_trace(corpus, tmp_path, fields, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        prepare(cases.small_config(corpus, **fields), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_folder_that_another_process_took_over(corpus, tmp_path, monkeypatch):
    """In an object store: before anything is written, and before the first step."""
    looks = []

    def check_claim(folder, name):
        looks.append((folder, name))
        if len(looks) == last:
            raise ValueError("taken over")

    monkeypatch.setattr(setup, "check_claim", check_claim)
    last = 1
    with pytest.raises(ValueError, match="taken over"):
        prepare(cases.small_config(corpus), tmp_path / "run", devices=jax.devices()[:1])
    assert not (tmp_path / "run").exists()
    last = 3
    with pytest.raises(ValueError, match="taken over"):
        prepare(cases.small_config(corpus), tmp_path / "run", devices=jax.devices()[:1])
    assert looks == [(str(tmp_path / "run"), "train")] * 3 and not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_folder_that_is_not_a_runs(corpus, tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(ValueError, match=r"no config\.json"):
        prepare(cases.small_config(corpus), tmp_path)
    with pytest.raises(ValueError, match="is a file"):
        prepare(cases.small_config(corpus), tmp_path / "letter.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


def test_a_loss_that_is_not_a_number_stops_the_run(corpus, tmp_path):
    config = cases.small_config(corpus, optimizer__learning_rate=1e30, optimizer__clip_norm=0.0)
    with pytest.raises(RunError, match=r"step \d+: loss .*optimizer.learning_rate"):
        cases.run_training(config, tmp_path)
    assert all(math.isfinite(record.get("loss", 0)) for record in cases.read_metrics(tmp_path))


def test_damaged_data_is_named(corpus, tmp_path):
    prepared = prepare(cases.small_config(corpus), tmp_path / "run", devices=jax.devices()[:1])

    def read(*_):
        raise ValueError("shard 3 is damaged")

    prepared.run.corpus.split("train").read = read
    with pytest.raises(RunError, match="shard 3 is damaged"):
        train(*prepared, cases.Interruption(), quiet=True)


def test_an_experiment_ends_a_run_at_an_evaluation(corpus, whole, tmp_path):
    """Saved there; asked again of the same evaluation by a run that goes on, whose steps are those of any other."""
    asked = []

    def second(record):
        asked.append(record)
        return record["step"] == 10

    config = cases.small_config(corpus, run__checkpoint_every=0)
    for _ in range(2):
        prepared = prepare(config, tmp_path, devices=jax.devices()[:1])
        ending = train(*prepared, cases.Interruption(), quiet=True, until=second, save_seconds=0.0)
        assert ending.finished and ending.position.step == 10
    expected = [record for record in cases.read_metrics(whole[0]) if record["step"] <= 10]
    assert cases.read_metrics(tmp_path) == expected
    assert asked == [record for record in [*expected, expected[-1]] if "eval_loss" in record]
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"8", "9", "10"}  # no second went by unsaved
    longer = cases.run_training(cases.small_config(corpus), tmp_path)
    cases.assert_same_bits(longer.state, whole[1])
