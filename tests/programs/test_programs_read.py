"""sample and evaluate, on a run of seconds."""

import json
import re
import shutil
import sys

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import training_cases as cases

from deltaformer_jax.config import Mixer, ModelConfig, on_any_device
from deltaformer_jax.data import load_corpus, prepare_corpus
from deltaformer_jax.evaluate import __main__ as evaluate
from deltaformer_jax.evaluate import by_position
from deltaformer_jax.host.interruption import Interruption
from deltaformer_jax.model_parts import merge
from deltaformer_jax.processes.agreement import Alone
from deltaformer_jax.sample import __main__ as sample
from deltaformer_jax.training import loop
from deltaformer_jax.training.checkpoints import restore
from deltaformer_jax.training.watch.display import Display


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
    # A slow machine also says what it waits for.
    err = "".join(x for x in capsys.readouterr().err.splitlines(keepends=True) if not x.endswith(" ...\n"))
    assert err.count("\n") == 1
    return err


def test_sample_writes_whole_characters(workdir, capsys):
    arguments = ["--workdir", workdir, "--prompt", "dé", "--tokens", 60, "--temperature", 5, "--top_k", 0]
    text = output(capsys, sample.main, *arguments).out
    assert text.startswith("dé") and text.endswith("\n") and len(text.encode()) >= 40
    assert text == output(capsys, sample.main, *arguments).out
    assert text != output(capsys, sample.main, *arguments, "--seed", 1).out


def test_a_run_by_kernels_is_read_on_any_device(workdir, capsys, tmp_path):
    run = shutil.copytree(workdir, tmp_path / "run")
    saved = json.loads((run / "config.json").read_text())
    saved["model"]["implementation"] = "triton"
    (run / "config.json").write_text(json.dumps(saved))
    assert output(capsys, sample.main, "--workdir", run, "--prompt", "def ").out == (
        output(capsys, sample.main, "--workdir", workdir, "--prompt", "def ").out
    )
    mixers = (Mixer("softmax_attention", implementation="cudnn", window=4), "delta_net")
    assert on_any_device(ModelConfig(implementation="triton", d_model=8, mixers=mixers)) == ModelConfig(
        d_model=8, mixers=(Mixer("softmax_attention", window=4), "delta_net")
    )


def test_training_by_kernels_ends_with_a_sample(corpus, tmp_path, capsys):
    run = cases.run_training(cases.small_config(corpus, run__steps=1), tmp_path / "run")
    run.config.run.sample_prompt, run.config.run.sample_tokens = "def ", 5
    run.config.model.implementation = "triton"  # of which no CPU can do the training
    loop.write_sample(run, run.state, Display(1, 1), Alone(Interruption()))
    assert "def " in capsys.readouterr().out.split("a sample of 5 tokens")[1]


def test_sample_of_a_step(workdir, capsys):
    texts = {output(capsys, sample.main, "--workdir", workdir, "--prompt", "", "--step", step).out for step in (4, 12)}
    assert len(texts) == 2


def test_sample_of_several_prompts(workdir, capsys, tmp_path):
    (tmp_path / "prompts").write_text("self é\nimport\n", encoding="utf-8")
    several = ["--prompt", "dé", "--prompt", "", "--prompts", tmp_path / "prompts", "--tokens", 30]
    text = output(capsys, sample.main, "--workdir", workdir, *several).out
    parts = re.split(r"^--- (\d) of 4\n", text, flags=re.MULTILINE)
    assert parts[0] == "" and parts[1::2] == ["1", "2", "3", "4"]
    lines = output(capsys, sample.main, "--workdir", workdir, *several, "--json").out.splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["prompt"] for record in records] == ["dé", "", "self é", "import"]
    assert [record["prompt"] + record["text"] + "\n" for record in records] == parts[2::2]
    alone = output(capsys, sample.main, "--workdir", workdir, "--prompt", "dé", "--tokens", 30).out
    assert alone == parts[2]
    assert all(record["tokens"] == 30 or record["finish"] == "end_of_text" for record in records)
    twice = output(capsys, sample.main, "--workdir", workdir, "--prompt", "dé", "--samples", 2, "--json").out
    assert len({json.loads(line)["text"] for line in twice.splitlines()}) == 2


def test_sample_of_more_prompts_than_rows(workdir, capsys, tmp_path):
    """1,000 prompts in 64 rows: each text is the one that its number gets in 7 rows or alone with its seed."""
    words = ("def", "é", "return self", "", "import x")
    prompts = [f"{words[i % 5]} {i}" for i in range(1000)]
    (tmp_path / "prompts").write_text("\n".join(prompts), encoding="utf-8")
    arguments = ["--workdir", workdir, "--tokens", 6, "--json"]
    lines = output(capsys, sample.main, *arguments, "--prompts", tmp_path / "prompts", "--batch_size", 64).out
    records = [json.loads(line) for line in lines.splitlines()]
    assert [record["prompt"] for record in records] == prompts
    (tmp_path / "first").write_text("\n".join(prompts[:20]), encoding="utf-8")
    first = output(
        capsys, sample.main, *arguments, "--prompts", tmp_path / "first", "--batch_size", 7, "--logprobs"
    ).out
    for record, line in zip(records, first.splitlines(), strict=False):
        again = json.loads(line)
        logprobs = again.pop("logprobs")
        assert again == record and len(logprobs) == record["tokens"] and max(logprobs) <= 0


def test_sample_stops(workdir, capsys):
    arguments = ["--workdir", workdir, "--prompt", "def", "--tokens", 60, "--json"]
    whole = json.loads(output(capsys, sample.main, *arguments).out)
    assert len(whole["text"]) > 5
    stop = whole["text"][4:6]
    cut = json.loads(output(capsys, sample.main, *arguments, "--stop", "never there", "--stop", stop).out)
    assert cut["finish"] == "stop" and cut["tokens"] < whole["tokens"]
    assert cut["text"] == whole["text"][: whole["text"].index(stop)]
    streamed = output(capsys, sample.main, *arguments[:-1], "--stop", stop).out
    assert streamed == "def" + cut["text"] + "\n"


def test_sample_top_p(workdir, capsys):
    arguments = ["--workdir", workdir, "--prompt", "def", "--tokens", 40]
    likeliest = output(capsys, sample.main, *arguments, "--temperature", 0).out
    assert output(capsys, sample.main, *arguments, "--top_p", 1e-6, "--top_k", 0).out == likeliest


def test_sample_with_a_limited_cache(workdir, capsys):
    """Flags reach the caches: log-probabilities differ from the usual ones where they were limited, and not where all
    stays."""
    arguments = ["--workdir", workdir, "--prompt", "def f(self):\n" * 4, "--tokens", 20, "--json", "--logprobs"]
    asked = lambda *more: json.loads(output(capsys, sample.main, *arguments, "--temperature", 0, *more).out)
    usual = asked()
    assert asked("--keep", 1) == usual
    for flags in (
        ["--cache", "1,2,4,9", "--separators", r":\n"],
        ["--keep", 0.1, "--proxy", 2, "--random", 0.02, "--by_head"],
    ):
        found = asked(*flags)
        assert found.keys() == usual.keys() and found["logprobs"] != usual["logprobs"]


def test_sample_without_a_prompt_takes_the_runs(workdir, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(workdir, run)
    config = json.loads((run / "config.json").read_text())
    config["run"]["sample_prompt"] = "self"
    (run / "config.json").write_text(json.dumps(config))
    arguments = ["--workdir", run, "--tokens", 5, "--temperature", 0]
    found = output(capsys, sample.main, *arguments)
    assert "after the run's own prompt, 'self'" in found.err
    assert found.out == output(capsys, sample.main, *arguments, "--prompt", "self").out


def test_sample_errors(workdir, capsys, tmp_path, monkeypatch):
    assert "no such folder" in error(capsys, sample.main, "--workdir", tmp_path / "x", "--prompt", "a")
    assert "not the folder of a run" in error(capsys, sample.main, "--workdir", tmp_path, "--prompt", "a")
    message = error(capsys, sample.main, "--workdir", workdir, "--prompt", "a", "--step", 5)
    assert "--step 5: no such checkpoint" in message and "4, 8, 12" in message
    given = ["--workdir", workdir, "--prompt", "a"]
    assert "tokens = 0" in error(capsys, sample.main, *given, "--tokens", 0)
    assert "top_p = 2.0" in error(capsys, sample.main, *given, "--top_p", 2)
    assert "--samples 0: give 1 or more" in error(capsys, sample.main, *given, "--samples", 0)
    wrong = error(capsys, sample.main, *given, "--skip_in_prefill", "1;2")
    assert "--skip_in_prefill '1;2': give whole numbers, separated by commas" in wrong
    assert "skip_in_prefill = 9: give layers from 0 to " in error(capsys, sample.main, *given, "--skip_in_prefill", "9")
    for flags, message in {
        ("--cache", "4,64,256"): "--cache 4,64,256: give four whole numbers INITIAL,SEPARATORS,WINDOW,CAPACITY",
        ("--cache", "4,64,256,324"): "--cache: capacity = 324: give more than initial + separators + window = 324",
        ("--cache", "1,2,4,9", "--keep", "0.5"): "--keep: with --cache entries are dropped all the time",
        ("--cache", "1,2,4,9", "--separators", "é"): "separators: the tokenizer has no token that consists of 'é'",
        ("--separators", "."): "--separators: they go with --cache INITIAL,SEPARATORS,WINDOW,CAPACITY",
        ("--all_places",): "--all_places: it goes with --cache INITIAL,SEPARATORS,WINDOW,CAPACITY; give both",
        ("--cache", "1,2,4,9", "--all_places"): "all_places: no layer of this model has separators behind a window",
        ("--proxy", "3"): "--proxy: it goes with --keep SHARE; give both",
        ("--by_head",): "--by_head: it goes with --keep SHARE; give both",
        ("--keep", "1.5"): "--keep = 1.5: give a share above 0, at most 1 (all tokens)",
        ("--keep", "0.2", "--random", "0.3"): "--random = 0.3: give a share of the prompt from 0 to keep = 0.2",
    }.items():
        assert message in error(capsys, sample.main, *given, *flags)
    assert "--stop: an empty text" in error(capsys, sample.main, *given, "--stop", "")
    (tmp_path / "empty").write_bytes(b"")
    empty = error(capsys, sample.main, "--workdir", workdir, "--prompts", tmp_path / "empty")
    assert "empty: it holds no line" in empty
    assert "--prompts none: No such file" in error(capsys, sample.main, "--workdir", workdir, "--prompts", "none")
    (tmp_path / "latin").write_bytes(b"gr\xfcn")
    assert "latin: not UTF-8 (byte 2)" in error(capsys, sample.main, *given, "--prompts", tmp_path / "latin")
    assert r"--prompt 'a\udcff': not UTF-8" in error(capsys, sample.main, "--workdir", workdir, "--prompt", "a\udcff")
    monkeypatch.setattr(restore, "restore", raising(ImportError("Please install gcsfs to access Google Storage")))
    message = error(capsys, sample.main, "--workdir", "gs://b/run", "--prompt", "a")
    assert "gs:// needs gcsfs: " in message and "pip install" in message


def raising(error):
    def function(*_):
        raise error

    return function


def test_sample_with_weights_in_bfloat16(workdir, capsys):
    """Of rounded weights: not the same text, in general, but one, and the same every time."""
    arguments = ["--workdir", workdir, "--prompt", "def ", "--tokens", 10, "--weights"]
    first = output(capsys, sample.main, *arguments, "bfloat16").out
    assert first == output(capsys, sample.main, *arguments, "bfloat16").out and first.startswith("def ")
    assert "--weights: invalid choice: 'int4' (choose from" in error(capsys, sample.main, *arguments, "int4")


def test_ctrl_c(workdir, capsys, monkeypatch):
    monkeypatch.setattr(restore, "restore", raising(KeyboardInterrupt()))
    with pytest.raises(SystemExit) as exit:
        sample.main(["--workdir", str(workdir), "--prompt", "a"])
    assert exit.value.code == 130 and capsys.readouterr().err == "\ndeltaformer_jax.sample: interrupted\n"


def test_evaluate_says_what_the_run_said(workdir, corpus, capsys):
    result = json.loads(output(capsys, evaluate.main, "--workdir", workdir).out)
    last = cases.read_metrics(workdir)[-1]
    assert result["step"] == 12 and result["data"] == str(corpus)
    assert result["loss"] == pytest.approx(last["eval_loss"], rel=1e-6)
    assert result["bits_per_byte"] == pytest.approx(last["eval_bits_per_byte"], rel=1e-6)
    again = json.loads(output(capsys, evaluate.main, "--workdir", workdir, "--batch_size", 3).out)
    assert again["loss"] == pytest.approx(result["loss"], rel=1e-6) and again["tokens"] == result["tokens"]


def test_evaluate_by_position(workdir, corpus, capsys):
    """Against log softmax of the model's own logits, one document at a time."""
    arguments = ["--workdir", workdir, "--batch_size", 3]
    printed = output(capsys, evaluate.main, *arguments)
    result = json.loads(printed.out)
    run, split = restore.restore(workdir), load_corpus(corpus).split("eval")
    pairs, length = [], 32
    for i in range(split.documents):
        text = split.read(i).tolist()
        pairs += [(i, token, target) for token, target in zip([256, *text], [*text, 256])]
    sums = {}
    forward = jax.jit(merge(run.program.parts, run.params))
    for start in range(0, len(pairs), length):
        row = pairs[start : start + length]
        tokens, ids = np.zeros((2, 1, length), np.int32)
        tokens[0, : len(row)], ids[0, : len(row)] = [pair[1] for pair in row], [pair[0] + 1 for pair in row]
        logits = np.asarray(forward(tokens, segment_ids=ids)[0], np.float64)[0]
        seen = 0
        for place, (document, _, target) in enumerate(row):
            seen = seen + 1 if place and row[place - 1][0] == document else 1
            nats = np.log(np.exp(logits[place]).sum()) - logits[place, target]
            bucket = sums.setdefault(1 << (seen - 1).bit_length(), [0.0, 0, 0])
            bucket[:] = bucket[0] + nats, bucket[1] + 1, bucket[2] + (target < 256)
    assert [report["to"] for report in result["by_position"]] == sorted(sums) == [1, 2, 4, 8, 16, 32]
    assert [report["from"] for report in result["by_position"]] == [1, 2, 3, 5, 9, 17]
    for report in result["by_position"]:
        nats, tokens, size = sums[report["to"]]
        assert (report["tokens"], report["bytes"]) == (tokens, size)
        assert report["loss"] == pytest.approx(nats / tokens, rel=1e-4)
        assert report["perplexity"] == pytest.approx(np.exp(nats / tokens), rel=1e-3)
        assert report["bits_per_byte"] == pytest.approx(nats / np.log(2) / size, rel=1e-4)
    assert result["perplexity"] == pytest.approx(np.exp(result["loss"]))
    assert result["tokens"] == len(pairs)
    # What takes long is said before, in lines that end in "...".
    lines = [line for line in printed.err.splitlines() if not line.endswith(" ...")]
    assert lines[0].split()[0] == "position" and lines[-1].split()[0] == "all" and len(lines) == 8


def test_evaluate_longer_rows_and_fewer_batches(workdir, capsys):
    result = json.loads(output(capsys, evaluate.main, "--workdir", workdir, "--sequence_length", 100).out)
    assert result["sequence_length"] == 100 and result["by_position"][-1]["to"] == 100
    few = json.loads(output(capsys, evaluate.main, "--workdir", workdir, "--batches", 1).out)
    assert few["tokens"] == 8 * 32 < result["tokens"]


def test_evaluate_on_a_mixture(workdir, corpus, capsys):
    once = json.loads(output(capsys, evaluate.main, "--workdir", workdir).out)
    twice = json.loads(output(capsys, evaluate.main, "--workdir", workdir, "--data", f"{corpus}=1,{corpus}=2").out)
    assert twice["tokens"] == 2 * once["tokens"] and twice["loss"] == pytest.approx(once["loss"], rel=1e-6)


@given(st.lists(st.lists(st.integers(0, 3), min_size=7, max_size=7), min_size=1, max_size=3))
def test_positions(rows):
    found = by_position.positions(np.array(rows))
    for row, places in zip(rows, found):
        for i, place in enumerate(places):
            assert place == (places[i - 1] + 1 if i and row[i] == row[i - 1] else 0)


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
    assert "--sequence_length 0" in error(capsys, evaluate.main, "--workdir", workdir, "--sequence_length", 0)
    assert "--batches -1" in error(capsys, evaluate.main, "--workdir", workdir, "--batches", -1)
    assert "none: no such folder" in error(capsys, evaluate.main, "--workdir", workdir, "--data", "none=1,x=2")
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    assert "no document with text" in error(capsys, evaluate.main, "--workdir", workdir, "--data", empty)
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


def test_evaluate_long_contexts(workdir, capsys, tmp_path):
    flags = ["--workdir", workdir, "--tasks", "needle,variable_tracking", "--examples", 2, "--depths", 0, 1]
    printed = output(capsys, evaluate.main, *flags, "--lengths", 600, "--out", tmp_path / "out")
    result = json.loads(printed.out)
    assert [(r["task"], r["length"], r["depth"], r["examples"]) for r in result["long_context"]] == [
        ("needle", 600, 0.0, 2),
        ("needle", 600, 1.0, 2),
        ("variable_tracking", 600, None, 2),
    ]
    assert all(0 <= record["accuracy"] <= 1 for record in result["long_context"])
    assert "600 tokens, depth 1.00" in printed.err
    assert json.loads((tmp_path / "out" / "tasks.json").read_text()) == result
    assert (tmp_path / "out" / "long_context.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tasks", ","], "--tasks: no task; give names"),
        (["--tasks", "needle", "--depths", "2"], "--depths 2.0: give shares of the text"),
        (["--tasks", "needle", "--examples", "0"], "--examples 0: give 1 or more"),
        (["--tasks", "neelde"], "did you mean needle?"),
        (["--tasks", "needle", "--fewshot", "0"], "--fewshot: is for tasks of lm-evaluation-harness, not for needle;"),
        (["--tasks", "needle", "--include", "nowhere"], "--include nowhere: no such folder"),
        (["--tasks", "needle", "--no_separator"], "--no_separator: is for tasks of lm-evaluation-harness"),
        (["--tasks", "needle", "--batches", "0"], "--batches: is for the loss on data, not for --tasks; leave it out"),
        (["--tasks", "common_words", "--depths", "0"], "--depths: is for needle and needle_multikey, not for common_"),
        (["--seed", "0"], "--seed: is for --tasks; leave it out"),
        (["--out", "x"], "--out: is for --tasks; leave it out"),
    ],
)
def test_evaluate_refuses_tasks(workdir, capsys, flags, message):
    assert message in error(capsys, evaluate.main, "--workdir", workdir, *flags)


def test_evaluate_refuses_tasks_before_the_first_answer(workdir, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("deltaformer_jax.evaluate.by_task._answering", None)  # an answer would be a TypeError
    (tmp_path / "file").touch()
    flags = ["--workdir", workdir, "--tasks", "needle,common_words", "--examples", "1", "--lengths", "2000"]
    said = error(capsys, evaluate.main, *flags, "64", "--out", str(tmp_path / "out"))
    assert "--lengths 64: this task takes" in said and not list((tmp_path / "out").iterdir())
    assert "file: File exists; give a folder" in error(capsys, evaluate.main, *flags, "--out", tmp_path / "file")


def test_evaluate_without_the_harness(workdir, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    said = error(capsys, evaluate.main, "--workdir", workdir, "--tasks", "hellaswag")
    assert "--tasks hellaswag: needs lm-evaluation-harness, pip install 'deltaformer-jax[eval]'" in said
