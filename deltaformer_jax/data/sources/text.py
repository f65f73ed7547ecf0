"""Text files: each file is one document, or several if it is divided at a separator."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

from deltaformer_jax.data.sources import units
from deltaformer_jax.data.sources.content import Content, decoded, split
from deltaformer_jax.data.sources.units import LongUnit, TextsUnit, Unreadable


class FilesUnit:
    """Small files, not yet read: each is one document, or several if it contains `separator`."""

    def __init__(self, files: list[Path], size: int, separator: str):
        self.files = files
        self.size = size
        self.separator = separator

    def documents(self) -> Iterator[str | Unreadable]:
        for path in self.files:
            try:
                text = "".join(decoded(Content(path), str(path)))
            except Unreadable as error:
                yield error
                continue
            yield from text.split(self.separator) if self.separator else [text]


def text_units(path: Path, separator: str) -> Iterator[TextsUnit | LongUnit]:
    """The units of a file of any size. An error of decoding or decompression ends them."""
    content = Content(path)
    parts = split(decoded(content, str(path)), separator)
    texts, characters, start = [], 0, 0
    while True:
        try:
            text, ends = next(parts)
        except StopIteration:
            break
        except Unreadable as error:
            texts.append(error)
            break
        if ends:
            texts.append(text)
            characters += len(text)
        if not ends or characters >= units.UNIT_BYTES:
            yield TextsUnit(texts, content.place() - start)
            texts, characters, start = [], 0, content.place()
        if not ends:
            long = LongUnit(itertools.chain([text], document_rest(parts)), content.place)
            yield long
            long.drop()
            start = content.place()
    yield TextsUnit(texts, content.place() - start)


def document_rest(parts: Iterator[tuple[str, bool]]) -> Iterator[str]:
    """The remaining parts of a document, up to its last one."""
    for text, ends in parts:
        yield text
        if ends:
            return
