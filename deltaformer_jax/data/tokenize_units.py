"""Units of source text into tokens, in order, by this process or by several."""

from __future__ import annotations

import collections
import concurrent.futures.process
import contextlib
import dataclasses
import hashlib
import multiprocessing
import os
import signal
import tempfile
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from deltaformer_jax.data.corpus import PIECE, TOKENIZER_FILE
from deltaformer_jax.data.sources import LongUnit, Unit, Unreadable
from deltaformer_jax.data.tokenizer import Tokenizer, load_tokenizer


class Document(NamedTuple):
    """`pieces`: its tokens, in arrays of PIECE and the rest. length: tokens; text_bytes: of UTF-8."""

    pieces: Iterable[np.ndarray]
    length: int
    text_bytes: int
    digest: bytes


@dataclasses.dataclass
class TokenizedUnit:
    """A unit's documents, without the empty ones and those that cannot be read.

    tokens: all of them, end to end, in `dtype`, that of `token_dtype`; or a file of them, there until the next unit is
    asked for. lengths, text_bytes (UTF-8) and digests have an entry for each document. size: the unit's bytes of
    source. left_out: what could not be read.
    """

    size: int
    tokens: np.ndarray | BinaryIO
    lengths: list[int]
    text_bytes: list[int]
    digests: list[bytes]
    left_out: list[str]
    dtype: np.dtype

    def documents(self) -> Iterator[Document]:
        start = 0
        for length, text_bytes, digest in zip(self.lengths, self.text_bytes, self.digests):
            yield Document(self._pieces(start, start + length), length, text_bytes, digest)
            start += length

    def _pieces(self, start: int, stop: int) -> Iterable[np.ndarray]:
        if isinstance(self.tokens, np.ndarray):
            return [self.tokens[first : min(first + PIECE, stop)] for first in range(start, stop, PIECE)]
        sizes = (min(PIECE, stop - first) * self.dtype.itemsize for first in range(start, stop, PIECE))
        return (np.frombuffer(self.tokens.read(size), self.dtype) for size in sizes)


def token_dtype(tokenizer: Tokenizer) -> np.dtype:
    """Little-endian uint16, or uint32 above 65,536 ids."""
    return np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")


def digest_of(text: bytes) -> bytes:
    """16 bytes that name a text: they decide its split, and whether BPE is learnt from it."""
    return new_digest(text).digest()


def new_digest(text: bytes = b"") -> Any:
    return hashlib.blake2b(text, digest_size=16)


def tokenize_unit(tokenizer: Tokenizer, unit: Unit, skip: bool = False) -> TokenizedUnit:
    """What cannot be read is raised, or with `skip` named in the result."""
    dtype = token_dtype(tokenizer)
    arrays, text_bytes, digests, left_out = [], [], [], []
    for text in unit.documents():
        if isinstance(text, Unreadable):
            if not skip:
                raise text
            left_out.append(str(text))
            continue
        tokens = tokenizer.encode_array(text).astype(dtype)
        if not len(tokens):
            continue
        encoded = text.encode("utf-8")
        arrays.append(tokens)
        text_bytes.append(len(encoded))
        digests.append(digest_of(encoded))
    tokens = np.concatenate(arrays) if arrays else np.zeros(0, dtype)
    return TokenizedUnit(unit.size, tokens, [len(array) for array in arrays], text_bytes, digests, left_out, dtype)


def _tokenize_long(tokenizer: Tokenizer, unit: LongUnit, file: BinaryIO, skip: bool) -> TokenizedUnit:
    """As `tokenize_unit`, one document, whose tokens are in `file` as long as that is open."""
    dtype, digest, text_bytes, length = token_dtype(tokenizer), new_digest(), 0, 0

    def parts() -> Iterator[str]:
        nonlocal text_bytes
        for part in unit.parts:
            encoded = part.encode("utf-8")
            digest.update(encoded)
            text_bytes += len(encoded)
            yield part

    left_out = []
    try:
        for tokens in tokenizer.encode_stream(parts()):
            file.write(tokens.astype(dtype).tobytes())
            length += len(tokens)
    except Unreadable as error:
        if not skip:
            raise
        length, left_out = 0, [str(error)]
    file.seek(0)
    entries = ([length], [text_bytes], [digest.digest()]) if length else ([], [], [])
    return TokenizedUnit(unit.size, file, *entries, left_out, dtype)


def tokenize_units(
    tokenizer: Tokenizer, units: Iterable[Unit | LongUnit], workers: int, folder: Path, skip: bool = False
) -> Iterator[TokenizedUnit]:
    """`tokenize_unit` of each unit, in order, in this process (workers 1) or `workers` new ones.

    Reads at most 2 workers + 1 units ahead of its consumer. A LongUnit is this process's own work, through files in
    `folder`, when all before it is out. What a unit raises is raised here; ChildProcessError if a process dies.
    """
    if workers == 1:
        for unit in units:
            if isinstance(unit, LongUnit):
                with tempfile.TemporaryFile(dir=folder) as tokens:
                    yield _tokenize_long(tokenizer, unit, tokens, skip)
            else:
                yield tokenize_unit(tokenizer, unit, skip)
        return
    with tempfile.TemporaryDirectory() as copy:
        file = str(Path(copy) / TOKENIZER_FILE)
        tokenizer.save(file)
        pool = concurrent.futures.ProcessPoolExecutor(
            workers, multiprocessing.get_context("spawn"), initializer=_start_worker, initargs=(file,)
        )
        waiting: collections.deque = collections.deque()
        others = set(multiprocessing.active_children())
        try:
            for unit in units:
                if isinstance(unit, LongUnit):
                    while waiting:
                        yield waiting.popleft().result()
                    with tempfile.TemporaryFile(dir=folder) as tokens:
                        yield _tokenize_long(tokenizer, unit, tokens, skip)
                    continue
                with _keyboard_held():  # the first one starts the processes
                    waiting.append(pool.submit(_work, unit, skip))
                if len(waiting) > 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except concurrent.futures.process.BrokenProcessPool:
            raise ChildProcessError("a worker process died (out of memory?); try fewer --workers") from None
        except BaseException:
            # An interruption, or a unit's error: what the others have begun may take minutes, and nobody wants it.
            for worker in set(multiprocessing.active_children()) - others:
                worker.terminate()
            raise
        finally:
            pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _keyboard_held() -> Iterator[None]:
    """Ctrl-C waits. Processes started meanwhile never see it: it is their parent that handles it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_worker_tokenizer: Tokenizer | None = None


def _start_worker(tokenizer_file: str) -> None:
    global _worker_tokenizer
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker_tokenizer = load_tokenizer(tokenizer_file)


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _work(unit: Unit, skip: bool) -> TokenizedUnit:
    return tokenize_unit(_worker_tokenizer, unit, skip)
