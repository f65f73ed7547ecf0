"""JSON lines: one record per line, ended by a line feed. The text of a document is the string at a field.

With `chat` a document is the conversation at the field."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

from deltaformer_jax.data.sources import units
from deltaformer_jax.data.sources.content import Content, split
from deltaformer_jax.data.sources.conversation import Conversation
from deltaformer_jax.data.sources.long_record import long_text
from deltaformer_jax.data.sources.record import document_reader, field_of
from deltaformer_jax.data.sources.text import document_rest
from deltaformer_jax.data.sources.units import LongUnit, TextsUnit, Unreadable


class JSONLinesUnit:
    """Lines of a JSON-lines file, not yet decoded, and the number of the first line."""

    def __init__(self, path: Path, first_line: int, lines: list[bytes], field: str, size: int, chat: bool = False):
        self.path = path
        self.first_line = first_line
        self.lines = lines
        self.field = field
        self.size = size
        self.chat = chat

    def documents(self) -> Iterator[str | Conversation | Unreadable]:
        document_of = document_reader(self.chat)
        for number, line in enumerate(self.lines, self.first_line):
            if not line.strip():
                continue
            try:
                where = f"{self.path}, line {number}"
                yield document_of(field_of(line, self.field, where), self.field, where)
            except Unreadable as error:
                yield error


def jsonl_units(path: Path, field: str, chat: bool = False) -> Iterator[JSONLinesUnit | LongUnit | TextsUnit]:
    """The units of a file of any size, with lines of any length. The first decompression error ends them."""
    content = Content(path)
    parts = split(content, b"\n")
    lines: list[bytes] = []
    number, size, start = 1, 0, 0
    while True:
        try:
            line, ends = next(parts)
        except StopIteration:
            break
        except Unreadable as error:
            yield JSONLinesUnit(path, number, lines, field, content.place() - start, chat)
            yield TextsUnit([error], 0)
            return
        if ends:
            lines.append(line)
            size += len(line)
        if not ends or size >= units.UNIT_BYTES:
            yield JSONLinesUnit(path, number, lines, field, content.place() - start, chat)
            number, lines, size, start = number + len(lines), [], 0, content.place()
        if not ends:
            line = itertools.chain([line], document_rest(parts))
            where = f"{path}, line {number}"
            long = LongUnit(_too_long(where) if chat else long_text(line, field, where), content.place)
            yield long
            long.drop()
            try:
                for _ in line:  # the rest of the line after an error in it
                    pass
            except Unreadable as error:
                yield TextsUnit([error], 0)
                return
            number, start = number + 1, content.place()
    yield JSONLinesUnit(path, number, lines, field, content.place() - start, chat)


def _too_long(where: str) -> Iterator[str]:
    raise Unreadable(f"{where}: a conversation of more than {units.LONG:,} bytes; divide it or leave it out")
    yield  # makes this a generator, which raises when it is read
