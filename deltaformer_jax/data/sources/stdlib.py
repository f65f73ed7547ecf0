"""The standard library of the running Python as a source: text that needs no download."""

from __future__ import annotations

import hashlib
import os
import platform
import sys
from pathlib import Path
from typing import Any

STDLIB = "stdlib"


def stdlib_files() -> tuple[list[Path], list[int], dict[str, Any]]:
    """(files, sizes, description for the manifest): *.py of sys.stdlib_module_names, without tests and tables."""
    root = Path(os.__file__).parent
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: this Python's standard library is not in a folder; name a SOURCE")
    files, sizes, content = [], [], hashlib.sha256()
    for name in _names_below(root):
        if not _in_stdlib_corpus(name):
            continue
        text = (root / name).read_bytes()
        if b"Python Character Mapping Codec" in text[:200]:  # encodings/cp1252.py and 80 more tables
            continue
        try:
            text.decode("utf-8")
        except UnicodeDecodeError:
            continue
        files.append(root / name)
        sizes.append(len(text))
        content.update(f"{name}\0{len(text)}\n".encode() + text)
    if not files:
        raise FileNotFoundError(f"{root}: this Python's standard library has no source files; name a SOURCE")
    description = {
        "kind": STDLIB,
        "python": platform.python_version(),
        "files": len(files),
        "hash": content.hexdigest(),
    }
    return files, sizes, description


_NOT_STDLIB = frozenset(("test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"))
_GENERATED = ("pydoc_data/", "html/entities.py", "stringprep.py", "token.py", "lib2to3/pygram.py")


def _in_stdlib_corpus(name: str) -> bool:
    module = name.split("/")[0].removesuffix(".py")
    return name.endswith(".py") and module in sys.stdlib_module_names and not name.startswith(_GENERATED)


def _names_below(root: Path) -> list[str]:
    names = []
    for folder, folders, files in os.walk(root):
        folders[:] = (name for name in folders if name not in _NOT_STDLIB)
        names += [(Path(folder) / file).relative_to(root).as_posix() for file in files]
    return sorted(names)
