"""Removes XLA's banner "Very slow compile? If you want to file a bug ..." from stderr, and nothing else.

XLA logs the banner, as an error, two minutes into any compilation. Neither the time nor the message has a setting, and
the log level that hides it (TF_CPP_MIN_LOG_LEVEL=3) also hides XLA's real errors. So stderr goes through a filter. The
filter is a separate process: it passes on what is in the pipe even if this process crashes.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator

AFTER = 100.0  # seconds of compiling before stderr is filtered; shorter compilations write to stderr directly

_HEAD = re.compile(rb"slow_operation_alarm\.cc:\d+\] *(The operation took .*)?$")


@contextlib.contextmanager
def without_alarm() -> Iterator[None]:
    """A context for a compilation: without XLA's banner on stderr."""
    guard, filters = threading.Lock(), contextlib.ExitStack()

    def begin() -> None:
        with guard:
            if not over.is_set():
                filters.enter_context(_filtered())

    over, timer = threading.Event(), threading.Timer(AFTER, begin)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        with guard:
            over.set()
            filters.close()


@contextlib.contextmanager
def _filtered() -> Iterator[None]:
    try:
        filter = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__],
            stdin=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C must not end the filter: the program may still write
        )
    except OSError:  # no process can be started: accept the banner
        yield
        return
    stderr = os.dup(2)
    os.dup2(filter.stdin.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        filter.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):  # another process started meanwhile may hold the pipe open
            filter.wait(timeout=5)


def without_banner(lines: Iterable[bytes]) -> Iterator[bytes]:
    """The lines without those of the banner, which is a head, a line of stars, the message, a line of stars."""
    # A possible head and the empty lines below it, held until the next line decides whether a banner follows.
    held: list[bytes] = []
    inside = False
    for line in lines:
        text = line.strip()
        stars = text != b"" and not text.strip(b"*")
        if _HEAD.search(text):
            yield from held
            held, inside = [line], False
        elif held and not text:
            held.append(line)
        elif held and stars:
            held, inside = [], True
        elif inside and (stars or b"Very slow compile?" in text):
            inside = not stars
        else:
            yield from held
            yield line
            held, inside = [], False
    yield from held


if __name__ == "__main__":
    for line in without_banner(sys.stdin.buffer):
        os.write(2, line)
