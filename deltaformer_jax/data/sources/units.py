"""Parts of a source that are worked on one after the other, or by several processes: a few megabytes each.

`documents()` yields texts, and in the place of what cannot be read an `Unreadable`, which the reader raises or counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

UNIT_BYTES = 2**20  # of source in a unit, about
LONG = 2**22  # characters, or bytes of a line, that make a document too long to be held


class Unreadable(ValueError):
    """A document or a file that cannot be read: which one, where in it, and why, in one line."""


class TextsUnit:
    """Documents that have been read. `size`: bytes of source, for progress."""

    def __init__(self, texts: list[str | Unreadable], size: int):
        self.texts = texts
        self.size = size

    def documents(self) -> Iterator[str | Unreadable]:
        yield from self.texts


class LongUnit:
    """One document that is not held in memory: `parts` are its text, one after the other, once.

    Whoever made it reads on behind it, and `drop`s what nobody asked for before. `size` is known when `parts` are out.
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
            pass  # said when it was read
