"""Tokenizes units of source text, in order, in this process or in several."""

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

from deltaformer_jax.data.chat import ChatFormat, Encoder
from deltaformer_jax.data.corpus import PIECE, TOKENIZER_FILE, record_of
from deltaformer_jax.data.sources import LongUnit, Unit, Unreadable
from deltaformer_jax.data.tokenizer import Tokenizer, load_tokenizer


class Document(NamedTuple):
    """A tokenized document. pieces: arrays of PIECE tokens each and a last one with the rest. length: its tokens.

    If the documents have a mask, the pieces are bytes, uint8, the tokens and then the mask's bits (`record_of`).

    text_bytes: the length of its UTF-8. digest: `digest_of` its text.
    """

    pieces: Iterable[np.ndarray]
    length: int
    text_bytes: int
    digest: bytes


@dataclasses.dataclass
class TokenizedUnit:
    """The documents of a unit, without empty ones and those that cannot be read.

    tokens: the tokens of all documents, end to end, in `dtype` (see `token_dtype`); or an open file of them, which is
    closed when the next unit is requested. lengths, text_bytes (UTF-8) and digests have one entry per document.
    size: the unit's bytes of source. left_out: messages about what could not be read. mask: of conversations, bool
    [tokens], True at the tokens of answers.
    """

    size: int
    tokens: np.ndarray | BinaryIO
    lengths: list[int]
    text_bytes: list[int]
    digests: list[bytes]
    left_out: list[str]
    dtype: np.dtype
    mask: np.ndarray | None = None

    def documents(self) -> Iterator[Document]:
        start = 0
        for length, text_bytes, digest in zip(self.lengths, self.text_bytes, self.digests):
            yield Document(self._pieces(start, start + length), length, text_bytes, digest)
            start += length

    def _pieces(self, start: int, stop: int) -> Iterable[np.ndarray]:
        if self.mask is not None:
            ends = [(first, min(first + PIECE, stop)) for first in range(start, stop, PIECE)]
            return [record_of(self.tokens[first:end], self.mask[first:end]) for first, end in ends]
        if isinstance(self.tokens, np.ndarray):
            return [self.tokens[first : min(first + PIECE, stop)] for first in range(start, stop, PIECE)]
        sizes = (min(PIECE, stop - first) * self.dtype.itemsize for first in range(start, stop, PIECE))
        return (np.frombuffer(self.tokens.read(size), self.dtype) for size in sizes)


def token_dtype(tokenizer: Tokenizer) -> np.dtype:
    """Little-endian uint16, or uint32 above 65,536 ids."""
    return np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")


def digest_of(text: bytes) -> bytes:
    """The hash of a text, 16 bytes. It decides the split of the text, and whether BPE is learnt from it."""
    return new_digest(text).digest()


def new_digest(text: bytes = b"") -> Any:
    return hashlib.blake2b(text, digest_size=16)


def tokenize_unit(
    tokenizer: Tokenizer, unit: Unit, skip: bool = False, encoder: Encoder | None = None
) -> TokenizedUnit:
    """The unit, tokenized. A document that cannot be read raises Unreadable or, with `skip`, is named in left_out.

    `encoder`: of conversations, if the documents are such.
    """
    if encoder is not None:
        return _tokenize_conversations(tokenizer, unit, skip, encoder)
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


def _tokenize_conversations(tokenizer: Tokenizer, unit: Unit, skip: bool, encoder: Encoder) -> TokenizedUnit:
    dtype, found, left_out = token_dtype(tokenizer), [], []
    for conversation in unit.documents():
        try:
            if isinstance(conversation, Unreadable):
                raise conversation
            found.append(encoder.encode(conversation))
        except Unreadable as error:
            if not skip:
                raise
            left_out.append(str(error))
    tokens = np.concatenate([np.zeros(0, dtype), *(one.tokens.astype(dtype) for one in found)])
    mask = np.concatenate([np.zeros(0, bool), *(one.mask for one in found)])
    lengths, sizes = [len(one.tokens) for one in found], [one.text_bytes for one in found]
    digests = [digest_of(one.text) for one in found]
    return TokenizedUnit(unit.size, tokens, lengths, sizes, digests, left_out, dtype, mask)


def _tokenize_long(tokenizer: Tokenizer, unit: LongUnit, file: BinaryIO, skip: bool) -> TokenizedUnit:
    """As `tokenize_unit`, for one long document, whose tokens are written to `file`."""
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
    tokenizer: Tokenizer,
    units: Iterable[Unit | LongUnit],
    workers: int,
    folder: Path,
    skip: bool = False,
    form: ChatFormat | None = None,
) -> Iterator[TokenizedUnit]:
    """`tokenize_unit` of each unit, in order, in this process (`workers` 1) or in `workers` new processes.

    `form`: of conversations, if the documents are such.

    Reads at most 2 workers + 1 units ahead. A LongUnit is tokenized in this process, with files in `folder`, after all
    units before it have been yielded. Exceptions of a unit are raised here. Raises ChildProcessError if a process dies.
    """
    if workers == 1:
        encoder = Encoder(tokenizer, form) if form else None
        for unit in units:
            if isinstance(unit, LongUnit):
                with tempfile.TemporaryFile(dir=folder) as tokens:
                    yield _tokenize_long(tokenizer, unit, tokens, skip)
            else:
                yield tokenize_unit(tokenizer, unit, skip, encoder)
        return
    with tempfile.TemporaryDirectory() as copy:
        file = str(Path(copy) / TOKENIZER_FILE)
        tokenizer.save(file)
        pool = concurrent.futures.ProcessPoolExecutor(
            workers, multiprocessing.get_context("spawn"), initializer=_start_worker, initargs=(file, form)
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
                with _keyboard_held():  # the first call starts the processes
                    waiting.append(pool.submit(_work, unit, skip))
                if len(waiting) > 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except concurrent.futures.process.BrokenProcessPool:
            raise ChildProcessError("a worker process died (out of memory?); try fewer --workers") from None
        except BaseException:
            # An interruption or the error of a unit. The others may take minutes, and their results are not needed.
            for worker in set(multiprocessing.active_children()) - others:
                worker.terminate()
            raise
        finally:
            pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _keyboard_held() -> Iterator[None]:
    """Blocks SIGINT. Processes started meanwhile keep it blocked, so that only their parent handles Ctrl-C."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_worker_tokenizer: Tokenizer | None = None
_worker_encoder: Encoder | None = None


def _start_worker(tokenizer_file: str, form: ChatFormat | None) -> None:
    global _worker_tokenizer, _worker_encoder
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker_tokenizer = load_tokenizer(tokenizer_file)
    _worker_encoder = Encoder(_worker_tokenizer, form) if form else None


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _work(unit: Unit, skip: bool) -> TokenizedUnit:
    return tokenize_unit(_worker_tokenizer, unit, skip, _worker_encoder)
