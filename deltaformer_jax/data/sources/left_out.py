"""left_out.txt of a corpus: one line for each file or document that was not read, with the reason."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

LEFT_OUT_FILE = "left_out.txt"


class LeftOut:
    """Appends to left_out.txt in `folder`. `checkpoint`: (lines, bytes) from the method, to continue after."""

    def __init__(self, folder: Path, checkpoint: tuple[int, int] = (0, 0)):
        self.lines, size = checkpoint
        self._path = folder / LEFT_OUT_FILE
        self._file = open(self._path, "ab")
        self._file.truncate(size)

    def add(self, lines: Iterable[str]) -> None:
        for line in lines:
            self._file.write((" ".join(line.split()) + "\n").encode("utf-8", "backslashreplace"))
            self.lines += 1

    def checkpoint(self) -> tuple[int, int]:
        self._file.flush()
        os.fsync(self._file.fileno())
        return self.lines, os.fstat(self._file.fileno()).st_size

    def close(self) -> None:
        self._file.close()
        if not self.lines:
            self._path.unlink(missing_ok=True)
