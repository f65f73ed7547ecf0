"""Parquet files: each row is a document: the string in a column or, with `chat`, its list of messages.

The column "meta.text" is the field text of the struct in column meta, unless a column has that very name.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deltaformer_jax.data.sources import units
from deltaformer_jax.data.sources.conversation import Conversation
from deltaformer_jax.data.sources.record import document_reader
from deltaformer_jax.data.sources.units import TextsUnit, Unreadable

_SMALL_GROUP = 2**24  # bytes, all columns, before compression
_ROWS = 64


class ParquetUnit:
    """One row group of a Parquet file. The documents are in the column `field`."""

    def __init__(self, path: Path, row_group: int, field: str, size: int, chat: bool = False):
        self.path = path
        self.row_group = row_group
        self.field = field
        self.size = size
        self.chat = chat

    def documents(self) -> Iterator[str | Conversation | Unreadable]:
        yield from _rows(self.path, self.row_group, self.field, self.chat)


def parquet_units(path: Path, file_size: int, field: str, chat: bool = False) -> Iterator[ParquetUnit | TextsUnit]:
    """The units of a file of any size; a small row group is one unit. Memory: a unit and the longest row."""
    try:
        sizes = _row_groups(path, field, chat)
    except Unreadable as error:
        yield TextsUnit([error], file_size)
        return
    share = file_size / max(sum(sizes), 1)
    for i, size in enumerate(sizes):
        if size <= _SMALL_GROUP:
            yield ParquetUnit(path, i, field, int(size * share), chat)
            continue
        texts, characters, left = [], 0, int(size * share)
        for text in _rows(path, i, field, chat):
            texts.append(text)
            characters += 0 if isinstance(text, Unreadable) else len(text)
            if characters >= units.UNIT_BYTES:
                took = min(left, int(characters * share))
                yield TextsUnit(texts, took)
                texts, characters, left = [], 0, left - took
        yield TextsUnit(texts, left)


def _row_groups(path: Path, field: str, chat: bool) -> list[int]:
    """The size of each row group. Raises Unreadable, naming the file, if it has no column `field` of documents."""
    try:
        with _opened(path) as file:
            schema, metadata = file.schema_arrow, file.metadata
            sizes = [metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups)]
    except Exception as error:  # pyarrow raises many types of errors for invalid files
        raise Unreadable(f"{path}: not a readable Parquet file: {error}") from None
    names, place = list(schema.names), _place(schema, field)
    if not place:
        listed = ", ".join(names)
        hint = ", or --chat for conversations" if "messages" in names and not chat else ""
        raise Unreadable(f"{path}: no column {field!r} (columns: {listed}); name it with --text_field{hint}")
    if names.count(place[0]) > 1:
        raise Unreadable(f"{path}: {names.count(place[0])} columns are called {place[0]!r}; rename all but one")
    kind = schema.field(place[0]).type
    for name in place[1:]:
        kind = kind.field(name).type
    if chat:
        if not _is_messages(kind):
            raise Unreadable(
                f"{path}: column {field!r} is {kind}, not a list of messages with role and content; choose --text_field"
            )
    elif not _is_text(kind):
        hint = ", or --chat for conversations" if _is_messages(kind) else ""
        raise Unreadable(f"{path}: column {field!r} is {kind}, not text; choose --text_field{hint}")
    return sizes


def _place(schema: Any, field: str) -> tuple[str, ...]:
    """The names that lead to `field`: of a column, then of the fields of structs in it. Empty if it is not there."""
    import pyarrow.types as types

    if field in schema.names:
        return (field,)
    first, *others = field.split(".")
    if first not in schema.names:
        return ()
    kind = schema.field(schema.names.index(first)).type
    for name in others:
        if not types.is_struct(kind) or kind.get_field_index(name) < 0:
            return ()
        kind = kind.field(name).type
    return (first, *others)


def _is_text(kind: Any) -> bool:
    import pyarrow.types as types

    kind = kind.value_type if types.is_dictionary(kind) else kind
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def _is_messages(kind: Any) -> bool:
    import pyarrow.types as types

    return (types.is_list(kind) or types.is_large_list(kind)) and types.is_struct(kind.value_type)


def _rows(path: Path, row_group: int, field: str, chat: bool) -> Iterator[str | Conversation | Unreadable]:
    where, row = f"{path}, row group {row_group}", 0
    try:
        with _opened(path) as file:
            first, *others = _place(file.schema_arrow, field)
            columns = [".".join((first, *others))]
            batches = file.iter_batches(_ROWS, row_groups=[row_group], columns=columns, use_threads=False)
            for batch in batches:
                for value in batch.column(first):
                    yield _document(value, others, field, f"{where}, row {row}", chat)
                    row += 1
    except Exception as error:
        yield Unreadable(f"{where}: cannot be read from row {row} on: {error}")


def _document(value: Any, names: list[str], field: str, where: str, chat: bool) -> str | Conversation | Unreadable:
    try:
        value = value.as_py()
        for name in names:
            value = None if value is None else value[name]
        return document_reader(chat)(value, field, where)
    except Unreadable as error:
        return error
    except Exception as error:  # bytes that are not UTF-8
        return Unreadable(f"{where}: cannot be read: {error}")


def _opened(path: Path) -> Any:
    import pyarrow.parquet

    # Read in small buffers: by default a whole column of a row group is held in memory.
    return pyarrow.parquet.ParquetFile(path, buffer_size=2**20, pre_buffer=False)
