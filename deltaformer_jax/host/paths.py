"""Paths that a user gives: every flag and every field of a config that is one goes through `expand`."""

from __future__ import annotations

import os
import shlex


def expand(path: str | os.PathLike) -> str:
    """`path` with a leading ~ or ~NAME as that user's home folder, as a shell has it for an argument of its own.

    Shells leave --flag=~/x alone. What has no such beginning, and the ~NAME of a user that is not known, stays as it
    is; so do gs:// addresses, "stdlib", "bytes", "task:...", which begin otherwise.
    """
    return os.path.expanduser(os.fspath(path))


def to_paste(*words: object) -> str:
    """Words of a command that a program prints, quoted as a shell needs it."""
    return shlex.join(map(str, words))
