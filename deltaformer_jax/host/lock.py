"""A lock that lets one process at a time use a folder. It ends with its process; its file names that process.

On a local disk `flock` works between the processes of one host. On NFS, Lustre (mounted with `flock`), GPFS and CephFS
it works between hosts, since the clients pass it to the server. Some cluster file systems have no locks: the program
then says so and continues. In an object store a folder is claimed instead (`claim.py`).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import IO, Any

from deltaformer_jax.host import processes
from deltaformer_jax.host.claim import claimed

_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)


@contextlib.contextmanager
def alone(folder: str, name: str, given: str, note: Callable[[str], Any]) -> Iterator[None]:
    """Hold the lock `name` of `folder` until the block is left. The folder is created if it does not exist.

    The lock is the file `name`.lock in the folder. It is removed when the block is left, and so is the folder if it was
    created here and is empty. If several processes form one run (jax.distributed), the first holds the lock for all.

    `given` names the folder in messages, for example "--workdir DIR". `note(text)` is called if the file system has no
    locks, or if a process on another host left its lock file behind. Raises ValueError, naming the process that holds
    the lock, if another process does, and OSError if the folder or the file cannot be created.
    """
    if processes.index() > 0:
        yield
        return
    if "://" in folder:
        with claimed(folder, name, given, note):
            yield
        return
    path = Path(folder, lock_file(name))
    made = [parent for parent in (path.parent, *path.parent.parents) if not parent.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ValueError(f"{given}: is a file; give a folder") from None
    try:
        with _locked(path, given, note):
            yield
    finally:
        for parent in made:
            with contextlib.suppress(OSError):  # something was written into it
                parent.rmdir()


def lock_file(name: str) -> str:
    """The name of the lock's file. It stays in the folder if its process is killed."""
    return f"{name}.lock"


@contextlib.contextmanager
def _locked(path: Path, given: str, note: Callable[[str], Any]) -> Iterator[None]:
    file = _open(path, given, note)
    with file:
        left = file.read().strip()
        if left and f" on {socket.gethostname()} " not in left:
            note(
                f"{given}: taken over from {left}, which no longer holds it; if that process is still running, locks "
                "on this disk do not work between hosts: stop one of the two processes"
            )
        file.seek(0)
        file.truncate()
        now = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {now}\n")
        file.flush()
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                path.unlink()


def _open(path: Path, given: str, note: Callable[[str], Any]) -> IO[str]:
    """The open file, locked if the file system has locks."""
    while True:
        file = open(path, "a+")  # NFS locks only files that are open for writing
        try:
            file.seek(0)
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                return file
        except FileNotFoundError:
            pass  # the process that held it has just ended and removed it
        except BlockingIOError:
            holder = file.read().strip() or "another process"
            file.close()
            raise ValueError(
                f"{given}: in use by {holder}; wait until it ends, stop it, or give another folder"
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                file.close()
                raise
            note(f"{given}: this file system has no locks; see to it that no other process writes there")
            return file
        file.close()
