"""A corpus in an object store (gs://, s3://, ...; by fsspec): what is copied to this host, and single ranges of files.

The manifest, the tokenizer and the lengths of the documents are copied, once. Of the shards `ranges` reads what the
rows of this host need.
"""

from __future__ import annotations

import json
import os
import secrets
import sys
import threading
import time
import weakref
from pathlib import Path
from typing import Any

from deltaformer_jax.data.unfinished import Unfinished, sweep, try_open


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/deltaformer_jax, or ~/.cache/deltaformer_jax if XDG_CACHE_HOME is not set."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "deltaformer_jax"


class Store:
    """The folder at `address`. Errors are FileNotFoundError, ValueError or OSError of one line with the address."""

    def __init__(self, address: str):
        import fsspec  # here, since most corpora are local

        self.address = address.rstrip("/")
        self._lock, self._held = threading.Lock(), None
        try:
            self._files, self._root = fsspec.core.url_to_fs(self.address)
        except ValueError as error:
            raise ValueError(f"{address}: {error}") from None

    def sizes(self) -> dict[str, int]:
        """name -> bytes of the files in the folder."""
        with _errors(self.address):
            found = self._files.ls(self._root, detail=True)
        return {entry["name"].rpartition("/")[2]: entry["size"] for entry in found if entry["type"] == "file"}

    def read(self, name: str, start: int | None = None, stop: int | None = None) -> bytes:
        """The bytes start .. stop - 1 of a file; all if they are None. Raises ValueError if there are fewer."""
        with _errors(f"{self.address}/{name}"):
            content = self._files.cat_file(f"{self._root}/{name}", start=start, end=stop)
        if start is not None and len(content) != stop - start:
            raise ValueError(f"cut short: {len(content)} of the bytes {start} to {stop}")
        return content

    def copy(self, name: str, target: Path) -> None:
        with _errors(f"{self.address}/{name}"):
            self._files.get_file(f"{self._root}/{name}", str(target))

    @property
    def pages(self) -> Path:
        """A folder of this process for what it reads of the shards. It is removed with the process, or by a later."""
        with self._lock:
            if self._held is None:
                cache_folder().mkdir(parents=True, exist_ok=True)
            while self._held is None:  # after try_open: a sweep of another process came between its making and its lock
                self._held = try_open(cache_folder() / f".corpus.partial-{os.getpid()}-{secrets.token_hex(4)}")
                if self._held is not None:
                    weakref.finalize(self, _let_go, self._held)
            return self._held.path


def _let_go(held: Unfinished) -> None:
    held.remove()
    held.lock.close()


class _errors:
    """Errors of the many libraries behind fsspec, as OSError with one line that begins with `where`."""

    def __init__(self, where: str):
        self._where = where

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, FileNotFoundError):
            raise FileNotFoundError(f"{self._where}: not there") from None
        if isinstance(error, Exception) and not isinstance(error, ImportError):
            reason = " ".join(str(error).split())[:300]
            raise OSError(f"{self._where}: cannot be read: {type(error).__name__}: {reason}") from error


def fetch(store: Store, manifest_file: str, names: list[str]) -> Path:
    """The local copy, in `cache_folder()`, of a corpus' manifest and the files `names`. Copied if it is not there.

    A copy's name contains the hash of the manifest, so a corpus that changes at its address is copied again. A copy
    that was cut short continues with the missing files. Other processes of this host wait for the one that copies.
    Raises FileNotFoundError or ValueError, naming the address, or OSError if the disk is full or the store does not
    answer.
    """
    try:
        name = f"corpus-{json.loads(store.read(manifest_file))['manifest_hash'][:16]}"
    except FileNotFoundError:
        raise FileNotFoundError(f"{store.address}: no corpus there (no {manifest_file})") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{store.address}/{manifest_file}: not the manifest of a corpus ({error})") from None
    sweep(cache_folder() / "corpus")  # what killed processes left of `Store.pages`
    folder = cache_folder() / name
    while not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = try_open(folder.parent / f".{name}.partial-copy")
        if partial is None:
            time.sleep(0.5)
            continue
        with partial.lock:
            if folder.exists():  # another process has just finished the copy; this folder is new and empty
                partial.remove()
                break
            _copy(store, [*names, manifest_file], partial.path)
            partial.move(folder)
        sweep(folder)
    return folder


def _copy(store: Store, names: list[str], folder: Path) -> None:
    from rich import progress
    from rich.console import Console

    console = Console(file=sys.stderr)
    columns = (*progress.Progress.get_default_columns(), progress.TextColumn("of {task.total:.0f} files"))
    with progress.Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        for name in bar.track(names, description=f"copying {store.address}"):
            target, draft = folder / name, folder / f"{name}.draft"
            if not target.exists():
                store.copy(name, draft)
                os.replace(draft, target)
