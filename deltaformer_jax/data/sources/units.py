"""Units: parts of a source of a few megabytes, which are processed one after the other or by several processes.

`documents()` yields texts, or conversations, and an `Unreadable` in the place of each document that cannot be read.
The caller raises it or counts it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

UNIT_BYTES = 2**20  # approximate bytes of source in a unit
LONG = 2**22  # characters, or bytes of a line, above which a document is not held in memory


class Unreadable(ValueError):
    """A document or file that cannot be read. The message names it, the place in it and the reason, in one line."""


class TextsUnit:
    """Documents that have already been read. `size`: bytes of source, for the progress bar."""

    def __init__(self, texts: list[Any], size: int):
        self.texts = texts
        self.size = size

    def documents(self) -> Iterator[Any]:
        yield from self.texts


class LongUnit:
    """One document that is not held in memory. `parts` yields its text once, in parts.

    The reader that made the unit calls `drop`, which consumes the remaining parts, before it reads further. `size` is
    known when all parts have been consumed.
    """

    def __init__(self, parts: Iterator[str], place: Any):
        self.parts = parts
        self._place = place
        self._start = place()

    @property
    def size(self) -> int:
        return self._place() - self._start

    def drop(self) -> None:
        try:
            for _ in self.parts:
                pass
        except Unreadable:
            pass  # it was reported when the part was read
