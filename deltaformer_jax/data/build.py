"""Making a corpus: read, tokenize, split, write into a temporary folder, and rename it when it is whole."""

from __future__ import annotations

import array
import contextlib
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from deltaformer_jax.data import corpus as layout
from deltaformer_jax.data.corpus import Corpus, load_corpus, local_folder
from deltaformer_jax.data.sources import STDLIB, Source, open_source
from deltaformer_jax.data.tokenize_units import digest_of, token_dtype, tokenize_units
from deltaformer_jax.data.tokenizer import ByteTokenizer, Tokenizer, bpe_size, load_tokenizer, train_bpe

BPE_TRAINING_BYTES = 2**29  # BPE is learnt from about so much text of the training split, evenly sampled
_SHARD_BYTES = 2**30  # of tokens, before compression


def prepare_corpus(
    source: str | os.PathLike,
    out: str | os.PathLike,
    *,
    tokenizer: str = "bytes",
    workers: int = 1,
    eval_fraction: float = 0.02,
    text_field: str = "text",
    force: bool = False,
    progress: bool = False,
) -> Corpus:
    """Prepares `source` (see `open_source`) in folder `out`, or loads it if `out` was made by the same settings.

    tokenizer: "bytes", "bpe:SIZE" (learnt from the training documents), or a tokenizer.json file.
    A document goes to the eval split if the hash of its text, as a fraction, is below eval_fraction: equal texts are
    never on both sides. Empty documents are left out. The folder's content depends on the source, tokenizer,
    eval_fraction and text_field alone; `workers` processes only share the work (more than 1 start new interpreters, so
    a script that calls this needs `if __name__ == "__main__":`).
    `force` replaces an existing corpus. `progress` shows a bar on stderr.

    Errors, before anything is written where that is possible: ValueError, FileNotFoundError, FileExistsError.
    An interrupted run leaves nothing in `out`.
    """
    folder = local_folder(out)
    if not 0 <= eval_fraction < 1:
        raise ValueError(f"eval_fraction is {eval_fraction}; it must be at least 0 and below 1")
    if workers < 1:
        raise ValueError(f"workers is {workers}; it must be at least 1")
    size = bpe_size(tokenizer)
    given = None if size else ByteTokenizer() if tokenizer == "bytes" else load_tokenizer(tokenizer)
    opened = open_source(source, text_field)
    if opened.description["kind"] == "files" and folder.resolve().is_relative_to(opened.description["path"]):
        raise ValueError(f"{folder}: lies in the source and would be read as a part of it; choose another folder")
    settings = {
        "tokenizer": tokenizer if size else given.hash,
        "eval_fraction": eval_fraction,
        "text_field": text_field,
        "source": opened.description,
    }
    if (folder / layout.MANIFEST_FILE).exists():
        if not force:
            return _same(folder, settings)
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder}: exists and is not a corpus; choose another folder")

    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = _beside(folder, "partial")
    try:
        partial.mkdir()
        chosen = given or _learn_bpe(opened, size, eval_fraction, progress)
        _write(partial, opened, chosen, settings, workers, progress)
        return _move(partial, folder, settings, force)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def stdlib_corpus(tokenizer: str = "bytes") -> Corpus:
    """The running Python's own standard library, about 10 MB of code; prepared once per Python and tokenizer.

    Kept in $XDG_CACHE_HOME/deltaformer_jax (default ~/.cache/deltaformer_jax) under a name with the hash of its text,
    so an upgraded Python makes a new one. Several processes may ask at once. 5 % of the documents are the eval split.
    """
    source = open_source(STDLIB)
    size = bpe_size(tokenizer)
    name = tokenizer.replace(":", "") if size or tokenizer == "bytes" else load_tokenizer(tokenizer).hash[:12]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "deltaformer_jax"
    version = f"v{layout.FORMAT_VERSION}"
    folder = cache / f"stdlib-{source.description['python']}-{source.description['hash'][:12]}-{name}-{version}"
    try:
        return prepare_corpus(STDLIB, folder, tokenizer=tokenizer, eval_fraction=0.05)
    except FileExistsError:
        raise
    except OSError as error:  # a home folder that cannot be written, a full disk
        raise OSError(f"{folder}: cannot be made ({error}); set XDG_CACHE_HOME to a folder you can write") from None


def _beside(folder: Path, what: str) -> Path:
    return folder.parent / f".{folder.name}.{what}-{secrets.token_hex(4)}"


def _same(folder: Path, settings: dict[str, Any]) -> Corpus:
    try:
        corpus = load_corpus(folder)
    except (ValueError, OSError) as error:
        raise FileExistsError(f"{folder}: holds a damaged corpus ({error}); delete it, or use --force") from None
    if corpus.manifest["settings"] == settings:
        return corpus
    different = [name for name, value in settings.items() if corpus.manifest["settings"].get(name) != value]
    raise FileExistsError(
        f"{folder}: holds a corpus made with another {' and '.join(different)}; "
        "choose another folder, or --force replaces it"
    )


def _move(partial: Path, folder: Path, settings: dict[str, Any], force: bool) -> Corpus:
    if force and folder.exists():
        old = _beside(folder, "old")
        os.replace(folder, old)
        os.replace(partial, folder)
        shutil.rmtree(old)
        return load_corpus(folder)
    try:
        os.replace(partial, folder)  # onto nothing or an empty folder
    except OSError:
        if not (folder / layout.MANIFEST_FILE).exists():
            raise
        return _same(folder, settings)  # another process was first
    return load_corpus(folder)


def _fraction(digest_part: bytes) -> float:
    return int.from_bytes(digest_part[:6], "little") / 2**48


def _in_eval(digest: bytes, eval_fraction: float) -> bool:
    return _fraction(digest[:8]) < eval_fraction


def _learn_bpe(source: Source, size: int, eval_fraction: float, progress: bool) -> Tokenizer:
    share = BPE_TRAINING_BYTES / max(source.size, 1)

    def texts(advance: Any) -> Iterator[str]:
        for unit in source.units():
            for text in unit.documents():
                digest = digest_of(text.encode("utf-8"))
                if not _in_eval(digest, eval_fraction) and _fraction(digest[8:]) < share:
                    yield text
            advance(unit.size)

    with _progress(progress, f"learning {size} tokens", source.size) as advance:
        return train_bpe(texts(advance), size)


@contextlib.contextmanager
def _disk_errors() -> Iterator[None]:
    """ArrayRecord's RuntimeError, of a full disk for example, as the OSError that it is."""
    try:
        yield
    except RuntimeError as error:
        raise OSError(f"cannot write the corpus: {error}") from None


class _SplitWriter:
    """Writes one split's shards and lengths into `folder`."""

    def __init__(self, folder: Path, name: str):
        self._folder = folder
        self._name = name
        self._writer = None
        self._shard_bytes = 0
        self._content = hashlib.sha256()
        self._lengths = array.array("q")
        self.shards: list[dict[str, Any]] = []
        self.bytes = 0

    def add(self, tokens: np.ndarray, text_bytes: int, digest: bytes) -> None:
        if self._writer is None or self._shard_bytes >= _SHARD_BYTES:
            self._open_shard()
        for start in range(0, len(tokens), layout.PIECE):
            with _disk_errors():
                self._writer.write(tokens[start : start + layout.PIECE].tobytes())
            self.shards[-1]["records"] += 1
        self._shard_bytes += tokens.nbytes
        self.bytes += text_bytes
        self._lengths.append(len(tokens))
        self._content.update(digest)

    def _open_shard(self) -> None:
        from array_record.python.array_record_module import ArrayRecordWriter

        self._close_shard()
        file = f"{self._name}-{len(self.shards):05d}.array_record"
        # group_size 1: a record is compressed by itself, so that random access reads nothing else.
        self._writer = ArrayRecordWriter(str(self._folder / file), "group_size:1,zstd:3")
        self._shard_bytes = 0
        self.shards.append({"file": file, "records": 0})

    def _close_shard(self) -> None:
        if self._writer is not None:
            with _disk_errors():
                self._writer.close()
            self.shards[-1]["size"] = (self._folder / self.shards[-1]["file"]).stat().st_size

    def close(self) -> dict[str, Any]:
        """The split's entry in the manifest."""
        self._close_shard()
        lengths = np.array(self._lengths, np.int64)
        path = self._folder / layout.lengths_file(self._name)
        np.save(path, lengths)
        return {
            "documents": len(lengths),
            "tokens": int(lengths.sum()),
            "bytes": self.bytes,
            "documents_hash": self._content.hexdigest(),
            "lengths_hash": hashlib.sha256(path.read_bytes()).hexdigest(),
            "shards": self.shards,
        }


def _write(
    folder: Path, source: Source, tokenizer: Tokenizer, settings: dict[str, Any], workers: int, progress: bool
) -> None:
    tokenizer.save(folder / layout.TOKENIZER_FILE)
    writers = {name: _SplitWriter(folder, name) for name in layout.SPLITS}
    with _progress(progress, "tokenizing", source.size) as advance:
        for unit in tokenize_units(tokenizer, source.units(), workers):
            ends = np.cumsum(unit.lengths, dtype=np.int64)
            for end, length, text_bytes, digest in zip(ends, unit.lengths, unit.text_bytes, unit.digests):
                name = "eval" if _in_eval(digest, settings["eval_fraction"]) else "train"
                writers[name].add(unit.tokens[end - length : end], text_bytes, digest)
            advance(unit.size, len(unit.lengths))
    splits = {name: writer.close() for name, writer in writers.items()}
    if not splits["train"]["documents"]:
        found = splits["eval"]["documents"]
        why = f"all {found} documents fell to eval; lower --eval_fraction" if found else "no document with text in it"
        raise ValueError(f"{settings['source'].get('path', STDLIB)}: {why}")
    kinds = [tokenizer.hash, *(splits[name]["documents_hash"] for name in layout.SPLITS)]
    manifest = {
        "format": layout.FORMAT,
        "format_version": layout.FORMAT_VERSION,
        "tokenizer": {"kind": tokenizer.kind, "vocab_size": tokenizer.vocab_size, "hash": tokenizer.hash},
        "settings": settings,
        "token_dtype": token_dtype(tokenizer).str,
        "splits": splits,
        "source_files_left_out": source.left_out,
        "content_hash": hashlib.sha256("\n".join(kinds).encode()).hexdigest(),
    }
    manifest["manifest_hash"] = layout.manifest_hash(manifest)
    (folder / layout.MANIFEST_FILE).write_text(json.dumps(manifest, indent=1) + "\n")


@contextlib.contextmanager
def _progress(show: bool, title: str, total: int) -> Iterator[Any]:
    """Yields advance(bytes, documents=0)."""
    if not show:
        yield lambda size, documents=0: None
        return
    from rich import progress
    from rich.console import Console

    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.TaskProgressColumn(),
        progress.TextColumn("{task.fields[documents]:,} documents"),
        progress.DownloadColumn(),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=total, documents=0)
        seen = 0

        def advance(size: int, documents: int = 0) -> None:
            nonlocal seen
            seen += documents
            bar.update(task, advance=size, documents=seen)

        yield advance
