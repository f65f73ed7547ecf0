"""Programs name themselves as they were called, and advise commands that work for the way they were installed."""

import builtins
import importlib.metadata
import importlib.util
import re
import sys
import tomllib
import types
from pathlib import Path

import pytest

from deltaformer_jax import train as train_program
from deltaformer_jax.config.errors import one_line_errors
from deltaformer_jax.config.files import config_names
from deltaformer_jax.host import called
from deltaformer_jax.training.watch.tensorboard import check_installed
from pallas_kernels.triton import packages

ROOT = Path(__file__).parents[2]
with (ROOT / "pyproject.toml").open("rb") as file:
    PROJECT = tomllib.load(file)["project"]
EXTRAS = PROJECT["optional-dependencies"]
MODULE = "deltaformer_jax.train"


@pytest.fixture
def call(monkeypatch):
    """call("train.py", by_module=False, uv=False): this process was started so."""

    def called_as(typed, by_module=False, uv=False):
        spec = types.SimpleNamespace(name=MODULE) if by_module else None
        monkeypatch.setitem(sys.modules, "__main__", types.SimpleNamespace(__spec__=spec))
        monkeypatch.setattr(sys, "argv", [typed, "--help"])
        monkeypatch.setenv("UV_RUN_RECURSION_DEPTH", "1")
        if not uv:
            monkeypatch.delenv("UV_RUN_RECURSION_DEPTH")

    return called_as


INSTALLED = "/site-packages/deltaformer_jax/train.py"  # what python -m puts into sys.argv
CALLS = [
    (("train.py",), "python train.py", "train.py"),
    (("train.py", False, True), "uv run train.py", "train.py"),
    (("/a b/train.py",), "python '/a b/train.py'", "train.py"),
    ((INSTALLED, True), f"python -m {MODULE}", MODULE),
    ((INSTALLED, True, True), f"uv run python -m {MODULE}", MODULE),
    (("/bin/pytest",), f"python -m {MODULE}", MODULE),
]


@pytest.mark.parametrize(("how", "command", "name"), CALLS)
def test_the_command_that_was_typed(call, capsys, how, command, name):
    call(*how)
    assert (called.command(MODULE), called.name(MODULE)) == (command, name)
    train_program.main()
    shown = capsys.readouterr().out
    usage = next(line for line in shown.splitlines() if line.startswith("    "))
    assert usage.startswith(f"    {command} [--config NAME|FILE]")
    assert max(map(len, shown.splitlines())) <= 130
    listing = " ".join(shown.partition("Configs that come with the package: ")[2].split())
    assert listing.split(", ") == config_names() and {"tiny", "tasks/swap", "hybrid_340m"} < set(config_names())


def test_what_installs_an_extra(call, monkeypatch):
    stated = [*PROJECT["dependencies"]]
    for extra, requirements in EXTRAS.items():  # as a wheel's metadata say it
        for requirement in requirements:
            package, _, condition = requirement.partition(";")
            stated.append(f"{package}; {condition.strip() + ' and ' if condition else ''}extra == '{extra}'")
    monkeypatch.setattr(importlib.metadata, "requires", lambda _: stated)
    call(INSTALLED, True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "pip")
    assert called.install("tensorboard") == "python -m pip install 'tensorboardX>=2.6.2'"
    assert called.install("gcs") == "python -m pip install 'gcsfs>=2024.6'"
    assert called.install("triton") == "python -m pip install 'triton>=3.6,<3.7' 'jax-triton>=0.3.1,<0.4'"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)  # an environment that uv made has no pip
    assert called.install("gcs") == "uv pip install 'gcsfs>=2024.6'"
    call("train.py", uv=True)
    assert called.install("gcs") == "uv run --extra gcs train.py ..."

    def unknown(_):
        raise importlib.metadata.PackageNotFoundError

    monkeypatch.setattr(importlib.metadata, "requires", unknown)
    call("train.py")
    assert called.install("gcs") == "uv pip install 'deltaformer-jax[gcs]'"


def test_errors_advise_it(call, monkeypatch, capsys):
    call("train.py", uv=True)
    original = builtins.__import__

    def without(name, *arguments, **options):
        if name == "tensorboardX":
            raise ImportError(name)
        return original(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match=r"is not installed: uv run --extra tensorboard train\.py \.\.\.$"):
        check_installed()
    with pytest.raises(SystemExit), one_line_errors("train.py"):
        raise ImportError("Please install gcsfs")
    assert capsys.readouterr().err == "train.py: error: gs:// needs gcsfs: uv run --extra gcs train.py ...\n"
    with pytest.raises(SystemExit), one_line_errors("train.py"):
        import grain_of_salt  # noqa: F401
    assert "train.py: error: this Python has no module grain_of_salt: install the" in capsys.readouterr().err
    with pytest.raises(ModuleNotFoundError), one_line_errors("train.py"):  # a bug of ours keeps its traceback
        import deltaformer_jax.nothing  # noqa: F401


def test_the_kernels_requirements_are_the_projects():
    wanted = [requirement.partition(";")[0] for requirement in (*EXTRAS["triton"], *EXTRAS["cuda"])]
    assert packages.REQUIREMENTS == " ".join(f"'{requirement}'" for requirement in wanted)


def test_the_table_names_every_extra():
    rows = [line for line in (ROOT / "docs" / "install.md").read_text().splitlines() if line.startswith("| ")]
    named = {extra for line in rows for group in re.findall(r"whl\[([\w,]+)\]", line) for extra in group.split(",")}
    assert named == set(EXTRAS)
    for line in rows:
        for extras in re.findall(r"pip install './NAME\.whl\[([\w,]+)\]'", line)[:1]:
            by_uv = " ".join(f"--extra {extra}" for extra in extras.split(","))
            assert f"`uv pip install './NAME.whl[{extras}]'`" in line and f"`pip install -e '.[{extras}]'`" in line
            assert f"`uv run {by_uv} train.py`" in line or f"`uv run {by_uv} python -m deltaformer_jax." in line
