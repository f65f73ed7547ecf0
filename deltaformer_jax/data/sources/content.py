"""Reads the content of a file, decompressed, in blocks; decodes blocks; splits them into texts or lines."""

from __future__ import annotations

import codecs
import gzip
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, AnyStr

from deltaformer_jax.data.sources import units
from deltaformer_jax.data.sources.units import Unreadable

BLOCK = 2**20


class Content:
    """Iterates over a file's bytes, decompressed, in blocks of at most BLOCK. Raises Unreadable, naming the file.

    `place()`: how many bytes of the (compressed) file have been read so far.
    """

    def __init__(self, path: Path):
        self._path = path
        self._place = 0

    def place(self) -> int:
        return self._place

    def __iter__(self) -> Iterator[bytes]:
        try:
            with open(self._path, "rb") as file:
                seekable = file.seekable()
                stream = _decompressed(self._path, file)
                # From a pipe read what is available, not a whole block. If a signal came while C code waits for the
                # rest of a block, it would be handled only at the end of the pipe.
                read = file.read1 if stream is file else stream.read
                while block := read(BLOCK):
                    self._place = file.tell() if seekable else self._place + len(block)
                    yield block
        except Exception as error:  # gzip, zlib and pyarrow raise many types of errors for invalid files
            raise Unreadable(f"{self._path}: cannot be decompressed or read: {error}") from None


def is_compressed(path: Path) -> bool:
    return path.name.lower().endswith((".gz", ".zst"))


def decoded(blocks: Iterable[bytes], where: str) -> Iterator[str]:
    """Decodes UTF-8 `blocks` into texts, without a byte order mark at the start. Raises Unreadable, naming `where`."""
    decoder, taken, begun = codecs.getincrementaldecoder("utf-8")(), 0, False
    for block, final in _with_last(blocks):
        taken += len(block)
        try:
            text = decoder.decode(block, final)
        except UnicodeDecodeError as error:
            place = taken - len(error.object) + error.start
            raise Unreadable(f"{where}: not UTF-8 (byte {place}); convert it to UTF-8 or leave it out") from None
        if text and not begun:
            begun, text = True, text.removeprefix("\ufeff")
        yield text


def split(pieces: Iterable[AnyStr], separator: AnyStr) -> Iterator[tuple[AnyStr, bool]]:
    """`"".join(pieces).split(separator)` in bounded memory. An empty separator does not split.

    Yields (text, True) for each text. A text of more than LONG characters comes in parts, (part, False) and at its end
    (last part, True).
    """
    held = separator[:0]
    for piece in pieces:
        held += piece
        if separator:
            *whole, held = held.split(separator)
            for text in whole:
                yield text, True
        certain = len(held) - max(len(separator) - 1, 0)  # the last characters may be the beginning of a separator
        if certain > units.LONG:
            yield held[:certain], False
            held = held[certain:]
    yield held, True


def _with_last(blocks: Iterable[bytes]) -> Iterator[tuple[bytes, bool]]:
    for block in blocks:
        yield block, False
    yield b"", True


def _decompressed(path: Path, file: Any) -> Any:
    if path.name.lower().endswith(".gz"):
        return gzip.GzipFile(fileobj=file)
    if path.name.lower().endswith(".zst"):
        import pyarrow

        return pyarrow.CompressedInputStream(pyarrow.PythonFile(file, mode="r"), "zstd")
    return file
