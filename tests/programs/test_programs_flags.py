"""What is wrong with a program's flags is one line that names the nearest one, and exit code 2."""

import importlib
import subprocess
import sys

import pytest

from deltaformer_jax.config.argument_parser import ArgumentParser

PROGRAMS = {
    "reproduce": "--quick",
    "sample": "--workdir",
    "evaluate": "--batches",
    "plot": "--smooth",
    "data.prepare": "--workers",
}


def error_of(capsys, name, *arguments):
    with pytest.raises(SystemExit) as stopped:
        program = name if name == "data.prepare" else f"{name}.__main__"
        importlib.import_module(f"deltaformer_jax.{program}").main(list(arguments))
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and message.startswith("deltaformer_jax."), message
    return message


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_misspelt_flag(name, capsys):
    flag = PROGRAMS[name]
    misspelt = flag[:-2] + flag[-1]
    assert f"{misspelt}: no such flag; did you mean {flag}?" in error_of(capsys, name, misspelt)
    assert f"{misspelt}: no such flag; did you mean {flag}?" in error_of(capsys, name, f"{misspelt}=3")
    assert "--zzzzzz: no such flag; the flags are --" in error_of(capsys, name, "--zzzzzz")


@pytest.mark.parametrize(
    "name, missing", {"sample": "--workdir", "evaluate": "--workdir", "plot": "DIR", "data.prepare": "--out"}.items()
)
def test_a_missing_flag(name, missing, capsys):
    assert f"error: {missing}: missing; give it" in error_of(capsys, name)


def test_a_bad_value_or_one_argument_too_many(capsys):
    assert "--tokens: invalid int value: 'many'" in error_of(capsys, "sample", "--workdir", "x", "--tokens", "many")
    assert "--x: invalid choice: 'time'" in error_of(capsys, "plot", "x", "--x", "time")
    assert "more: unexpected argument" in error_of(capsys, "evaluate", "--workdir", "x", "more")


def test_no_abbreviation(capsys):
    assert "--f: no such flag" in error_of(capsys, "reproduce", "figure3", "--out", "x", "--f")


def test_values_that_look_like_flags():
    parser = ArgumentParser(prog="python -m deltaformer_jax.program")
    parser.add_argument("--prompt", action="append")
    parser.add_argument("--number", type=float)
    parser.add_argument("rest", nargs="*")
    flags = parser.parse_args(["--prompt", "- a text", "--number", "-3", "--prompt=--x", "--prompt", "-", "--", "--y"])
    assert flags.prompt == ["- a text", "--x", "-"] and flags.number == -3 and flags.rest == ["--y"]


def test_help_is_still_there():
    program = [sys.executable, "-m", "deltaformer_jax.evaluate", "--help"]
    done = subprocess.run(program, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "--sequence_length" in done.stdout
