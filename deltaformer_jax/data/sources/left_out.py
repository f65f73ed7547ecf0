"""What a preparation did not read, and why: a line each in left_out.txt of the corpus."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

LEFT_OUT_FILE = "left_out.txt"


class LeftOut:
    """Appends to `folder`'s left_out.txt; goes on after `checkpoint`, (lines, bytes) that the method returned."""

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
