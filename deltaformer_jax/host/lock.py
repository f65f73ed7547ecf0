"""One process at a time in a folder: a lock that ends with the process that holds it, and a file that says who that is.

`flock` reaches the processes of one host on every local disk, and those of all hosts on NFS, Lustre (mounted with
`flock`), GPFS and CephFS, whose clients pass it to the server. Object stores and some cluster file systems have no
locks: there the program says so and goes on.
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

_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)


@contextlib.contextmanager
def alone(folder: str, name: str, given: str, note: Callable[[str], Any]) -> Iterator[None]:
    """Hold `folder`, made if it is not there, against others that ask for the same `name`, until the block is left.

    The file is `name`.lock in the folder. It goes when the block is left, and with it a folder that was made here and
    holds nothing else. Of several processes that work as one (jax.distributed) the first holds it for all.

    `given` names the folder in messages, as "--workdir DIR"; `note(text)` hears of a file system without locks, and of
    a lock that a process of another host left behind. Raises ValueError that says who holds it, before anything is
    done, and OSError where the folder or the file cannot be made.
    """
    if processes.index() > 0:
        yield
        return
    if "://" in folder:
        note(f"{given}: an object store has no locks; see to it that no other process writes there")
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
            with contextlib.suppress(OSError):  # there is something in it now
                parent.rmdir()


def lock_file(name: str) -> str:
    """The name of the file that `alone` leaves in its folder when its process is killed."""
    return f"{name}.lock"


@contextlib.contextmanager
def _locked(path: Path, given: str, note: Callable[[str], Any]) -> Iterator[None]:
    file = _open(path, given, note)
    with file:
        left = file.read().strip()
        if left and f" on {socket.gethostname()} " not in left:
            note(
                f"{given}: taken over from {left}, which no longer holds it; if that process is still at work, this "
                "disk's locks do not reach from one host to another: stop one of the two"
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
    """The file, locked; on a file system without locks, not locked."""
    while True:
        file = open(path, "a+")  # NFS locks only what is open for writing
        try:
            file.seek(0)
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                return file
        except FileNotFoundError:
            pass  # its holder has just ended and removed it
        except BlockingIOError:
            holder = file.read().strip() or "another process"
            file.close()
            raise ValueError(
                f"{given}: {holder} is at work there; wait until it ends, stop it, or give another folder"
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                file.close()
                raise
            note(f"{given}: this file system has no locks; see to it that no other process writes there")
            return file
        file.close()
