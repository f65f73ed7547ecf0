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

import numpy as np

from deltaformer_jax.data.corpus import TOKENIZER_FILE
from deltaformer_jax.data.sources import Unit
from deltaformer_jax.data.tokenizer import Tokenizer, load_tokenizer


@dataclasses.dataclass
class TokenizedUnit:
    """A unit's documents, without the empty ones.

    tokens: all of them, end to end, in the dtype of `token_dtype`; lengths, text_bytes (UTF-8) and digests have an
    entry for each document. size: the unit's bytes of source.
    """

    size: int
    tokens: np.ndarray
    lengths: list[int]
    text_bytes: list[int]
    digests: list[bytes]


def token_dtype(tokenizer: Tokenizer) -> np.dtype:
    """Little-endian uint16, or uint32 above 65,536 ids."""
    return np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")


def digest_of(text: bytes) -> bytes:
    """16 bytes that name a text: they decide its split, and whether BPE is learnt from it."""
    return hashlib.blake2b(text, digest_size=16).digest()


def tokenize_unit(tokenizer: Tokenizer, unit: Unit) -> TokenizedUnit:
    arrays, text_bytes, digests = [], [], []
    for text in unit.documents():
        tokens = tokenizer.encode_array(text).astype(token_dtype(tokenizer))
        if not len(tokens):
            continue
        encoded = text.encode("utf-8")
        arrays.append(tokens)
        text_bytes.append(len(encoded))
        digests.append(digest_of(encoded))
    tokens = np.concatenate(arrays) if arrays else np.zeros(0, token_dtype(tokenizer))
    return TokenizedUnit(unit.size, tokens, [len(array) for array in arrays], text_bytes, digests)


def tokenize_units(tokenizer: Tokenizer, units: Iterable[Unit], workers: int) -> Iterator[TokenizedUnit]:
    """`tokenize_unit` of each unit, in order, in this process (workers 1) or `workers` new ones.

    Reads at most 2 workers + 1 units ahead of its consumer. What a unit raises is raised here; ChildProcessError if a
    process dies.
    """
    if workers == 1:
        for unit in units:
            yield tokenize_unit(tokenizer, unit)
        return
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / TOKENIZER_FILE)
        tokenizer.save(file)
        pool = concurrent.futures.ProcessPoolExecutor(
            workers, multiprocessing.get_context("spawn"), initializer=_start_worker, initargs=(file,)
        )
        waiting: collections.deque = collections.deque()
        others = set(multiprocessing.active_children())
        try:
            for unit in units:
                with _keyboard_held():  # the first one starts the processes
                    waiting.append(pool.submit(_work, unit))
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


def _work(unit: Unit) -> TokenizedUnit:
    return tokenize_unit(_worker_tokenizer, unit)
