"""Reads a JSON record that is too long for memory: the text at a field, in parts.

Long strings are written to a file, and a name takes their place in the record. What remains is short, and Python's own
parser reads it. If the text is one of the long strings, it is read back from the file in blocks.
"""

from __future__ import annotations

import codecs
import json
import re
import secrets
import tempfile
from collections.abc import Iterator
from typing import Any

from deltaformer_jax.data.sources import units
from deltaformer_jax.data.sources.record import field_of, text_of
from deltaformer_jax.data.sources.units import Unreadable

_LONG_STRING = 2**16
_BLOCK = 2**20
_IN_STRING = re.compile(rb'(?:[^"\\]++|\\.)*+', re.DOTALL)
# Characters and whole escapes: surrogate pairs as a whole, and a lone surrogate only if the text shows that it is one.
_WHOLE = re.compile(
    r"(?:[^\\]++|\\[^u]|\\u(?![dD][89abAB])[^\\]{4}|\\u[dD][89abAB][^\\]{2}"
    r"(?:\\u[dD][c-fC-F][^\\]{2}|(?=.{6})(?!\\u[dD][c-fC-F])))*+",
    re.DOTALL,
)


def long_text(parts: Iterator[bytes], field: str, where: str) -> Iterator[str]:
    """The text at `field` of the JSON record in `parts`. Memory: at most 4 MiB beside long strings, else Unreadable."""
    with tempfile.TemporaryFile() as file:
        mark, rest, places = _without_long_strings(parts, file, where)
        value = field_of(rest, field, where)
        wanted = int(value[len(mark) :]) if isinstance(value, str) and value.startswith(mark) else None
        for i, place in enumerate(places):
            if i != wanted:
                for _ in _unescaped(file, *place, where):
                    pass  # raises Unreadable if it is not JSON
        if wanted is None:
            yield text_of(value, field, where)
        else:
            for text in _unescaped(file, *places[wanted], where):
                yield text_of(text, field, where)


def _without_long_strings(parts: Iterator[bytes], file: Any, where: str) -> tuple[str, bytes, list[tuple[int, int]]]:
    """(mark, the JSON with mark + i instead of long string i, the place (start, bytes) of each in `file`)."""
    mark = secrets.token_hex(16)
    rest, string, places = bytearray(), bytearray(), []
    inside, start, carried = False, None, b""
    for part in parts:
        part, carried, at = carried + part, b"", 0
        while at < len(part):
            if not inside:
                end = part.find(b'"', at) + 1 or len(part)
                rest += part[at:end]
                inside, at = part[at:end].endswith(b'"'), end
                continue
            end = _IN_STRING.match(part, at).end()
            string += part[at:end]
            if len(string) > _LONG_STRING:
                start = file.tell() if start is None else start
                file.write(string)
                string.clear()
            at = end
            if part[at : at + 1] == b"\\":  # half an escape
                carried = part[at:]
                break
            if at < len(part):  # the closing quote
                if start is not None:
                    file.write(string)
                    places.append((start, file.tell() - start))
                    string = bytearray(f"{mark}{len(places) - 1}".encode())
                rest += string + b'"'
                string, start, inside, at = bytearray(), None, False, at + 1
        if len(rest) > units.LONG:
            raise Unreadable(f"{where}: more than {units.LONG:,} bytes of JSON beside its long texts")
    return mark, bytes(rest + string + carried), places


def _unescaped(file: Any, start: int, size: int, where: str) -> Iterator[str]:
    decoder, text, end = codecs.getincrementaldecoder("utf-8")(), "", start + size
    file.seek(start)
    while (at := file.tell()) < end:
        block = file.read(min(_BLOCK, end - at))
        try:
            text += decoder.decode(block, final=file.tell() == end)
        except UnicodeDecodeError:
            raise Unreadable(f"{where}: not UTF-8; convert it or leave it out") from None
        whole = len(text) if file.tell() == end else _WHOLE.match(text).end()
        try:
            yield json.loads(f'"{text[:whole]}"')
        except json.JSONDecodeError as error:
            raise Unreadable(f"{where}: not JSON: {error}") from None
        text = text[whole:]
