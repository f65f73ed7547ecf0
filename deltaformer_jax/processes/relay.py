"""The child's stderr, passed on by its parent, which can hold back what a child writes because another one is lost.

When a process is lost, jax's client in the others writes a fatal error with the stack of a C++ program and aborts. It
does so within milliseconds, before anybody knows which process it was. From the first line of such an error everything
is held, until there is a verdict: then it goes to the file of the stacks, or else to stderr after all.
"""

from __future__ import annotations

import os
import re

_FATAL = re.compile(rb"^(F\d{4} |[EW]\d{4} .*coordination_service)", re.MULTILINE)
# What jax's coordinator says, and then the process itself, if another one comes with the number of one that is there.
_TWICE = re.compile(rb"\b(\d+) unexpectedly tried to connect with a different incarnation|( barrier call .*same task)")


class Relay:
    """`reader` is the end of a pipe whose other end is the child's stderr."""

    def __init__(self, reader: int):
        os.set_blocking(reader, False)
        self._reader = reader
        self.held = b""
        self.ended = False

    def fileno(self) -> int:
        return self._reader

    def turn(self) -> None:
        """Pass on what is there."""
        while not self.ended:
            try:
                read = os.read(self._reader, 65536)
            except BlockingIOError:
                return
            self.ended = not read
            fatal = _FATAL.search(read)
            if self.held or fatal:
                cut = 0 if self.held else fatal.start()
                self.held += read[cut:]
                read = read[:cut]
            _write(read)

    def came_twice(self, index: int) -> int | None:
        """The number that two processes have, if that is why the child of process `index` was aborted."""
        found = _TWICE.search(self.held)
        return found and int(found.group(1) or index)

    def let_go(self) -> None:
        """What was held is passed on."""
        self.turn()
        _write(self.held)
        self.held = b""


def _write(text: bytes) -> None:
    while text:
        try:
            text = text[os.write(2, text) :]
        except OSError:  # nobody reads our stderr
            return
