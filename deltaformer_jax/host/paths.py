"""Paths that a user gives, which all go through `expand`, and files that are written whole."""

from __future__ import annotations

import os
import shlex
from typing import Any


def expand(path: str | os.PathLike) -> str:
    """`path` with a leading ~ or ~NAME replaced by that user's home folder, as a shell does for a separate argument.

    Needed because shells do not expand --flag=~/x. Any other text stays as it is: the ~NAME of an unknown user, gs://
    addresses, "stdlib", "bytes", "task:...".
    """
    return os.path.expanduser(os.fspath(path))


def to_paste(*words: object) -> str:
    """The words of a command, quoted for a shell, so that a printed command can be pasted."""
    return shlex.join(map(str, words))


def write_whole(path: Any, content: bytes) -> None:
    """Write a file, so that an interruption leaves the old file or the new one, whole. `path` may be an epath.Path."""
    part = path.parent / f"{path.name}.part"
    part.write_bytes(content)
    part.replace(path)
