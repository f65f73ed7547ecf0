"""train.py on a synthetic task: batches, scores, resuming, what is refused, and the configs."""

import json
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import training_cases as cases

from deltaformer_jax import tasks
from deltaformer_jax import train as program
from deltaformer_jax.config import Config
from deltaformer_jax.config.command_line import parse
from deltaformer_jax.config.files import config_folder
from deltaformer_jax.config.saved import from_json, to_json
from deltaformer_jax.data import TaskData, batches, count_batches, load_data, load_tokenizer
from deltaformer_jax.evaluate import __main__ as evaluate
from deltaformer_jax.evaluate.corpus import check_same_kind, evaluation_corpus
from deltaformer_jax.model_parts import merge
from deltaformer_jax.sample import __main__ as sample
from deltaformer_jax.training import evaluation
from deltaformer_jax.training.checkpoints.restore import restore
from deltaformer_jax.training.loss import batch_nats, batch_nats_and_hits

# ml_collections loads a config file by a method that Python has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
SPEC = "task:parity,longest=12"
LENGTH = 14


@pytest.fixture(scope="module", autouse=True)
def compiled(tmp_path_factory):
    yield from cases.compile_once(tmp_path_factory.mktemp("compiled"))


def task_config(**fields):
    small = dict(
        data__sequence_length=LENGTH,
        model__num_layers=1,
        model__tie_embeddings=False,
        run__eval_every=6,
        run__eval_batches=3,
    )
    return cases.small_config(SPEC, **{**small, **fields})


@pytest.fixture(scope="module")
def whole(compiled, tmp_path_factory):
    """A run that was never stopped: (its folder, the Run)."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    return folder, cases.run_training(task_config(), folder)


# Batches.


@settings(max_examples=10)
@given(st.integers(0, 50), st.sampled_from([1, 2, 4]), st.integers(0, 5))
def test_batch_n_is_the_examples_n_b_to_n_b_plus_b(number, processes, seed):
    data, task = TaskData(SPEC), tasks.Parity(LENGTH, longest=12)
    expected = task(seed, np.arange(8 * number, 8 * number + 8))
    shape = dict(sequence_length=LENGTH, batch_size=8, seed=seed, start_step=number, num_threads=0)
    parts = [next(batches(data, "train", **shape, process_index=i, process_count=processes)) for i in range(processes)]
    batch = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    assert {name: array.dtype for name, array in batch.items()} == {
        "tokens": np.int32,
        "targets": np.int32,
        "segment_ids": np.int32,
        "loss_mask": bool,
    }
    for name, array in zip(("tokens", "targets", "loss_mask", "segment_ids"), expected):
        np.testing.assert_array_equal(batch[name], array)


def test_the_evaluation_split_is_of_its_own_and_ends():
    data, shape = TaskData(SPEC), dict(sequence_length=LENGTH, batch_size=200)
    rows = list(batches(data, "eval", **shape, seed=0))
    assert len(rows) == count_batches(data, "eval", **shape) == 6
    tokens, segments = (np.concatenate([batch[name] for batch in rows]) for name in ("tokens", "segment_ids"))
    mask = np.concatenate([batch["loss_mask"] for batch in rows])
    assert segments[:1024, 0].all() and not segments[1024:].any() and not tokens[1024:].any()
    assert mask[:1024].any(axis=1).all() and not mask[1024:].any()
    again = next(batches(data, "eval", **shape, seed=5))
    np.testing.assert_array_equal(again["tokens"], rows[0]["tokens"])
    for seed in range(3):
        assert (next(batches(data, "train", **shape, seed=seed))["tokens"] != rows[0]["tokens"]).any()


def test_what_identifies_a_task():
    hashes = {load_data(f"task:{spec}").hash for spec in ("swap", "swap,elements=6", "parity", "parity,longest=39")}
    assert len(hashes) == 4
    assert load_data("task:swap,elements=5").hash == load_data("task:swap").hash


def test_the_vocabulary_is_the_larger_of_the_two(tmp_path):
    for spec, size in (("swap", 10), ("swap,elements=2", 2), ("parity", 3), ("word_problem,group=A5", 60)):
        tokenizer = load_data(f"task:{spec}").tokenizer
        assert tokenizer.vocab_size == size
        tokenizer.save(tmp_path / "tokenizer.json")
        assert load_tokenizer(tmp_path / "tokenizer.json").hash == tokenizer.hash
    with pytest.raises(ValueError, match="numbers, not text"):
        tokenizer.encode("1 2")


# Scores.


@pytest.mark.parametrize("max_logits", [2**26, 60])
def test_hits_are_where_the_likeliest_word_is_the_target(whole, max_logits):
    """Of the model's own logits; at once, and a few positions at a time."""
    run = whole[1]
    batch = next(batches(run.corpus, "eval", sequence_length=LENGTH, batch_size=8, seed=0))
    score = jax.jit(
        lambda params, batch: batch_nats_and_hits(run.program.parts.graphdef, params, batch, max_logits=max_logits)
    )
    nats, hits = score(run.state.params, batch)
    model = merge(run.program.parts, run.state.params)
    logits, _ = jax.jit(lambda batch: model(batch["tokens"], segment_ids=batch["segment_ids"]))(batch)
    expected = (np.argmax(logits, axis=-1) == batch["targets"]) & batch["loss_mask"]
    np.testing.assert_array_equal(hits, expected)
    assert 0 < expected.sum() < batch["loss_mask"].sum()
    alone = jax.jit(lambda params, batch: batch_nats(run.program.parts.graphdef, params, batch))(
        run.state.params, batch
    )
    np.testing.assert_allclose(nats, alone, rtol=1e-6)


def test_the_metrics_file_has_accuracies(whole):
    folder, run = whole
    records = cases.read_metrics(folder)
    steps = [record for record in records if "loss" in record]
    assert [record["step"] for record in steps] == list(range(1, 13))
    for record in steps:
        assert list(record) == ["step", "loss", "grad_norm", "learning_rate", "accuracy"]
        assert record["accuracy"] * 8 == round(record["accuracy"] * 8)  # one answer a row
    scores = [record for record in records if "eval_loss" in record]
    assert [record["step"] for record in scores] == [6, 12]
    assert all(list(record) == ["step", "eval_loss", "eval_accuracy"] for record in scores)
    # The last evaluation again, from the saved state, a batch at a time.
    stream = batches(run.corpus, "eval", sequence_length=LENGTH, batch_size=8, seed=0)
    first = [batch for batch, _ in zip(stream, range(3))]
    hits = [
        run.program.evaluation_step(run.state.params, {k: jnp.asarray(v) for k, v in b.items()})["hits"] for b in first
    ]
    assert scores[-1]["eval_accuracy"] == np.sum(hits) / 24


@pytest.mark.parametrize("accumulation_steps", [2])
def test_parts_of_a_batch_add_up(whole, tmp_path, accumulation_steps):
    config = task_config(optimizer__accumulation_steps=accumulation_steps, run__steps=3, run__eval_every=0)
    cases.run_training(config, tmp_path / "run")
    for one, other in zip(cases.read_metrics(tmp_path / "run"), cases.read_metrics(whole[0]), strict=False):
        assert one["accuracy"] == other["accuracy"]
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)


@pytest.mark.parametrize("stop_at", [5, 6])
def test_resumed_is_the_same_run_bit_for_bit(whole, tmp_path, stop_at):
    folder = tmp_path / "run"
    cases.run_training(task_config(), folder, stop=lambda steps: cases.StopAt(steps, stop_at))
    resumed = cases.run_training(task_config(), folder)
    assert resumed.resumed
    assert cases.read_metrics(folder) == cases.read_metrics(whole[0])
    cases.assert_same_bits(resumed.state, whole[1].state)


def test_eight_devices_take_the_same_batches(whole, tmp_path):
    run = cases.run_training(task_config(run__steps=4, run__eval_every=4), tmp_path / "run", devices=8)
    records = [record for record in cases.read_metrics(whole[0]) if record["step"] <= 4]
    for one, other in zip(cases.read_metrics(tmp_path / "run"), records, strict=False):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
    assert run.step == 4


# The programs.


def run_program(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
    program.main()


def flags(config):
    """A config as flags for the program, over configs/tiny.py."""
    return [
        f"--config.{section}.{name}={tuple(value) if isinstance(value, list) else value}"
        for section, values in to_json(config).items()
        for name, value in values.items()
    ]


def test_the_program_trains_stops_and_goes_on(whole, tmp_path, monkeypatch, capsys):
    """Its defaults would also write a sample: there is none."""
    folder = tmp_path / "run"
    small = task_config(run__sample_prompt="def ", mesh__data=1, mesh__fsdp=8)
    run_program(monkeypatch, f"--workdir={folder}", *flags(small))
    out = capsys.readouterr().out
    assert f"{SPEC}: drawn anew for every batch" in out and "finished 12 steps" in out
    assert "evaluation: accuracy 0." in out and "sample" not in out and "bits per byte" not in out
    run_program(monkeypatch, f"--workdir={folder}", "--config.run.steps=13")
    assert "resumed at step 12" in capsys.readouterr().out
    assert from_json({k: v for k, v in json.loads((folder / "config.json").read_text()).items() if "hash" not in k})


def error(capsys, function, *arguments):
    with pytest.raises(SystemExit) as exit:
        function(*arguments)
    assert exit.value.code == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    return err


def test_bad_input_is_one_line(whole, tmp_path, monkeypatch, capsys):
    def refused(*arguments, workdir=tmp_path / "none"):
        return error(capsys, run_program, monkeypatch, f"--workdir={workdir}", *arguments)

    small = flags(task_config(mesh__fsdp=8, mesh__data=1))
    assert "data.path = 'task:swpa': no task 'swpa'; did you mean swap?" in refused("--config.data.path=task:swpa")
    message = refused("--config.data.path=task:mqar,pair=3")
    assert "data.path = 'task:mqar,pair=3': mqar has no option 'pair'; did you mean pairs?" in message
    message = refused("--config.data.path=task:parity", "--config.data.sequence_length=40", "--dry_run")
    assert "data.sequence_length=40: must be at least 41" in message
    message = refused(*small, "--config.model.vocab_size=2")
    assert "model.vocab_size = 2" in message
    assert not (tmp_path / "none").exists()
    message = refused("--config.data.path=task:parity,longest=11", workdir=whole[0])
    assert f"data.path = 'task:parity,longest=11': not the data of the run in {whole[0]}" in message and SPEC in message


def test_dry_run(monkeypatch, capsys, tmp_path):
    run_program(monkeypatch, *flags(task_config(mesh__fsdp=8, mesh__data=1)), "--dry_run")
    assert "temporaries" in capsys.readouterr().out and not list(tmp_path.iterdir())


def test_evaluate_says_what_the_run_said_and_takes_other_options(whole, capsys):
    folder, _ = whole
    evaluate.main(["--workdir", str(folder), "--batches", "3"])
    printed = capsys.readouterr()
    result, last = json.loads(printed.out), cases.read_metrics(folder)[-1]
    assert result["accuracy"] == last["eval_accuracy"] and result["loss"] == pytest.approx(last["eval_loss"], rel=1e-6)
    assert result["tokens"] == 24 and result["bits_per_byte"] is None
    assert "accuracy" in printed.err and "bytes" not in printed.err
    assert sum(report["tokens"] * report["accuracy"] for report in result["by_position"]) == pytest.approx(
        24 * result["accuracy"]
    )
    longer = "task:parity,shortest=13,longest=20"
    evaluate.main(["--workdir", str(folder), "--data", longer, "--sequence_length", "21", "--batches", "1"])
    result = json.loads(capsys.readouterr().out)
    assert result["data"] == longer and result["by_position"][0]["from"] == 9  # 13 symbols come before an answer
    assert restore(folder).tokenizer.kind == "task"

    given = ["--workdir", str(folder)]
    assert "must be at least 21" in error(capsys, evaluate.main, [*given, "--data", longer])
    for other in ("task:swap", str(folder)):
        message = error(capsys, evaluate.main, [*given, "--data", other])
        assert f"--data {other}: the run was trained on task:parity" in message and "; give task:parity with" in message
    assert "numbers, not text" in error(capsys, sample.main, [*given, "--prompt", "1"])
    (folder.parent / "text.txt").write_text("words")
    text = str(folder.parent / "text.txt")
    assert "give task:parity with any options" in error(capsys, evaluate.main, [*given, "--data", text])
    with pytest.raises(ValueError, match="--data task:swap: the run was trained on text; give text"):
        check_same_kind("task:swap", "data/code")


def test_evaluate_refuses_options_with_other_tokens(tmp_path):
    run = types.SimpleNamespace(config=Config(), tokenizer=load_data("task:swap").tokenizer)
    run.config.data.path = "task:swap"
    with pytest.raises(ValueError, match="--data task:swap,elements=6: 15 different tokens, the run has 10; give"):
        evaluation_corpus(run, "task:swap,elements=6", tmp_path)


@pytest.mark.parametrize("name", sorted(path.stem for path in (config_folder() / "tasks").glob("*.py")))
def test_configs_of_tasks(name):
    tiny = str(config_folder() / "tiny.py")
    by_path = parse(["train.py", f"--config={config_folder() / 'tasks' / name}.py"], tiny)
    by_name = parse(["train.py", f"--config=tasks/{name}"], tiny)
    assert by_path.config == by_name.config and by_name.name == name
    with pytest.raises(FileNotFoundError, match=f"did you mean tasks/{name}\\?"):
        parse(["train.py", f"--config=tasks/{name}s"], tiny)
    task = tasks.make_task(by_name.config.data.path, by_name.config.data.sequence_length)
    assert task(0, np.arange(3)).tokens.shape == (3, by_name.config.data.sequence_length)


def test_an_evaluation_without_a_target_says_so():
    batch = {name: np.ones((2, 4), np.int32) for name in ("tokens", "targets", "segment_ids")}
    batch["loss_mask"] = np.zeros((2, 4), bool)
    step = lambda params, batch: {"nats": np.zeros(2), "hits": np.zeros(2, np.int32)}
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with pytest.raises(ValueError, match="the evaluation split has no target"):
        evaluation.evaluate(step, None, [batch], token_bytes=np.ones(8, np.int32), sharding=sharding)
