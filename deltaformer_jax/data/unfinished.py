"""Folders that are written under a temporary name, renamed when they are complete, and found again after a kill.

The temporary name has a hash of the intended content, so that the same call finds the folder again. A lock, which ends
with its process, shows whether a folder is being written or was left behind.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import secrets
import shutil
from pathlib import Path
from typing import Any, NamedTuple

_LOCK = "lock"


class Unfinished(NamedTuple):
    """path: the folder. lock: its lock, held until it is closed. locked: False if the file system has no locks."""

    path: Path
    lock: Any
    locked: bool = True

    def move(self, folder: Path) -> None:
        """Renames it to `folder`. Raises OSError unless `folder` is missing or empty."""
        (self.path / _LOCK).unlink()
        os.replace(self.path, folder)

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)


def open_unfinished(folder: Path, content: Any) -> Unfinished:
    """The unfinished `folder` with this content (plain data), as it was left; a new one if another process holds it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    name = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]
    path = folder.parent / f".{folder.name}.partial-{name}"
    return try_open(path) or try_open(path.with_name(f"{path.name}-{secrets.token_hex(4)}"))


def try_open(path: Path) -> Unfinished | None:
    """The folder `path`, locked, and created if it does not exist; None if another process holds it.

    On a file system without locks (some cluster file systems) the folder counts as free.
    """
    path.mkdir(exist_ok=True)
    try:
        lock = open(path / _LOCK, "a")
    except FileNotFoundError:  # the process that held it has just renamed it
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(lock.fileno()), os.stat(path / _LOCK)):
            return Unfinished(path, lock)
    except (BlockingIOError, FileNotFoundError):
        pass
    except OSError:
        return Unfinished(path, lock, locked=False)
    lock.close()
    return None


def unfinished(folder: Path, file: str) -> bool:
    """True if there is an unfinished `folder` with `file` in it."""
    return any(folder.parent.glob(f".{folder.name}.partial-*/{file}"))


def sweep(folder: Path) -> None:
    """Removes the unfinished folders of `folder` that no process holds."""
    for path in folder.parent.glob(f".{folder.name}.partial-*"):
        if left := try_open(path):
            if left.locked:
                left.remove()
            left.lock.close()
