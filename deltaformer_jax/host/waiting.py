"""Messages of a program while something takes long."""

from __future__ import annotations

import contextlib
import itertools
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

Step = TypeVar("Step")

AFTER = 1.5  # seconds before the first message, so that it comes within two
AGAIN = (10.0, 30.0, 60.0)  # seconds of the next messages; after the last of them one every minute


def say(text: str) -> None:
    """Print a line on stdout at once, even if that is a file or a pipe."""
    print(text, flush=True)


def say_aside(text: str) -> None:
    """Print a line on stderr, for programs whose stdout is their result."""
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def waiting(reason: str, note: Callable[[str], Any]) -> Iterator[None]:
    """Call `note` with `reason` if the block takes longer than AFTER, and again with the seconds so far.

    A separate thread makes these calls, while the block keeps the main thread busy, in Python or in a compiler.
    """
    start, over = time.monotonic(), threading.Event()

    def watch() -> None:
        if over.wait(AFTER):
            return
        note(f"{reason} ...")
        for due in _due():
            if over.wait(start + due - time.monotonic()):
                return
            note(f"{reason}: {due:.0f} s so far")

    watcher = threading.Thread(target=watch, daemon=True, name="waiting")
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()


def begun(steps: Iterator[Step], count: int, reason: str, note: Callable[[str], Any]) -> Iterator[Step]:
    """`steps`, of which the first `count`, which take long, are made at once under `waiting(reason, note)`."""
    with waiting(reason, note):
        first = list(itertools.islice(steps, count))
    return itertools.chain(first, steps)


def _due() -> Iterator[float]:
    yield from AGAIN
    due = AGAIN[-1]
    while True:
        due += 60.0
        yield due
