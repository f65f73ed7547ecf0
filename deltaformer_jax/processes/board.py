"""A few bytes that parent and child share: for how long the child's main thread may stay where it is.

The child writes at each change, without a call to the system; the parent reads when it likes. The clock is that of the
host, which both see.
"""

from __future__ import annotations

import mmap
import struct
import time

_FORMAT = struct.Struct("<dd64s")
SIZE = _FORMAT.size


class Board:
    """`file`: the descriptor of a file of SIZE bytes, which both processes have open."""

    def __init__(self, file: int):
        self._bytes = mmap.mmap(file, SIZE)

    def write(self, doing: str, limit: float) -> None:
        """The main thread begins `doing`, and is to write again within `limit` seconds (0: at any time)."""
        _FORMAT.pack_into(self._bytes, 0, time.monotonic(), limit, doing.encode()[:64])

    def read(self) -> tuple[str, float, float]:
        """(doing, the seconds since it was written, the limit)."""
        since, limit, doing = _FORMAT.unpack_from(self._bytes)
        return doing.rstrip(b"\0").decode(errors="replace"), time.monotonic() - since, limit
