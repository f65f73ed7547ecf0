"""JSON lines: one record per line, ended by a line feed. The text of a document is the string at a field."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

from deltaformer_jax.data.sources import units
from deltaformer_jax.data.sources.content import Content, split
from deltaformer_jax.data.sources.long_record import long_text
from deltaformer_jax.data.sources.record import field_of, text_of
from deltaformer_jax.data.sources.text import document_rest
from deltaformer_jax.data.sources.units import LongUnit, TextsUnit, Unreadable


class JSONLinesUnit:
    """Lines of a JSON-lines file, not yet decoded, and the number of the first line."""

    def __init__(self, path: Path, first_line: int, lines: list[bytes], field: str, size: int):
        self.path = path
        self.first_line = first_line
        self.lines = lines
        self.field = field
        self.size = size

    def documents(self) -> Iterator[str | Unreadable]:
        for number, line in enumerate(self.lines, self.first_line):
            if not line.strip():
                continue
            try:
                where = f"{self.path}, line {number}"
                yield text_of(field_of(line, self.field, where), self.field, where)
            except Unreadable as error:
                yield error


def jsonl_units(path: Path, field: str) -> Iterator[JSONLinesUnit | LongUnit | TextsUnit]:
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
            yield JSONLinesUnit(path, number, lines, field, content.place() - start)
            yield TextsUnit([error], 0)
            return
        if ends:
            lines.append(line)
            size += len(line)
        if not ends or size >= units.UNIT_BYTES:
            yield JSONLinesUnit(path, number, lines, field, content.place() - start)
            number, lines, size, start = number + len(lines), [], 0, content.place()
        if not ends:
            line = itertools.chain([line], document_rest(parts))
            long = LongUnit(long_text(line, field, f"{path}, line {number}"), content.place)
            yield long
            long.drop()
            try:
                for _ in line:  # the rest of the line after an error in it
                    pass
            except Unreadable as error:
                yield TextsUnit([error], 0)
                return
            number, start = number + 1, content.place()
    yield JSONLinesUnit(path, number, lines, field, content.place() - start)
