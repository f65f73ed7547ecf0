"""Writing the shards of a split. A closed shard survives a kill and is not written again."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from deltaformer_jax.data import corpus as layout

SHARD_BYTES = 2**28  # of tokens, before compression; also the most that a killed preparation has to repeat
JOURNAL = "progress.json"


class NotAsLeft(ValueError):
    """The files of an unfinished folder cannot be continued."""


class SplitWriter:
    """Writes one split's shards and lengths into `folder`.

    A shard ends with the document that fills it, and at every `checkpoint`. The lengths (int64) and digests (16 bytes)
    of the documents are appended to two files in the folder, from which `finish` makes the manifest's entry.
    """

    def __init__(self, folder: Path, name: str, checkpoint: dict[str, Any] | None = None):
        """Continues after `checkpoint`, the result of the method of that name. What was written since is dropped.

        Raises NotAsLeft if a file that the checkpoint names has changed.
        """
        state = checkpoint or {"documents": 0, "bytes": 0, "shards": []}
        self._folder = folder
        self._name = name
        self._writer = None
        self._shard_bytes = 0
        self._documents: int = state["documents"]
        self._bytes: int = state["bytes"]
        self._shards: list[dict[str, Any]] = state["shards"]
        kept = {shard["file"]: shard["size"] for shard in self._shards}
        for file in folder.glob(f"{name}-*.array_record"):
            if file.name not in kept:
                file.unlink()
        for file, size in kept.items():
            if not (folder / file).is_file() or (folder / file).stat().st_size != size:
                raise NotAsLeft(f"{folder / file}: was changed meanwhile; the same call again starts over")
        self._lengths = self._reopen("lengths", 8 * self._documents)
        self._digests = self._reopen("digests", 16 * self._documents)

    def _reopen(self, what: str, size: int) -> Any:
        path = self._folder / f"{self._name}.{what}"
        if size and (not path.exists() or path.stat().st_size < size):
            raise NotAsLeft(f"{path}: was changed meanwhile; the same call again starts over")
        file = open(path, "ab")
        file.truncate(size)
        return file

    def add(self, pieces: Iterable[np.ndarray], length: int, text_bytes: int, digest: bytes) -> None:
        """Write a document of `length` tokens. `pieces`: arrays of PIECE tokens each, and a last one with the rest."""
        if self._writer is None or self._shard_bytes >= SHARD_BYTES:
            self._open_shard()
        for tokens in pieces:
            with disk_errors():
                self._writer.write(tokens.tobytes())
            self._shards[-1]["records"] += 1
            self._shard_bytes += tokens.nbytes
        self._documents += 1
        self._bytes += text_bytes
        self._lengths.write(length.to_bytes(8, "little"))
        self._digests.write(digest)

    def _open_shard(self) -> None:
        from array_record.python.array_record_module import ArrayRecordWriter

        self._close_shard()
        file = f"{self._name}-{len(self._shards):05d}.array_record"
        # group_size 1: each record is compressed separately, so that random access reads nothing else.
        self._writer = ArrayRecordWriter(str(self._folder / file), "group_size:1,zstd:3")
        self._shard_bytes = 0
        self._shards.append({"file": file, "records": 0})

    def _close_shard(self) -> None:
        if self._writer is not None:
            writer, self._writer = self._writer, None
            with disk_errors():
                writer.close()
            self._shards[-1]["size"] = (self._folder / self._shards[-1]["file"]).stat().st_size

    def checkpoint(self) -> dict[str, Any]:
        """Closes the shard. Returns plain data with which a new SplitWriter continues."""
        self._close_shard()
        for file in (self._lengths, self._digests):
            file.flush()
            os.fsync(file.fileno())
        return {"documents": self._documents, "bytes": self._bytes, "shards": [dict(shard) for shard in self._shards]}

    def close(self) -> None:
        self._lengths.close()
        self._digests.close()

    def finish(self) -> dict[str, Any]:
        """Closes everything. Returns the entry of this split in the manifest."""
        self._close_shard()
        self.close()
        raw = Path(self._lengths.name)
        lengths = np.fromfile(raw, "<i8").astype(np.int64)
        path = self._folder / layout.lengths_file(self._name)
        np.save(path, lengths)
        with open(self._digests.name, "rb") as digests:
            content = hashlib.file_digest(digests, "sha256")
        raw.unlink()
        Path(self._digests.name).unlink()
        return {
            "documents": len(lengths),
            "tokens": int(lengths.sum()),
            "bytes": self._bytes,
            "documents_hash": content.hexdigest(),
            "lengths_hash": hashlib.sha256(path.read_bytes()).hexdigest(),
            "shards": self._shards,
        }


class Journal:
    """The progress of a preparation in `folder`: it has finished `units` units of the source, `size` bytes.

    `splits`: the checkpoint of each split's SplitWriter, or {} at the start. `left_out`: the checkpoint of LeftOut.
    """

    def __init__(self, folder: Path):
        self._path = folder / JOURNAL
        try:
            record = json.loads(self._path.read_text())
        except (FileNotFoundError, ValueError):
            record = {"units": 0, "size": 0, "splits": {}, "left_out": (0, 0)}
        self.units: int = record["units"]
        self.size: int = record["size"]
        self.splits: dict[str, Any] = record["splits"]
        self.left_out: tuple[int, int] = tuple(record["left_out"])

    def write(self, units: int, size: int, splits: dict[str, Any], left_out: tuple[int, int]) -> None:
        draft = self._path.with_suffix(".tmp")
        with open(draft, "w") as file:
            json.dump({"units": units, "size": size, "splits": splits, "left_out": left_out}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, self._path)

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)


@contextlib.contextmanager
def disk_errors() -> Iterator[None]:
    """Turns a RuntimeError of ArrayRecord, for example on a full disk, into an OSError."""
    try:
        yield
    except RuntimeError as error:
        raise OSError(f"cannot write the corpus: {error}") from None
