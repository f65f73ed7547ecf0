"""How the running program was called and installed: commands that call it again or install an extra."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shlex
import sys
from pathlib import Path

from deltaformer_jax.host.paths import to_paste

DISTRIBUTION = "deltaformer-jax"


def command(module: str) -> str:
    """The beginning of the command that calls the program `module` as it was called.

    "python train.py" from a clone, "python -m MODULE" if the package is installed; with "uv run" if uv started it.
    """
    script = _script()
    program = f"-m {module}" if script is None else shlex.quote(script)
    if not _by_uv():
        return f"python {program}"
    return f"uv run {program if script else f'python {program}'}"


def name(module: str) -> str:
    """The program's name in its error messages: "train.py" or the module."""
    script = _script()
    return module if script is None else Path(script).name


def install(extra: str) -> str:
    """The command that installs the packages of the extra `extra` into the environment of this process."""
    script = _script()
    if _by_uv() and script is not None:
        return f"uv run --extra {extra} {shlex.quote(script)} ..."
    pip = "python -m pip" if importlib.util.find_spec("pip") else "uv pip"
    return f"{pip} install {to_paste(*(_requirements(extra) or [f'{DISTRIBUTION}[{extra}]']))}"


def _requirements(extra: str) -> list[str]:
    """The packages of an extra. Naming them works whether this package came from an index, a wheel or a clone."""
    try:
        stated = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:  # a clone on PYTHONPATH
        return []
    marked = [re.fullmatch(r"""(.+?)\s*;.*\bextra == ['"](.+)['"].*""", line) for line in stated]
    return [found[1] for found in marked if found and found[2] == extra]


def _script() -> str | None:
    """The path of train.py as it was typed, if train.py is running; None for python -m, a notebook or a test."""
    main = sys.modules.get("__main__")
    typed = sys.argv[0] if sys.argv else ""
    is_script = getattr(main, "__spec__", None) is None and Path(typed).name == "train.py"
    return typed if is_script else None


def _by_uv() -> bool:
    return "UV_RUN_RECURSION_DEPTH" in os.environ
