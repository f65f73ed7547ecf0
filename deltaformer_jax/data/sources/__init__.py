"""Sources of documents: text and code files, JSON lines, Parquet, the standard library of the running Python.

A `Source` lists its files at once, in sorted order, and divides them into units. A unit is a few megabytes that another
process can read, or one document that is too long for that. Units, and documents within them, keep the order of the
files, whichever process reads them. A file or document of any size is read in bounded memory, except a row of Parquet.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deltaformer_jax.data.sources import units
from deltaformer_jax.data.sources.content import is_compressed
from deltaformer_jax.data.sources.conversation import Conversation
from deltaformer_jax.data.sources.folder import files_below, no_file
from deltaformer_jax.data.sources.hub_folder import HELD_OUT, TRAINING, chosen_shards, listed
from deltaformer_jax.data.sources.json_lines import JSONLinesUnit, jsonl_units
from deltaformer_jax.data.sources.parquet import ParquetUnit, parquet_units
from deltaformer_jax.data.sources.stdlib import STDLIB, stdlib_files
from deltaformer_jax.data.sources.text import FilesUnit, text_units
from deltaformer_jax.data.sources.units import LongUnit, TextsUnit, Unreadable
from deltaformer_jax.host.paths import expand

__all__ = ["STDLIB", "Conversation", "LongUnit", "Source", "Unit", "Unreadable", "open_source"]

TEXT_SUFFIXES = frozenset(
    ".txt .text .md .markdown .rst .tex .org .adoc .html .htm .css .yaml .yml .toml .ini .cfg .py .pyi .pyx .c "
    ".h .cc .cpp .cxx .hh .hpp .cu .cuh .m .mm .java .kt .scala .groovy .go .rs .swift .cs .fs "
    ".js .jsx .mjs .ts .tsx .vue .rb .php .pl .pm .lua .r .jl .hs .ml .mli .ex .exs .erl .clj .lisp .el .scm .sh .bash "
    ".zsh .fish .ps1 .sql .proto .thrift .cmake .mk .dart .nim .zig .v .sv .vhd .vhdl .f .f90 .f95 .asm .s .lean .mlir "
    ".ll .td".split()
)
JSONL_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json.gz", ".json.zst")
PARQUET_SUFFIX = ".parquet"
_JSON_HINT = "; a .json file with one object in each line is to be renamed to .jsonl"
Unit = FilesUnit | TextsUnit | JSONLinesUnit | ParquetUnit  # a LongUnit is read by the main process


@dataclasses.dataclass(frozen=True)
class Source:
    """Files to read. `description` goes into the manifest; sources with the same one have the same documents."""

    files: list[Path]
    sizes: list[int]
    text_field: str
    description: dict[str, Any]
    separator: str = ""  # between the documents in a text file
    left_out: list[tuple[str, str]] = dataclasses.field(default_factory=list)  # (file, why it is not read)
    chat: bool = False  # documents are conversations
    note: str = ""  # which of several splits was chosen

    @property
    def size(self) -> int:
        return sum(self.sizes)

    @property
    def is_pipe(self) -> bool:
        """True for a pipe, which can be read only once."""
        return len(self.files) == 1 and stat.S_ISFIFO(self.files[0].stat().st_mode)

    def units(self) -> Iterator[Unit | LongUnit]:
        """All documents, in order. One that cannot be read is an Unreadable among the documents of its unit.

        The content of a LongUnit is available until the next unit is requested.
        """
        gathered: list[Path] = []
        gathered_size = 0
        for path, size in zip(self.files, self.sizes):
            kind = _kind(path)
            gathers = kind == "text" and size <= units.UNIT_BYTES and not is_compressed(path) and not self.is_pipe
            if gathered and (not gathers or gathered_size + size > units.UNIT_BYTES):
                yield FilesUnit(gathered, gathered_size, self.separator)
                gathered, gathered_size = [], 0
            if gathers:
                gathered, gathered_size = [*gathered, path], gathered_size + size
            elif kind == "text":
                yield from text_units(path, self.separator)
            elif kind == "jsonl":
                yield from jsonl_units(path, self.text_field, self.chat)
            else:
                yield from parquet_units(path, size, self.text_field, self.chat)
        if gathered:
            yield FilesUnit(gathered, gathered_size, self.separator)


def open_source(
    source: str | os.PathLike,
    text_field: str = "text",
    separator: str = "",
    chat: bool = False,
    subset: str = "",
    split: str = "",
    held_out: bool = False,
) -> Source:
    """The files of `source`: a folder (with subfolders, without hidden names, see `files_below`), a file, or "stdlib".

    In a folder, files other than text or code, JSON lines and Parquet are left out, and so are pipes, sockets, devices
    and files that cannot be opened. `Source.left_out` names them. A pipe is read if `source` is the pipe itself.
    Of a dataset of the Hugging Face hub one `subset` and `split` is read (see `chosen_shards`); of several splits, if
    none is named, the one for training, or with `held_out` the first that is not. With `chat` documents
    are conversations, and text files are left out.
    Raises FileNotFoundError or ValueError if no file is left, or if a single file is of another kind.
    """
    if os.fspath(source) == STDLIB:
        if chat or subset or split:
            raise ValueError("--chat, --subset and --split are for a SOURCE of JSON lines or Parquet; name it")
        files, sizes, description = stdlib_files()
        return Source(files, sizes, "text", description, separator)
    if not os.fspath(source):
        raise ValueError("SOURCE is empty; name a file, a folder or stdlib")
    if "://" in os.fspath(source):
        raise ValueError(f"{source}: not on a local or mounted disk; copy it there first")
    root = Path(expand(source))
    if not root.exists():
        raise FileNotFoundError(f"{root}: no such file or folder")
    kind = _chat_kind if chat else _kind
    texts = "" if chat else "text or code (.txt, .md, .py.gz, ...), "
    kinds = f"{texts}{', '.join(JSONL_SUFFIXES)}, {PARQUET_SUFFIX}"
    part, note = {}, ""
    left_out: list[tuple[str, str]] = []
    if root.is_dir():
        names, left_out = files_below(root, kind)
        if not names:
            first = f" ({left_out[0][0]}: {left_out[0][1]})" if left_out else ""
            hint = _JSON_HINT if any(name.endswith(".json") for name, _ in left_out) else ""
            raise ValueError(f"{root}: the folder holds no file of a known kind that can be read{first}: {kinds}{hint}")
        shards, part, others, together = chosen_shards(root, names, subset, split, HELD_OUT if held_out else TRAINING)
        if others and not split:
            note = f"{root}: read split {part['split']}, left out {', '.join(others)}; --split takes another"
        if together:
            note = f"{root}: read the {len(together)} folders {listed(together)} together; --subset takes one"
        why = "not of " + ", ".join(f"{what} {name}" for what, name in part.items()) if part else "describes the data"
        left_out = sorted([*left_out, *((name, why) for name in sorted(set(names) - set(shards)))])
        files = {name: root / name for name in shards}
    else:
        if subset or split:
            raise ValueError(f"{root}: is a file; --subset and --split are for folders")
        if not kind(root):
            hint = _JSON_HINT if root.suffix == ".json" else ""
            raise ValueError(f"{root}: unknown suffix {root.suffix!r}; known: {kinds}{hint}")
        what = no_file(root.stat().st_mode)
        if what and not stat.S_ISFIFO(root.stat().st_mode):
            raise ValueError(f"{root}: is {what}, not a file")
        files = {root.name: root}
    listing = hashlib.sha256()
    sizes = []
    for name, path in files.items():
        stats = path.stat()
        sizes.append(stats.st_size)
        listing.update(f"{name}\0{stats.st_size}\0{stats.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
    description = {"kind": "files", "path": str(root.resolve()), "files": len(files), "hash": listing.hexdigest()}
    description |= part
    return Source(list(files.values()), sizes, text_field, description, separator, left_out, chat, note)


def _kind(path: Path) -> str | None:
    name = path.name.lower()
    if name.endswith(JSONL_SUFFIXES):
        return "jsonl"
    if name.endswith(PARQUET_SUFFIX):
        return "parquet"
    name = name.removesuffix(".gz").removesuffix(".zst")
    return "text" if Path(name).suffix in TEXT_SUFFIXES else None


def _chat_kind(path: Path) -> str | None:
    return kind if (kind := _kind(path)) != "text" else None
