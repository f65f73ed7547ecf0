"""Where documents come from: text and code files, JSON lines, Parquet, the running Python's standard library.

A `Source` lists its files at once, in sorted order, and cuts them into units: a few megabytes that another process can
read by itself. Units, and documents within them, keep the files' order, whoever reads them.
"""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import os
import platform
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from deltaformer_jax.host.paths import expand

STDLIB = "stdlib"
TEXT_SUFFIXES = frozenset(
    ".txt .text .md .markdown .rst .tex .org .adoc .html .htm .css .yaml .yml .toml .ini .cfg .py .pyi .pyx .c "
    ".h .cc .cpp .cxx .hh .hpp .cu .cuh .m .mm .java .kt .scala .groovy .go .rs .swift .cs .fs "
    ".js .jsx .mjs .ts .tsx .vue .rb .php .pl .pm .lua .r .jl .hs .ml .mli .ex .exs .erl .clj .lisp .el .scm .sh .bash "
    ".zsh .fish .ps1 .sql .proto .thrift .cmake .mk .dart .nim .zig .v .sv .vhd .vhdl .f .f90 .f95 .asm .s .lean .mlir "
    ".ll .td".split()
)
JSONL_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json.gz", ".json.zst")
PARQUET_SUFFIX = ".parquet"
_UNIT_BYTES = 2**20


class TextUnit:
    """Whole files, a document each, or several where `separator` stands. `size`: bytes of source, for progress."""

    def __init__(self, files: list[Path], size: int, separator: str):
        self.files = files
        self.size = size
        self.separator = separator

    def documents(self) -> Iterator[str]:
        for path in self.files:
            text = _decoded(_content(path), str(path))
            yield from text.split(self.separator) if self.separator else [text]


class JSONLinesUnit:
    """Lines of a JSON-lines file, undecoded, with the first one's number; the text is the string at `field`."""

    def __init__(self, path: Path, first_line: int, lines: list[bytes], field: str, size: int):
        self.path = path
        self.first_line = first_line
        self.lines = lines
        self.field = field
        self.size = size

    def documents(self) -> Iterator[str]:
        for number, line in enumerate(self.lines, self.first_line):
            if not line.strip():
                continue
            where = f"{self.path}, line {number}"
            try:
                record = json.loads(_decoded(line, where))
            except json.JSONDecodeError as error:
                raise ValueError(f"{where}: not JSON: {error}") from None
            if not isinstance(record, dict) or self.field not in record:
                names = ", ".join(record) if isinstance(record, dict) else "none, it is no object"
                raise ValueError(f"{where}: no field {self.field!r} (fields: {names}); name it with --text_field")
            yield _text(record[self.field], self.field, where)


class ParquetUnit:
    """One row group of a Parquet file; the text is the string column `field`."""

    def __init__(self, path: Path, row_group: int, field: str, size: int):
        self.path = path
        self.row_group = row_group
        self.field = field
        self.size = size

    def documents(self) -> Iterator[str]:
        where = f"{self.path}, row group {self.row_group}"
        with _open_parquet(self.path) as file:
            try:
                values = file.read_row_group(self.row_group, columns=[self.field], use_threads=False)[self.field]
                texts = values.to_pylist()
            except (OSError, ValueError) as error:
                raise ValueError(f"{where}: cannot be read: {error}") from None
        for row, text in enumerate(texts):
            yield _text(text, self.field, f"{where}, row {row}")


Unit = TextUnit | JSONLinesUnit | ParquetUnit


@dataclasses.dataclass(frozen=True)
class Source:
    """Files to read. `description` goes into the manifest; two sources with the same one hold the same documents."""

    files: list[Path]
    sizes: list[int]
    text_field: str
    description: dict[str, Any]
    separator: str = ""  # of the documents in a text file
    left_out: int = 0  # files of other kinds

    @property
    def size(self) -> int:
        return sum(self.sizes)

    def units(self) -> Iterator[Unit]:
        """All documents, in order. Errors, each naming file and line: ValueError, OSError."""
        gathered: list[Path] = []
        gathered_size = 0
        for path, size in zip(self.files, self.sizes):
            kind = _kind(path)
            if gathered and (kind != "text" or gathered_size + size > _UNIT_BYTES):
                yield TextUnit(gathered, gathered_size, self.separator)
                gathered, gathered_size = [], 0
            if kind == "text":
                gathered, gathered_size = [*gathered, path], gathered_size + size
            elif kind == "jsonl":
                yield from _jsonl_units(path, self.text_field)
            else:
                yield from _parquet_units(path, self.text_field)
        if gathered:
            yield TextUnit(gathered, gathered_size, self.separator)


def open_source(source: str | os.PathLike, text_field: str = "text", separator: str = "") -> Source:
    """The files of `source`: a folder (searched through, hidden names not), a file, or "stdlib".

    In a folder, files of other kinds than text or code, JSON lines and Parquet are left out and counted.
    FileNotFoundError or ValueError if no file is left, or if a single file is of another kind.
    """
    if os.fspath(source) == STDLIB:
        return dataclasses.replace(_stdlib_source(), separator=separator)
    if not os.fspath(source):
        raise ValueError("SOURCE is empty; name a file, a folder or stdlib")
    if "://" in os.fspath(source):
        raise ValueError(f"{source}: not on a local or mounted disk; copy it there first")
    root = Path(expand(source))
    if not root.exists():
        raise FileNotFoundError(f"{root}: no such file or folder")
    kinds = f"text or code (.txt, .md, .py.gz, ...), {', '.join(JSONL_SUFFIXES)}, {PARQUET_SUFFIX}"
    left_out = 0
    if root.is_dir():
        found = _files_below(root, lambda name: not name.startswith(".") and name != "__pycache__")
        names = {name: root / name for name in found if _kind(root / name)}
        left_out = len(found) - len(names)
        if not names:
            raise ValueError(f"{root}: the folder holds no file of a known kind: {kinds}")
    else:
        if not _kind(root):
            raise ValueError(f"{root}: unknown suffix {root.suffix!r}; known: {kinds}")
        names = {root.name: root}
    listing = hashlib.sha256()
    sizes = []
    for name, path in names.items():
        stat = path.stat()
        sizes.append(stat.st_size)
        listing.update(f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
    description = {"kind": "files", "path": str(root.resolve()), "files": len(names), "hash": listing.hexdigest()}
    return Source(list(names.values()), sizes, text_field, description, separator, left_out)


def _stdlib_source() -> Source:
    """The running Python's own library: *.py of the modules in sys.stdlib_module_names, tests and tables left out."""
    root = Path(os.__file__).parent
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: this Python's standard library is not in a folder; name a SOURCE")
    files, sizes, content = [], [], hashlib.sha256()
    for name in _files_below(root, lambda name: name not in _NOT_STDLIB):
        if not _in_stdlib_corpus(name):
            continue
        text = (root / name).read_bytes()
        if b"Python Character Mapping Codec" in text[:200]:  # encodings/cp1252.py and 80 more tables
            continue
        try:
            text.decode("utf-8")
        except UnicodeDecodeError:
            continue
        files.append(root / name)
        sizes.append(len(text))
        content.update(f"{name}\0{len(text)}\n".encode() + text)
    if not files:
        raise FileNotFoundError(f"{root}: this Python's standard library has no source files; name a SOURCE")
    description = {
        "kind": STDLIB,
        "python": platform.python_version(),
        "files": len(files),
        "hash": content.hexdigest(),
    }
    return Source(files, sizes, "text", description)


_NOT_STDLIB = frozenset(("test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"))
_GENERATED = ("pydoc_data/", "html/entities.py", "stringprep.py", "token.py", "lib2to3/pygram.py")


def _in_stdlib_corpus(name: str) -> bool:
    module = name.split("/")[0].removesuffix(".py")
    return name.endswith(".py") and module in sys.stdlib_module_names and not name.startswith(_GENERATED)


def _kind(path: Path) -> str | None:
    name = path.name.lower()
    if name.endswith(JSONL_SUFFIXES):
        return "jsonl"
    if name.endswith(PARQUET_SUFFIX):
        return "parquet"
    name = name.removesuffix(".gz").removesuffix(".zst")
    return "text" if Path(name).suffix in TEXT_SUFFIXES else None


def _files_below(root: Path, wanted: Callable[[str], bool]) -> list[str]:
    """Names of the files below root, relative to it with "/", sorted; folders and files not `wanted` are passed by."""
    names = []
    for folder, folders, files in os.walk(root):
        folders[:] = filter(wanted, folders)
        names += [(Path(folder) / file).relative_to(root).as_posix() for file in filter(wanted, files)]
    return sorted(names)


def _decoded(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 (byte {error.start}); convert it to UTF-8 or leave it out") from None


def _content(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            return b"".join(_decompressed(path, file))
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{path}: cannot be decompressed or read: {error}") from None


def _text(value: Any, field: str, where: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where}: field {field!r} is {type(value).__name__}, not text; choose --text_field")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"{where}: field {field!r} holds half a surrogate pair, which is no character") from None
    return value


def _jsonl_units(path: Path, field: str) -> Iterator[JSONLinesUnit]:
    with open(path, "rb") as file:
        try:
            lines: list[bytes] = []
            number, size, position = 1, 0, 0
            for line in _decompressed(path, file):
                lines.append(line)
                size += len(line)
                if size >= _UNIT_BYTES:
                    now = file.tell()
                    yield JSONLinesUnit(path, number, lines, field, now - position)
                    number, lines, size, position = number + len(lines), [], 0, now
            yield JSONLinesUnit(path, number, lines, field, path.stat().st_size - position)
        except (EOFError, OSError, zlib.error) as error:  # of decompression
            raise ValueError(f"{path}: cannot be decompressed or read: {error}") from None


def _decompressed(path: Path, file: Any) -> Iterator[bytes]:
    if path.name.lower().endswith(".gz"):
        return iter(gzip.GzipFile(fileobj=file))
    if path.name.lower().endswith(".zst"):
        return _zstd_lines(file)
    return iter(file)


def _zstd_lines(file: Any) -> Iterator[bytes]:
    import pyarrow

    rest = b""
    with pyarrow.CompressedInputStream(pyarrow.PythonFile(file, mode="r"), "zstd") as stream:
        while block := stream.read(_UNIT_BYTES):
            *lines, rest = (rest + block).split(b"\n")
            for line in lines:
                yield line + b"\n"
    if rest:
        yield rest


def _open_parquet(path: Path) -> Any:
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not a readable Parquet file: {error}") from None


def _parquet_units(path: Path, field: str) -> Iterator[ParquetUnit]:
    with _open_parquet(path) as file:
        names = file.schema_arrow.names
        if field not in names:
            raise ValueError(f"{path}: no column {field!r} (columns: {', '.join(names)}); name it with --text_field")
        metadata = file.metadata
        sizes = [metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups)]
    share = path.stat().st_size / max(sum(sizes), 1)
    for i, size in enumerate(sizes):
        yield ParquetUnit(path, i, field, int(size * share))
