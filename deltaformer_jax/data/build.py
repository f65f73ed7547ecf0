"""Preparing a corpus: read, tokenize, split, write into an unfinished folder beside the output, rename it at the end.

After a kill the same call finds the unfinished folder and continues after the last shards that were closed.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import secrets
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deltaformer_jax.data import corpus as layout
from deltaformer_jax.data import shards
from deltaformer_jax.data.chat import ChatFormat, load_format
from deltaformer_jax.data.corpus import Corpus, load_corpus, local_folder
from deltaformer_jax.data.remote.store import cache_folder
from deltaformer_jax.data.shards import JOURNAL, Journal, NotAsLeft, SplitWriter
from deltaformer_jax.data.sources import STDLIB, LongUnit, Source, Unreadable, open_source
from deltaformer_jax.data.sources.left_out import LeftOut
from deltaformer_jax.data.tokenize_units import digest_of, new_digest, token_dtype, tokenize_units
from deltaformer_jax.data.tokenizer import ByteTokenizer, Tokenizer, bpe_size, load_tokenizer, train_bpe
from deltaformer_jax.data.unfinished import Unfinished, open_unfinished, sweep, unfinished

_UNITS = 2  # version of how sources are divided into units, which an unfinished folder counts
BPE_TRAINING_BYTES = 2**29  # about how much text of the training split BPE is learnt from, sampled evenly


def prepare_corpus(
    source: str | os.PathLike,
    out: str | os.PathLike,
    *,
    tokenizer: str = "bytes",
    workers: int = 1,
    eval_fraction: float = 0.02,
    text_field: str = "",
    separator: str = "",
    chat: str = "",
    subset: str = "",
    split: str = "",
    held_out: bool = False,
    on_error: str = "stop",
    force: bool = False,
    progress: bool = False,
) -> Corpus:
    """Prepares `source` (see `open_source`) in folder `out`, or loads `out` if it was made with the same settings.

    tokenizer      "bytes", "bpe:SIZE" (learnt from the training documents), or a tokenizer.json file. Parts of a file
                   that would change texts are refused, or switched off with a warning (byte_level.py)
    workers        number of processes; they do not affect the result. More than 1 start new interpreters, so a script
                   that calls this function needs `if __name__ == "__main__":`
    eval_fraction  a document is in the eval split if the hash of its text, as a fraction, is below this. So equal texts
                   are always in the same split
    text_field     the field of JSON lines, or the column of Parquet, that holds the text; "meta.text" is field text of
                   field meta. Default: "text", or "messages" with `chat`
    separator      divides text files into documents wherever it occurs, for example "<|endoftext|>". Without it a text
                   file is one document
    chat           documents are conversations, lists of messages with role and content, of which the answers alone
                   bear loss. "template": rendered by the chat template beside the tokenizer's file; "plain", or the
                   path of a Jinja file (see `load_format`)
    subset, split  which part to read of a folder that is a dataset of the Hugging Face hub (see `chosen_shards`). Of
                   several splits the one for training is read if none is named, and a warning says so
    held_out       if none is named, read the first of its splits that is not for training
    on_error       what to do about a document or file that cannot be read. "stop": raise an error that names it.
                   "skip": leave it out, count it in the manifest ("left_out_on_error") and name it in left_out.txt of
                   the folder, which also names the files that are not text
    force          replace an existing corpus
    progress       show a bar on stderr

    The content of the folder depends on the source, tokenizer, eval_fraction, text_field, separator, chat, subset and
    split alone. Empty documents are left out.

    Memory: some hundred megabytes for each worker, whatever the size of a file or document (but see `parquet_units`).
    Raises ValueError, FileNotFoundError or FileExistsError, before anything is written where that is possible.
    A call that is killed, interrupted or stopped by an error leaves nothing in `out`. Shards that it had closed are
    kept in a hidden folder beside `out`. The same call, also with another `on_error`, continues after them and makes
    the same corpus, byte for byte.
    """
    folder = local_folder(out)
    if not 0 <= eval_fraction < 1:
        raise ValueError(f"eval_fraction is {eval_fraction}; it must be at least 0 and below 1")
    if workers < 1:
        raise ValueError(f"workers is {workers}; it must be at least 1")
    if on_error not in ("stop", "skip"):
        raise ValueError(f"on_error is {on_error!r}; it must be 'stop' or 'skip'")
    size = bpe_size(tokenizer)
    given = None if size else ByteTokenizer() if tokenizer == "bytes" else load_tokenizer(tokenizer)
    if chat and size:
        raise ValueError(
            f"tokenizer {tokenizer!r} cannot be learnt from conversations; learn it from text first and give its "
            'tokenizer.json, or take "bytes"'
        )
    if chat and separator:
        raise ValueError("separator divides text files, and with chat documents are conversations; leave it out")
    form = load_format(chat, tokenizer) if chat else None
    text_field = text_field or ("messages" if chat else "text")
    opened = open_source(source, text_field, separator, chat=bool(chat), subset=subset, split=split, held_out=held_out)
    if opened.description["kind"] == "files" and folder.resolve().is_relative_to(opened.description["path"]):
        raise ValueError(f"{folder}: lies in the source and would be read as a part of it; choose another folder")
    if size and opened.is_pipe:
        raise ValueError(f"{source}: is a pipe, and learning {tokenizer} reads it twice; copy it to a file first")
    settings = {
        "tokenizer": tokenizer if size else given.hash,
        "eval_fraction": eval_fraction,
        "text_field": text_field,
        "source": opened.description,
        **({"separator": separator} if separator else {}),
        **({"chat": form.settings()} if form else {}),
    }
    if (folder / layout.MANIFEST_FILE).exists():
        if not force:
            return _same(folder, settings, on_error)
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder}: exists and is not a corpus; choose another folder")

    if opened.note:
        warnings.warn(opened.note, stacklevel=2)
    if given and given.switched_off:
        off = ", ".join(given.switched_off)
        warnings.warn(f"{tokenizer}: switched off, so that a text has the bytes of its tokens: {off}", stacklevel=2)
    try:
        partial = open_unfinished(folder, [layout.FORMAT_VERSION, layout.PIECE, shards.SHARD_BYTES, _UNITS, settings])
    except OSError as error:
        raise OSError(f"{folder}: cannot be made: {error}") from None
    with partial.lock:
        try:
            skip = on_error == "skip"
            chosen = given or _learnt(partial.path, opened, size, eval_fraction, skip, progress)
            _write(partial.path, opened, chosen, form, settings, workers, skip, progress)
            corpus = _move(partial, folder, settings, on_error, force)
        except BaseException as error:
            # The work is kept after an interruption, on a full disk, or at a document that cannot be read.
            if isinstance(error, NotAsLeft) or not (partial.path / JOURNAL).exists():
                partial.remove()
            raise
        partial.remove()  # what is left of it if another process was first
    sweep(folder)
    return corpus


def can_go_on(out: str | os.PathLike) -> bool:
    """True if a preparation of `out` was cut short and the same call would continue it."""
    return unfinished(local_folder(out), JOURNAL)


def stdlib_corpus(tokenizer: str = "bytes") -> Corpus:
    """The standard library of the running Python, about 10 MB of code. Prepared once per Python and tokenizer.

    It is stored in $XDG_CACHE_HOME/deltaformer_jax (default ~/.cache/deltaformer_jax). Its name contains the hash of
    the text, so an upgraded Python gets a new corpus. Several processes may call this at once. The eval split has 5 %
    of the documents.
    """
    source = open_source(STDLIB)
    size = bpe_size(tokenizer)
    name = tokenizer.replace(":", "") if size or tokenizer == "bytes" else load_tokenizer(tokenizer).hash[:12]
    name = f"{source.description['hash'][:12]}-{name}-v{layout.FORMAT_VERSION}"
    folder = cache_folder() / f"stdlib-{source.description['python']}-{name}"
    try:
        return prepare_corpus(STDLIB, folder, tokenizer=tokenizer, eval_fraction=0.05)
    except FileExistsError:
        raise
    except OSError as error:  # a home folder that cannot be written, a full disk
        raise OSError(f"{folder}: cannot be made ({error}); set XDG_CACHE_HOME to a folder you can write") from None


def _beside(folder: Path, what: str) -> Path:
    return folder.parent / f".{folder.name}.{what}-{secrets.token_hex(4)}"


def _same(folder: Path, settings: dict[str, Any], on_error: str) -> Corpus:
    try:
        corpus = load_corpus(folder)
    except (ValueError, OSError) as error:
        raise FileExistsError(f"{folder}: holds a damaged corpus ({error}); delete it, or use --force") from None
    if corpus.manifest["settings"] == settings:
        if (count := corpus.manifest.get("left_out_on_error")) and on_error == "stop":
            raise FileExistsError(
                f"{folder}: holds a corpus that left out {count} documents or files; give --on_error skip again, "
                "choose another folder, or replace it with --force"
            )
        return corpus
    made = corpus.manifest["settings"]
    different = [name for name in {**settings, **made} if made.get(name) != settings.get(name)]
    raise FileExistsError(
        f"{folder}: holds a corpus made with another {' and '.join(different)}; "
        "choose another folder, or --force to replace it"
    )


def _move(partial: Unfinished, folder: Path, settings: dict[str, Any], on_error: str, force: bool) -> Corpus:
    if force and folder.exists():
        old = _beside(folder, "old")
        os.replace(folder, old)
        partial.move(folder)
        shutil.rmtree(old)
        return load_corpus(folder)
    try:
        partial.move(folder)  # onto nothing or an empty folder
    except OSError:
        if not (folder / layout.MANIFEST_FILE).exists():
            raise
        return _same(folder, settings, on_error)  # another process was first
    return load_corpus(folder)


def _fraction(digest_part: bytes) -> float:
    return int.from_bytes(digest_part[:6], "little") / 2**48


def _in_eval(digest: bytes, eval_fraction: float) -> bool:
    return _fraction(digest[:8]) < eval_fraction


def _learnt(partial: Path, source: Source, size: int, eval_fraction: float, skip: bool, progress: bool) -> Tokenizer:
    """The BPE tokenizer that this preparation learnt before it was cut short, or else learns now."""
    path = partial / layout.TOKENIZER_FILE
    if not path.exists():
        draft = partial / f"{layout.TOKENIZER_FILE}.tmp"
        _learn_bpe(partial, source, size, eval_fraction, skip, progress).save(draft)
        os.replace(draft, path)
    return load_tokenizer(path)


def _learn_bpe(partial: Path, source: Source, size: int, eval_fraction: float, skip: bool, progress: bool) -> Tokenizer:
    share = BPE_TRAINING_BYTES / max(source.size, 1)

    def chosen(digest: bytes) -> bool:
        return not _in_eval(digest, eval_fraction) and _fraction(digest[8:]) < share

    def long_text(unit: LongUnit) -> Iterator[Iterator[str] | Unreadable]:
        # Whether BPE is learnt from this text is known only at its end, when its hash is.
        digest = new_digest()
        with tempfile.TemporaryFile("w+", dir=partial, encoding="utf-8", newline="") as file:
            try:
                for part in unit.parts:
                    digest.update(part.encode("utf-8"))
                    file.write(part)
            except Unreadable as error:
                yield error
                return
            if chosen(digest.digest()):
                file.seek(0)
                yield iter(lambda: file.read(2**18), "")

    def texts(advance: Any) -> Iterator[str | Iterator[str]]:
        for unit in source.units():
            found = long_text(unit) if isinstance(unit, LongUnit) else unit.documents()
            for text in found:
                if not isinstance(text, Unreadable):
                    if not isinstance(text, str) or chosen(digest_of(text.encode("utf-8"))):
                        yield text
                elif not skip:
                    raise text
            advance(unit.size)

    with _progress(progress, f"learning {size} tokens", source.size) as advance:
        return train_bpe(texts(advance), size)


def _write(
    folder: Path,
    source: Source,
    tokenizer: Tokenizer,
    form: ChatFormat | None,
    settings: dict[str, Any],
    workers: int,
    skip: bool,
    progress: bool,
) -> None:
    tokenizer.save(folder / layout.TOKENIZER_FILE)
    journal = Journal(folder)
    units = itertools.islice(source.units(), journal.units, None)
    count, size, since = journal.units, journal.size, 0
    with contextlib.ExitStack() as stack, _progress(progress, "tokenizing", source.size) as advance:
        writers = {
            name: stack.enter_context(contextlib.closing(SplitWriter(folder, name, journal.splits.get(name))))
            for name in layout.SPLITS
        }
        left_out = stack.enter_context(contextlib.closing(LeftOut(folder, journal.left_out)))
        if not journal.units:
            left_out.add(f"{name}: {why}" for name, why in source.left_out)
        advance(size, sum(state["documents"] for state in journal.splits.values()))
        for unit in tokenize_units(tokenizer, units, workers, folder, skip, form):
            for document in unit.documents():
                name = "eval" if _in_eval(document.digest, settings["eval_fraction"]) else "train"
                writers[name].add(*document)
            left_out.add(unit.left_out)
            advance(unit.size, len(unit.lengths))
            count, size, since = count + 1, size + unit.size, since + sum(unit.lengths) * unit.dtype.itemsize
            if since >= shards.SHARD_BYTES:  # the places of checkpoints do not depend on interruptions
                states = {name: writer.checkpoint() for name, writer in writers.items()}
                journal.write(count, size, states, left_out.checkpoint())
                since = 0
    splits = {name: writer.finish() for name, writer in writers.items()}
    if not splits["train"]["documents"]:
        found = splits["eval"]["documents"]
        why = f"all {found} documents are in split eval; lower --eval_fraction" if found else "no document with text"
        raise NotAsLeft(f"{settings['source'].get('path', STDLIB)}: {why}")
    kinds = [tokenizer.hash, *(splits[name]["documents_hash"] for name in layout.SPLITS)]
    manifest = {
        "format": layout.FORMAT,
        "format_version": layout.FORMAT_VERSION,
        "tokenizer": {"kind": tokenizer.kind, "vocab_size": tokenizer.vocab_size, "hash": tokenizer.hash},
        "settings": settings,
        "token_dtype": token_dtype(tokenizer).str,
        **({"loss_mask": True} if form else {}),
        "splits": splits,
        "source_files_left_out": len(source.left_out),
        **({"left_out_on_error": on_error} if (on_error := left_out.lines - len(source.left_out)) else {}),
        "content_hash": hashlib.sha256("\n".join(kinds).encode()).hexdigest(),
    }
    manifest["manifest_hash"] = layout.manifest_hash(manifest)
    (folder / layout.MANIFEST_FILE).write_text(json.dumps(manifest, indent=1) + "\n")
    journal.remove()


@contextlib.contextmanager
def _progress(show: bool, title: str, total: int) -> Iterator[Any]:
    """Yields a function advance(bytes, documents=0) that moves the progress bar."""
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
