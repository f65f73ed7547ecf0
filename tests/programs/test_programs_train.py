"""train.py as its users run it: in a process of its own, with signals; and its command line."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
from support import training_cases as cases
from support.program_run import WARNINGS, finish, start

from deltaformer_jax.config import Config
from deltaformer_jax.config.command_line import parse
from deltaformer_jax.config.errors import one_line_errors

ROOT = Path(__file__).parents[2]
# ml_collections loads a config file by a method that Python has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
TINY = str(ROOT / "configs" / "tiny.py")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return cases.make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def base(corpus, tmp_path_factory):
    """Flags and environment of a run of seconds."""
    flags = [
        f"--config.data.path={corpus}",
        "--config.data.sequence_length=32",
        "--config.data.batch_size=4",
        "--config.model.d_model=32",
        "--config.model.num_layers=2",
        "--config.model.num_heads=2",
        "--config.model.num_kv_heads=2",
        "--config.model.head_dim=16",
        "--config.optimizer.warmup_steps=5",
        "--config.run.steps=300",
        "--config.run.log_every=1",
        "--config.run.eval_every=100",
        "--config.run.checkpoint_every=50",
        "--config.run.sample_tokens=20",
        "--config.run.sample_prompt=né ",
    ]
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    }
    return flags, {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONWARNINGS": WARNINGS, **cache}


def wait_for_step(process, workdir, step):
    path, end = workdir / "metrics.jsonl", time.monotonic() + 100
    while process.poll() is None and time.monotonic() < end:
        if path.exists() and path.read_text().count('"loss"') >= step:
            return
        time.sleep(0.01)
    raise AssertionError(f"no step {step}: {process.communicate()}")


@pytest.mark.long
def test_stopped_by_signals_and_resumed_is_the_same_run(base, tmp_path):
    flags, environment = base
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    code, out, err = finish(start([f"--workdir={whole}", *flags], environment, tmp_path))
    assert code == 0, err
    assert "finished 300 steps" in out and "né " in out.split("a sample")[1] and "bits per byte" in out

    process = start([f"--workdir={parts}", *flags], environment, tmp_path)
    wait_for_step(process, parts, 3)
    process.send_signal(signal.SIGTERM)
    code, out, err = finish(process)
    assert code == 0 and "stopped at step" in out and f"--workdir {parts}" in out, (out, err)
    assert "finishing this step" in err

    # On with the run's own config.
    code, out, err = finish(start([f"--workdir={parts}"], environment, tmp_path))
    assert code == 0 and "resumed at step" in out, err

    assert cases.read_metrics(parts) == cases.read_metrics(whole)
    assert final_weights(parts) == final_weights(whole)


def final_weights(workdir):
    import jax
    import numpy as np

    from deltaformer_jax.training.checkpoints.restore import restore

    run = restore(workdir)
    assert run.step == 300
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(run.params)]


def test_a_second_signal_stops_at_once(base, tmp_path):
    flags, environment = base
    # A step of minutes: nothing but the second signal can end it in time.
    slow = [
        "--config.data.sequence_length=2048",
        "--config.data.batch_size=64",
        "--config.model.num_layers=64",
        "--config.model.chunk_size=64",
        "--config.optimizer.accumulation_steps=64",  # else a machine that compiles fast runs out of memory
    ]
    process = start([f"--workdir={tmp_path / 'run'}", *flags, *slow], environment, tmp_path)
    while "tokens per step" not in process.stdout.readline():  # compiled: the first step is next
        assert process.poll() is None
    time.sleep(3)
    for _ in range(2):
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
    begin = time.monotonic()
    code, _, err = finish(process)
    assert code == 128 + signal.SIGINT and time.monotonic() - begin < 10
    assert "once more to stop at once" in err


def test_errors_are_one_line_and_code_2(base, tmp_path):
    flags, environment = base
    code, out, err = finish(start([*flags, "--config.model.d_modle=3"], environment, tmp_path))
    assert (code, out) == (2, "")
    assert err == "train.py: error: --config.model.d_modle: no such field; did you mean --config.model.d_model?\n"
    assert not list(tmp_path.iterdir())


def test_dry_run_prints_and_writes_nothing(base, tmp_path):
    flags, environment = base
    mesh = ["--config.mesh.data=2", "--config.mesh.fsdp=1", "--config.mesh.tensor=2", "--dry_run"]
    code, out, err = finish(start([*flags, *mesh], {**environment, "JAX_NUM_CPU_DEVICES": "4"}, tmp_path))
    assert code == 0, err
    assert "data 2, fsdp 1, expert 1, tensor 2" in out and "FLOPs" in out and "temporaries" in out
    table = {line.split()[0]: line for line in out.splitlines() if line.startswith("  ")}
    assert table["embedding.table"].split()[-1] == "yes" and "tensor" in table["embedding.table"]
    assert not list(tmp_path.iterdir())


# The command line, without a process.


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--config.optimiser.b1=0.5"], "--config.optimiser.b1: no such field; did you mean --config.optimizer.b1"),
        (["--config.steps=3"], "did you mean --config.run.steps"),
        (["--config.zzz.q=3"], "the sections are model, data, objective, optimizer, mesh, run"),
        (["--config.model=3"], "--config.model: is a section"),
        (["--config.model.d_model=abc"], "--config.model.d_model=abc: invalid literal for int"),
        (["--config.run.steps=0"], "run.steps = 0: must be at least 1"),
        (["--config", "tinny.py"], "tinny.py: no such file, and no config of that name; did you mean tiny?"),
        (["--config", "deltaformer_340"], "deltaformer_340: no such file.*; did you mean deltaformer_340m?"),
        (["--config=configs/tiny"], "configs/tiny: no such file.*; did you mean .*tiny"),
        (["--config=qqqqqqq.py"], "qqqqqqq.py: no such file.*; there are: .*deltaformer_340m, .*tiny"),
        (["--wrkdir=x"], "--wrkdir: no such flag; did you mean --workdir?"),
        (["--workdir"], "--workdir: give a value"),
        (["--steps", "10"], "--steps: no such flag; did you mean --config.run.steps?"),
        (["--learning-rate=1"], "--learning-rate: no such flag; did you mean --config.optimizer.learning_rate?"),
        (["--run.steps=10"], "--run.steps: no such flag; did you mean --config.run.steps?"),
        (["--zzz"], "--zzz: no such flag; the flags are --config NAME|FILE, .*--resume, --dry_run"),
        (["--resume"], "--resume: give the run's folder too, --workdir DIR"),
        (["stray"], "'stray': not a flag"),
    ],
)
def test_command_line_errors(flags, message):
    with pytest.raises((ValueError, OSError), match=message):
        parse(["train.py", *flags], TINY)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("x = 1", r"mine\.py: has no get_config\(\); define it there, .* as in .*tiny\.py"),
        ("import nothing_of_that_name", "No module named 'nothing_of_that_name'"),
        ("def get_config(): return {}", "returned a dict"),
        (
            "from deltaformer_jax.config import *\ndef get_config(): return ModelConfig(d_modle=1)",
            "unexpected keyword argument 'd_modle'.*[dD]id you mean '?d_model",
        ),
        ("from deltaformer_jax.config import *\ndef get_config(): return Config(modle=1)", "[dD]id you mean '?model"),
        ("from deltaformer_jax.config import *\ndef get_config(): return RunConfig(zz=1)", "its fields are steps"),
        ("def get_config(:", "SyntaxError"),
    ],
)
def test_config_files_that_fail(tmp_path, content, message):
    path = tmp_path / "mine.py"
    path.write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        parse(["train.py", f"--config={path}"], TINY)
    assert "Traceback" not in str(error.value)


def test_a_config_in_a_folder_with_a_colon_is_refused(tmp_path):
    folder = tmp_path / "a:b"
    folder.mkdir()
    (folder / "mine.py").write_text("")
    with pytest.raises(ValueError, match=r"mine.py: a ':' in a path starts .*; rename the file or folder"):
        parse(["train.py", f"--config={folder}/mine.py"], TINY)


def test_command_line_values(tmp_path):
    command = parse(
        [
            "train.py",
            "--workdir",
            str(tmp_path),
            "--config.model.mixers=('softmax_attention','delta_former')",
            "--config.optimizer.learning_rate=1",
            "--config.run.steps",
            "7",
            "--config.model.qk_norm",
            "--config.run.sample_prompt",
            "--steps",  # the prompt
            "--dry_run",
        ],
        TINY,
    )
    assert command.config.model.mixers == ("softmax_attention", "delta_former")
    assert command.config.optimizer.learning_rate == 1.0 and command.config.run.steps == 7
    assert command.config.model.qk_norm and command.dry_run and not command.resume
    assert command.config.run.sample_prompt == "--steps"
    assert (command.workdir, command.name) == (str(tmp_path), "tiny")


def test_a_run_supplies_its_own_config(tmp_path):
    saved = {"model": {"d_model": 48}, "tokenizer_hash": "", "corpus_hash": ""}
    (tmp_path / "config.json").write_text(json.dumps(saved))
    command = parse(["train.py", f"--workdir={tmp_path}", "--config.run.steps=9"], TINY)
    assert command.config.model.d_model == 48 and command.config.run.steps == 9
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not a run's config"):
        parse(["train.py", f"--workdir={tmp_path}"], TINY)


def test_one_line_errors_lets_bugs_through(capsys):
    with pytest.raises(SystemExit) as exit, one_line_errors("program"):
        raise ValueError("two\n   lines")
    assert exit.value.code == 2 and capsys.readouterr().err == "program: error: two lines\n"
    with pytest.raises(KeyError), one_line_errors("program"):
        raise KeyError("a bug")


@pytest.mark.parametrize("name", ["tiny", "deltaformer_340m", "transformer_340m"])
def test_configs_that_come_with_it(name):
    command = parse(["train.py", f"--config={ROOT / 'configs' / name}.py"], TINY)
    assert type(command.config) is Config and command.name == name
    by_name = parse(["train.py", "--config", name, "--config.run.steps=3"], TINY)
    assert by_name.name == name and by_name.config.run.steps == 3 and by_name.config.model == command.config.model
