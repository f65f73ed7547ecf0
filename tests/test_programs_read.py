"""sample and evaluate, on a run of seconds."""

import json

import jax
import pytest
import training_cases as cases

from deltaformer_jax import evaluate, sample
from deltaformer_jax.data import prepare_corpus


@pytest.fixture(scope="module", autouse=True)
def compile_once(tmp_path_factory):
    yield from cases.compile_once(tmp_path_factory.mktemp("compiled"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return cases.make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def workdir(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    cases.run_training(cases.small_config(corpus), folder)
    return folder


def output(capsys, main, *arguments):
    main([str(argument) for argument in arguments])
    return capsys.readouterr()


def error(capsys, main, *arguments):
    with pytest.raises(SystemExit) as exit:
        main([str(argument) for argument in arguments])
    assert exit.value.code == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    return err


def test_sample_writes_whole_characters(workdir, capsys):
    arguments = ["--workdir", workdir, "--prompt", "dé", "--tokens", 60, "--temperature", 5, "--top_k", 0]
    text = output(capsys, sample.main, *arguments).out
    assert text.startswith("dé") and text.endswith("\n") and len(text.encode()) >= 40
    assert text == output(capsys, sample.main, *arguments).out
    assert text != output(capsys, sample.main, *arguments, "--seed", 1).out


def test_sample_of_a_step(workdir, capsys):
    texts = {output(capsys, sample.main, "--workdir", workdir, "--prompt", "", "--step", step).out for step in (4, 12)}
    assert len(texts) == 2


def test_sample_errors(workdir, capsys, tmp_path):
    assert "no such folder" in error(capsys, sample.main, "--workdir", tmp_path / "x", "--prompt", "a")
    assert "not the folder of a run" in error(capsys, sample.main, "--workdir", tmp_path, "--prompt", "a")
    message = error(capsys, sample.main, "--workdir", workdir, "--prompt", "a", "--step", 5)
    assert "--step 5: no such checkpoint" in message and "4, 8, 12" in message
    assert "tokens = 0" in error(capsys, sample.main, "--workdir", workdir, "--prompt", "a", "--tokens", 0)


def test_evaluate_says_what_the_run_said(workdir, corpus, capsys):
    result = json.loads(output(capsys, evaluate.main, "--workdir", workdir).out)
    last = cases.read_metrics(workdir)[-1]
    assert result["step"] == 12 and result["data"] == str(corpus)
    assert result["loss"] == pytest.approx(last["eval_loss"], rel=1e-6)
    assert result["bits_per_byte"] == pytest.approx(last["eval_bits_per_byte"], rel=1e-6)
    again = json.loads(output(capsys, evaluate.main, "--workdir", workdir, "--batch_size", 3).out)
    assert again["loss"] == pytest.approx(result["loss"], rel=1e-6) and again["tokens"] == result["tokens"]


def test_evaluate_plain_text(workdir, capsys, tmp_path):
    path = tmp_path / "some.txt"
    path.write_text("def é")
    result = json.loads(output(capsys, evaluate.main, "--workdir", workdir, "--data", path).out)
    assert (result["tokens"], result["bytes"]) == (7, 6)  # the end of the text is a target too
    assert [child.name for child in tmp_path.iterdir()] == ["some.txt"]


def test_evaluate_errors(workdir, corpus, capsys, tmp_path):
    assert "--data nowhere" in error(capsys, evaluate.main, "--workdir", workdir, "--data", "nowhere")
    other = prepare_corpus(corpus.parent / "text", tmp_path / "bpe", tokenizer="bpe:300").path
    assert "another tokenizer" in error(capsys, evaluate.main, "--workdir", workdir, "--data", other)
    assert "--batch_size -1" in error(capsys, evaluate.main, "--workdir", workdir, "--batch_size", -1)


def test_corrupt_checkpoints(corpus, capsys, tmp_path):
    cases.run_training(cases.small_config(corpus, run__steps=8), tmp_path)
    damage(tmp_path / "checkpoints" / "8")
    result = output(capsys, evaluate.main, "--workdir", tmp_path)
    assert json.loads(result.out)["step"] == 4 and "going back to step 4" in result.err
    assert "corrupt" in error(capsys, evaluate.main, "--workdir", tmp_path, "--step", 8)
    damage(tmp_path / "checkpoints" / "4")
    assert "no whole checkpoint" in error(capsys, evaluate.main, "--workdir", tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    assert "tokenizer.json" in error(capsys, sample.main, "--workdir", tmp_path, "--prompt", "a")


def damage(folder):
    victim = max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)


def test_training_goes_on_from_the_last_whole_checkpoint(corpus, workdir, tmp_path):
    config = cases.small_config(corpus)
    cases.run_training(config, tmp_path)
    damage(tmp_path / "checkpoints" / "12")
    run = cases.run_training(config, tmp_path)
    assert cases.read_metrics(tmp_path) == cases.read_metrics(workdir)
    assert (tmp_path / "checkpoints" / "12").exists() and run.step == 12
    assert len(jax.tree.leaves(run.state)) > 10
