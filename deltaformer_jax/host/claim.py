"""A claim on a folder of an object store, which has no locks: an object that names its process and is read again.

Nobody can tell whether the process that wrote a claim still runs. So a claim is always taken over, and it is the other
process that ends: it looks at its claim again before it writes, and finds that of its successor.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any

_claims: dict[str, str] = {}  # address of the object -> what this process wrote there


@contextlib.contextmanager
def claimed(folder: str, name: str, given: str, note: Callable[[str], Any]) -> Iterator[None]:
    """Write the claim `name` of `folder`, the object `name`.lock, and remove it when the block is left.

    `given` names the folder in messages. `note(text)` is called with what this protects from, and with the process
    whose claim is taken over. Raises OSError if the object cannot be read or written.
    """
    path = _path(folder, name)
    before = path.read_text() if path.exists() else ""
    note(
        f"{given}: an object store has no locks; a process that begins there later takes the folder over, and this one "
        "ends before its next save"
    )
    if before:
        note(f"{given}: taken over from {_shown(before)}; if that process still runs, it ends before its next save")
    now = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    text = f"process {os.getpid()} on {socket.gethostname()} since {now}, {secrets.token_hex(8)}\n"
    path.write_text(text)
    _claims[str(path)] = text
    try:
        yield
    finally:
        del _claims[str(path)]
        with contextlib.suppress(OSError):
            if path.read_text() == text:
                path.unlink()


def check_claim(folder: str, name: str) -> None:
    """Raise ValueError, naming the other process, if this one has claimed `folder` and the claim is not there any more.

    Without a claim of this process, as on a disk, nothing is read.
    """
    path = _path(folder, name) if "://" in folder else None
    if path is None or str(path) not in _claims:
        return
    found = path.read_text() if path.exists() else ""
    if found != _claims[str(path)]:
        other = _shown(found) if found else "another process, which has ended"
        raise ValueError(f"{folder}: taken over by {other}; a folder is for one run at a time: stop one of the two")


def _shown(text: str) -> str:
    return text.strip().rpartition(", ")[0] or "another process"


def _path(folder: str, name: str) -> Any:
    from etils import epath  # here, since a folder on a disk needs none of it

    return epath.Path(folder) / f"{name}.lock"
