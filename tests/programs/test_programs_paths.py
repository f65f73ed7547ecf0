"""Paths with ~, spaces, quotes, accents and #, relative and absolute, in every flag and field; printed commands."""

import json
import os
import shlex
import sys

import jax
import pytest
from support import training_cases as cases

from deltaformer_jax import train as train_program
from deltaformer_jax.config.command_line import parse
from deltaformer_jax.config.files import config_folder
from deltaformer_jax.data import load_data, load_tokenizer, prepare_corpus
from deltaformer_jax.data.prepare import main as prepare_main
from deltaformer_jax.evaluate import __main__ as evaluate
from deltaformer_jax.host.interruption import Interruption
from deltaformer_jax.host.paths import expand, to_paste
from deltaformer_jax.plot import __main__ as plot
from deltaformer_jax.reproduce import __main__ as reproduce
from deltaformer_jax.sample import __main__ as sample
from deltaformer_jax.training.loop import train
from deltaformer_jax.training.setup import prepare

pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
ODD = "a b'c\"é#d%20$e"


@pytest.fixture(scope="module", autouse=True)
def compile_once(tmp_path_factory):
    yield from cases.compile_once(tmp_path_factory.mktemp("compiled"))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A home folder with a corpus, a run and a tokenizer in folders of odd names, and another folder to be in."""
    home = tmp_path_factory.mktemp("home")
    (home / ODD).mkdir()
    made = cases.make_corpus(home / ODD / "source")
    arguments = [str(home / ODD / "source" / "text"), "--out", str(home / ODD / "corpus"), "--eval_fraction", "0.2"]
    assert prepare_main(arguments) == 0
    config = cases.small_config(f"{home / ODD / 'corpus'}=1,{made}=2", run__steps=2, run__eval_every=2)
    cases.run_training(config, home / ODD / "run")
    return home


@pytest.fixture(params=["~", "relative", "absolute"])
def at(request, home, tmp_path, monkeypatch):
    """The folder ODD as a user may write it."""
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(home if request.param == "relative" else tmp_path)
    yield {"~": f"~/{ODD}", "relative": ODD, "absolute": str(home / ODD)}[request.param]
    assert not (home / "~").exists() and not (tmp_path / "~").exists()


def test_every_program_reads_and_writes_there(at, home, capsys):
    evaluate.main(["--workdir", f"{at}/run", "--data", f"{at}/corpus", "--batches", "1"])
    assert json.loads(capsys.readouterr().out)["tokens"] > 0
    evaluate.main(["--workdir", f"{at}/run", "--batches", "1"])
    (home / ODD / "prompts.txt").write_text("x\n")
    sample.main(["--workdir", f"{at}/run", "--prompts", f"{at}/prompts.txt", "--tokens", "1", "--json"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["prompt"] == "x"
    plot.main([f"{at}/run", "--out", f"{at}/pictures/p.png"])
    assert (home / ODD / "pictures" / "p.png").exists()
    text, tokenizer = f"{at}/source/text", f"{at}/corpus/tokenizer.json"
    assert prepare_main([text, "--out", f"{at}/other", "--tokenizer", tokenizer]) == 0
    assert (home / ODD / "other" / "manifest.json").exists()


def test_a_run_goes_on_there(at, home, capsys):
    config = cases.small_config(f"{at}/corpus=1,{at}/source/corpus=2", run__steps=3, run__eval_every=2)
    config.run.compilation_cache = f"{at}/cache"
    workdir = parse(["train.py", f"--workdir={at}/run"], str(config_folder() / "tiny.py")).workdir
    before = jax.config.jax_compilation_cache_dir
    try:
        run, position, state = prepare(config, workdir, devices=jax.devices()[:1])
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
    assert position.step == 2 and (home / ODD / "cache").is_dir()
    stop = Interruption()
    stop.requested = True
    capsys.readouterr()
    train(run, position, state, stop)
    command = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("to go on: "))
    words = shlex.split(command.removeprefix("to go on: "))
    assert words[-2] == "--workdir" and os.path.samefile(words[-1], home / ODD / "run")


def test_config_files_and_tokenizers(at, home):
    (home / ODD / "mine.py").write_text((config_folder() / "tiny.py").read_text())
    flags = [f"--config={at}/mine.py", f"--config.data.tokenizer={at}/corpus/tokenizer.json"]
    command = parse(["train.py", *flags], str(config_folder() / "tiny.py"))
    assert command.name == "mine" and load_tokenizer(command.config.data.tokenizer).kind == "bytes"
    assert load_data(f"{at}/corpus").hash == load_data(home / ODD / "corpus").hash


def test_a_finished_run_is_found(at, home, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", f"--workdir={at}/run", "--config.run.steps=2"])
    train_program.main()
    assert capsys.readouterr().out.startswith("nothing to do: the run in ")


def test_reproduce_keeps_to_its_folder(at, home, capsys):
    (home / ODD / "results").write_text("a file")
    with pytest.raises(SystemExit):
        reproduce.main(["snr", "--quick", "--out", f"{at}/results"])
    assert "is a file; give a folder" in capsys.readouterr().err


def test_a_user_that_is_not_there_and_what_is_no_path():
    for text in ("~nobody-of-that-name/x", "gs://bucket/x", "task:parity", "bpe:300", "", "a~b"):
        assert expand(text) == text
    assert shlex.split(to_paste("--out", ODD)) == ["--out", ODD]


def test_a_folder_that_cannot_be_found(tmp_path):
    with pytest.raises(FileNotFoundError, match="~nobody-of-that-name"):
        prepare_corpus("~nobody-of-that-name/x", tmp_path / "out")
