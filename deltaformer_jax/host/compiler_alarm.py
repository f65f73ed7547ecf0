"""XLA's banner "Very slow compile? If you want to file a bug ...", kept off stderr; all else written there stays.

XLA logs it, as an error, two minutes into any compilation. Neither the time nor the message has a setting, and the log
level that hides it (TF_CPP_MIN_LOG_LEVEL=3) hides XLA's real errors too. So stderr goes through a filter, a process of
its own, which passes on what is in the pipe even when this process crashes.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator

AFTER = 100.0  # seconds of compiling before stderr is filtered: shorter compilations keep it as it is

_HEAD = re.compile(rb"slow_operation_alarm\.cc:\d+\] *(The operation took .*)?$")


@contextlib.contextmanager
def without_alarm() -> Iterator[None]:
    """Around a compilation."""
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
            start_new_session=True,  # Ctrl-C is for the program, which may still have something to say
        )
    except OSError:  # no process to be had: the banner is the smaller trouble
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
        with contextlib.suppress(subprocess.TimeoutExpired):  # a process begun meanwhile may hold the pipe, too
            filter.wait(timeout=5)


def without_banner(lines: Iterable[bytes]) -> Iterator[bytes]:
    """The lines but those of the banner: a head, a line of stars, the message, a line of stars."""
    held: list[bytes] = []  # a head, and what is empty below it, until the next line tells what it is the head of
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
