"""Records of an ArrayRecord file in an object store, read by ranges: a host reads what its rows need.

The file's own reader takes local files only. So there is a local file of the same size, empty (sparse) but for the
index at its end and the pages that hold the records asked for, and the reader reads that: it checks each record's hash.

The layout, as far as it is read here: blocks of 64 KiB, each begun by 24 bytes that are not part of what is stored. In
what is left lie chunks: a header of 40 bytes, and the records, after their lengths. The chunk that the last block
begins with holds the place of the index; the index is a chunk with a small protocol buffer for each other chunk, whose
first field is its place. `SplitWriter` makes one chunk of each record.
"""

from __future__ import annotations

import collections
import errno
import threading
from pathlib import Path
from typing import Any

import numpy as np

from deltaformer_jax.data.remote.store import Store

BLOCK, BLOCK_HEADER, CHUNK_HEADER = 2**16, 24, 40
PAGE = 2**15  # what is read at least
KEPT_BYTES = 2**33  # of pages on this host's disk, for each process; then those of the shards read first make room
READERS = 256  # a number of files that any process can have open
_DAMAGE = (RuntimeError, ValueError, IndexError)


def open_local(path: Path | str) -> Any:
    from array_record.python.array_record_module import ArrayRecordReader

    options = "readahead_buffer_size:0,max_parallelism:0"  # for random access
    return ArrayRecordReader(str(path), options, file_reader_buffer_size=PAGE)


class RemoteShard:
    """The file `name` of `store`, of `size` bytes. `read` as ArrayRecordReader has it. Thread-safe."""

    def __init__(self, store: Store, name: str, size: int):
        self._store, self._name, self._size = store, name, size
        self._lock = threading.Lock()
        self._places: np.ndarray | None = None  # of the records, and of the index behind them
        self._copy: _Copy | None = None
        self._copies = 0

    def read(self, begin: int, end: int) -> list[bytes]:
        """The records begin .. end - 1.

        Raises RuntimeError or ValueError if they are damaged or cut short, OSError if the store does not answer.
        """
        for last in (False, True):
            copy = self._take()
            try:
                self._fill(copy, int(self._places[begin]), int(self._places[end]), anew=last)
                return copy.reader().read(begin, end)
            except _DAMAGE:
                if last:
                    raise
                copy.close()  # the disk may have lost a page: everything once more
            except OSError as error:
                if last or error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                HELD.clear()
            finally:
                copy.leave()

    def _take(self) -> _Copy:
        """The copy that there is, or a new one with nothing but the index. It stays until `leave`."""
        with self._lock:
            if self._copy is None:
                index = self._store.pages / f"{self._name}.index"
                if self._places is None:
                    self._places, tail = self._read_index()
                    index.write_bytes(tail)
                self._copies += 1
                path = self._store.pages / f"{self._name}.{self._copies}"
                self._copy = _Copy(path, self._size, index.read_bytes())
            self._copy.enter()
            return self._copy

    def forget(self) -> None:
        with self._lock:
            copy, self._copy = self._copy, None
        if copy is not None:
            copy.leave()

    def _fill(self, copy: _Copy, start: int, stop: int, anew: bool) -> None:
        """Read the bytes start .. stop - 1 in whole pages, without those that are there, and neighbours at once."""
        missing = [page for page in range(start // PAGE, -(-stop // PAGE)) if anew or page not in copy.pages]
        while missing:
            many = next((i for i, page in enumerate(missing) if page != missing[0] + i), len(missing))
            first, missing = missing[0] * PAGE, missing[many:]
            content = self._store.read(self._name, first, min(first + many * PAGE, self._size))
            copy.write(first, content)
            HELD.filled(self, len(content))

    def _read_index(self) -> tuple[np.ndarray, bytes]:
        """(the places of the records and the index, int64 [records + 1]; the bytes from the index on)."""
        try:
            last = (self._size - 1) // BLOCK * BLOCK
            block = self._store.read(self._name, last, self._size)
            (postscript, *_) = _records(_chunk(block, last, last))
            place = int(_first_fields(postscript, np.zeros(1, np.int64))[0])
            if not 0 < place < last:
                raise ValueError(f"an index at byte {place}")
            tail = self._store.read(self._name, place, last) + block
            content, lengths = _split(_chunk(tail, place, place))
            # The first one is about the whole file.
            places = _first_fields(content, np.cumsum(lengths)[:-1])
        except (ValueError, IndexError) as error:
            raise ValueError(f"no index of its records at the end: {error}") from None
        return np.append(places, place), tail


class _Copy:
    """The local file: sparse, of `size` bytes, ending with `tail`. pages: the numbers of those that are there.

    It is deleted when the shard has left it and the last thread that reads.
    """

    def __init__(self, path: Path, size: int, tail: bytes):
        self.path, self.pages, self._reader = path, set(), None
        self._lock, self._users = threading.Lock(), 1
        with open(path, "wb") as file:
            file.truncate(size)
            file.seek(size - len(tail))
            file.write(tail)

    def write(self, place: int, content: bytes) -> None:
        with open(self.path, "r+b") as file:
            file.seek(place)
            file.write(content)
        self.pages.update(range(place // PAGE, -(-(place + len(content)) // PAGE)))

    def reader(self) -> Any:
        reader = self._reader
        if reader is None:
            reader = self._reader = open_local(self.path)
            HELD.opened(self)
        return reader

    def close(self) -> None:
        self._reader = None  # a thread that reads has its own reference

    def enter(self) -> None:
        with self._lock:
            self._users += 1

    def leave(self) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0:
                self.close()
                self.path.unlink()


class _Held:
    """What this process holds of all shards: readers that are open, and bytes on the disk. The oldest make room."""

    def __init__(self):
        self._lock = threading.Lock()
        self._readers: collections.OrderedDict[_Copy, None] = collections.OrderedDict()
        self._bytes: collections.OrderedDict[RemoteShard, int] = collections.OrderedDict()

    def opened(self, copy: _Copy) -> None:
        with self._lock:
            self._readers[copy] = None
            if len(self._readers) > READERS:
                self._readers.popitem(last=False)[0].close()

    def filled(self, shard: RemoteShard, count: int) -> None:
        with self._lock:
            self._bytes[shard] = self._bytes.get(shard, 0) + count
            full = sum(self._bytes.values()) > KEPT_BYTES
            oldest = self._bytes.popitem(last=False)[0] if full else None
        if oldest is not None:
            oldest.forget()

    def clear(self) -> None:
        with self._lock:
            shards = list(self._bytes)
            self._bytes.clear()
        for shard in shards:
            shard.forget()


HELD = _Held()


def _chunk(content: bytes, base: int, place: int) -> bytes:
    """What the chunk at `place` holds, without its header; content: the file's bytes from `base` on."""
    kept = bytearray()
    size, position = CHUNK_HEADER, place
    while len(kept) < size:
        if position % BLOCK == 0:
            position += BLOCK_HEADER
        stop = min(position + size - len(kept), position // BLOCK * BLOCK + BLOCK)
        part = content[position - base : stop - base]
        if len(part) < stop - position:
            raise ValueError("cut short")
        kept += part
        position = stop
        if len(kept) == size == CHUNK_HEADER:
            if kept[24:25] != b"r":
                raise ValueError(f"a chunk of type {bytes(kept[24:25])!r}")
            size += int.from_bytes(kept[8:16], "little")
    return bytes(kept[CHUNK_HEADER:])


def _records(chunk: bytes) -> list[bytes]:
    content, lengths = _split(chunk)
    ends = np.cumsum(lengths)
    return [content[end - length : end] for end, length in zip(ends, lengths)]


def _split(chunk: bytes) -> tuple[bytes, np.ndarray]:
    """(the records of a simple chunk one after the other, their lengths)."""
    compression, place = chunk[0:1], 1
    size, place = _number(chunk, place)
    lengths, content = chunk[place : place + size], chunk[place + size :]
    if compression == b"z":
        lengths, content = _decompressed(lengths), _decompressed(content)
    elif compression != b"\0":
        raise ValueError(f"compressed by {compression!r}")
    return content, _numbers(lengths)


def _decompressed(content: bytes) -> bytes:
    import pyarrow

    size, place = _number(content, 0)
    try:
        return pyarrow.decompress(content[place:], decompressed_size=size, codec="zstd", asbytes=True)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"zstd: {error}") from None


def _number(content: bytes, place: int) -> tuple[int, int]:
    """(the number in base 128 at `place`, the lowest digit first; the place behind it)."""
    value = shift = 0
    while True:
        digit = content[place]
        value |= (digit & 127) << shift
        place, shift = place + 1, shift + 7
        if digit < 128:
            return value, place


def _numbers(content: bytes) -> np.ndarray:
    """All numbers of `content`, int64: there may be hundreds of thousands."""
    digits = np.frombuffer(content, np.uint8)
    (ends,) = np.nonzero(digits < 128)
    return _at(digits, np.concatenate([[0], ends[:-1] + 1]) if len(ends) else ends)


def _first_fields(content: bytes, places: np.ndarray) -> np.ndarray:
    """Field 1, a number, of the messages at `places`: 0 if a message begins with another field."""
    digits = np.frombuffer(content, np.uint8)
    return np.where(digits[places] == 8, _at(digits, places + 1), 0)


def _at(digits: np.ndarray, places: np.ndarray) -> np.ndarray:
    values, going, shift = np.zeros(len(places), np.int64), np.ones(len(places), bool), 0
    while going.any() and shift < 63:
        here = digits[np.minimum(places + shift // 7, len(digits) - 1)].astype(np.int64)
        values |= np.where(going, (here & 127) << shift, 0)
        going &= here >= 128
        shift += 7
    return values
