"""Parquet files: each row is a document, whose text is the string in a column."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deltaformer_jax.data.sources import units
from deltaformer_jax.data.sources.record import text_of
from deltaformer_jax.data.sources.units import TextsUnit, Unreadable

_SMALL_GROUP = 2**24  # bytes, all columns, before compression
_ROWS = 64


class ParquetUnit:
    """One row group of a Parquet file. The texts are in the string column `field`."""

    def __init__(self, path: Path, row_group: int, field: str, size: int):
        self.path = path
        self.row_group = row_group
        self.field = field
        self.size = size

    def documents(self) -> Iterator[str | Unreadable]:
        yield from _rows(self.path, self.row_group, self.field)


def parquet_units(path: Path, file_size: int, field: str) -> Iterator[ParquetUnit | TextsUnit]:
    """The units of a file of any size; a small row group is one unit. Memory: a unit and the longest row."""
    try:
        sizes = _row_groups(path, field)
    except Unreadable as error:
        yield TextsUnit([error], file_size)
        return
    share = file_size / max(sum(sizes), 1)
    for i, size in enumerate(sizes):
        if size <= _SMALL_GROUP:
            yield ParquetUnit(path, i, field, int(size * share))
            continue
        texts, characters, left = [], 0, int(size * share)
        for text in _rows(path, i, field):
            texts.append(text)
            characters += 0 if isinstance(text, Unreadable) else len(text)
            if characters >= units.UNIT_BYTES:
                took = min(left, int(characters * share))
                yield TextsUnit(texts, took)
                texts, characters, left = [], 0, left - took
        yield TextsUnit(texts, left)


def _row_groups(path: Path, field: str) -> list[int]:
    """The size of each row group. Raises Unreadable, naming the file, if it has no column `field` of texts."""
    import pyarrow.types as types

    try:
        with _opened(path) as file:
            schema, metadata = file.schema_arrow, file.metadata
            sizes = [metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups)]
    except Exception as error:  # pyarrow raises many types of errors for invalid files
        raise Unreadable(f"{path}: not a readable Parquet file: {error}") from None
    columns = [schema.field(i) for i in range(len(schema.names)) if schema.names[i] == field]
    if not columns:
        columns = ", ".join(schema.names)
        raise Unreadable(f"{path}: no column {field!r} (columns: {columns}); name it with --text_field")
    if len(columns) > 1:
        raise Unreadable(f"{path}: {len(columns)} columns are called {field!r}; rename all but one")
    kind = columns[0].type
    kind = kind.value_type if types.is_dictionary(kind) else kind
    if not (types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)):
        raise Unreadable(f"{path}: column {field!r} is {kind}, not text; choose --text_field")
    return sizes


def _rows(path: Path, row_group: int, field: str) -> Iterator[str | Unreadable]:
    where, row = f"{path}, row group {row_group}", 0
    try:
        with _opened(path) as file:
            batches = file.iter_batches(_ROWS, row_groups=[row_group], columns=[field], use_threads=False)
            for batch in batches:
                for value in batch.column(0):
                    yield _text(value, field, f"{where}, row {row}")
                    row += 1
    except Exception as error:
        yield Unreadable(f"{where}: cannot be read from row {row} on: {error}")


def _text(value: Any, field: str, where: str) -> str | Unreadable:
    try:
        return text_of(value.as_py(), field, where)
    except Unreadable as error:
        return error
    except Exception as error:  # bytes that are not UTF-8
        return Unreadable(f"{where}: cannot be read: {error}")


def _opened(path: Path) -> Any:
    import pyarrow.parquet

    # Read in small buffers: by default a whole column of a row group is held in memory.
    return pyarrow.parquet.ParquetFile(path, buffer_size=2**20, pre_buffer=False)
