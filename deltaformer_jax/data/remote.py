"""Copies a corpus from an object store (gs://, by etils.epath) to this host, since ArrayRecord reads local files."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from etils import epath

from deltaformer_jax.data.unfinished import sweep, try_open

_BLOCK = 2**24


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/deltaformer_jax, or ~/.cache/deltaformer_jax if XDG_CACHE_HOME is not set."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "deltaformer_jax"


def fetch(address: str, manifest_file: str) -> Path:
    """The local copy, in `cache_folder()`, of the corpus at `address`. It is copied if it is not there.

    A copy's name contains the hash of the manifest, so a corpus that changes at its address is copied again. A copy
    that was cut short continues with the missing files. Other processes of this host wait for the one that copies.
    Raises FileNotFoundError or ValueError, naming the address, or OSError if the disk is full or the store does not
    answer.
    """
    source = epath.Path(address)
    try:
        manifest = json.loads((source / manifest_file).read_text())
        name = f"corpus-{manifest['manifest_hash'][:16]}"
        files = [shard["file"] for entry in manifest["splits"].values() for shard in entry["shards"]]
    except FileNotFoundError:
        raise FileNotFoundError(f"{address}: no corpus there (no {manifest_file})") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{source / manifest_file}: not the manifest of a corpus ({error})") from None
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
            others = [path.name for path in source.iterdir() if path.name not in {manifest_file, *files}]
            _copy(source, [*others, *files, manifest_file], partial.path)
            partial.move(folder)
        sweep(folder)
    return folder


def _copy(source: Any, names: list[str], folder: Path) -> None:
    from rich import progress
    from rich.console import Console

    console = Console(file=sys.stderr)
    columns = (*progress.Progress.get_default_columns(), progress.TextColumn("of {task.total:.0f} files"))
    with progress.Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        for name in bar.track(names, description=f"copying {source}"):
            target, draft = folder / name, folder / f"{name}.draft"
            if not target.exists():
                with (source / name).open("rb") as reader, open(draft, "wb") as writer:
                    shutil.copyfileobj(reader, writer, _BLOCK)
                os.replace(draft, target)
