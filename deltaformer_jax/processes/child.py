"""The side of the program that a supervisor started: its place, where it is in its work, its last words, its stacks.

Without a supervisor, in a run of one process, every function here returns at once and does nothing.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import queue
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from deltaformer_jax.processes.board import Board
from deltaformer_jax.processes.lines import Lines
from deltaformer_jax.processes.place import Place

VARIABLE = "DELTAFORMER_SUPERVISED"  # what the parent hands down, as JSON
STACKS = signal.SIGUSR2  # writes the stacks of all threads
STACKS_FOLDER = "stacks"  # of the workdir; what a lost run leaves there
PR_SET_PDEATHSIG = 1

# Seconds for which the main thread may stay at one place before it counts as hanging: anywhere in the training loop, or
# reading or writing a file there. Compiling, saving, evaluating and waiting for the other processes have no limit.
TRAINING, FILES = 20.0, 300.0
# How long an error that may come from the loss of another process waits for the verdict that names that process.
VERDICT_SECONDS = 5.0


class _Link:
    """What a supervised child has: the socket to its parent, the board, and who wants its signals."""

    def __init__(self, given: dict[str, Any]):
        devices = given["place"]["devices"]
        self.place = Place(**given["place"] | {"devices": devices and tuple(devices)})
        self.board = Board(given["board"])
        self.now = "starting", 0.0  # as on the board
        self.met = False  # the processes
        self.stacks = given["stacks"]
        self.parent = Lines(socket.socket(fileno=given["socket"]))
        self.listens: queue.SimpleQueue = queue.SimpleQueue()  # where the parent of process 0 does
        self.on_signal: Callable[[int], Any] = lambda number: os._exit(128 + number)
        if sys.platform == "linux":
            import ctypes  # here, since a process without a supervisor does without

            ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != given["parent"]:  # it died before that
            os._exit(1)
        faulthandler.register(STACKS, file=self.stacks, all_threads=True)
        threading.Thread(target=self._listen, daemon=True, name="supervisor").start()

    def _listen(self) -> None:
        while (messages := self.parent.receive()) is not None:
            for message in messages:
                if "signal" in message:
                    self.on_signal(message["signal"])
                elif "port" in message:
                    self.listens.put((message["port"], message["token"]))
                else:  # the run is over: what is still said goes to the file of the stacks
                    os.dup2(self.stacks, 1)
                    os.dup2(self.stacks, 2)
        os._exit(1)  # the parent is gone


_link: _Link | None = None


def supervised() -> Place | None:
    """The place that the supervisor gave this process; None without a supervisor. The first call opens the link."""
    global _link
    if _link is None and VARIABLE in os.environ:
        # Programs that this one starts are no children of the supervisor.
        _link = _Link(json.loads(os.environ.pop(VARIABLE)))
    return None if _link is None else _link.place


def at(doing: str, limit: float) -> None:
    """The main thread begins `doing`, for at most `limit` seconds; 0: for as long as it takes."""
    if _link is not None:
        _link.now = doing, limit
        _link.board.write(doing, limit)


@contextlib.contextmanager
def taking_time(doing: str) -> Iterator[None]:
    """A part of the work that may take long, such as saving. Afterwards the limit before counts again, from then on."""
    if _link is None:
        yield
        return
    before = _link.now
    at(doing, 0)
    try:
        yield
    finally:
        at(*before)


def tell(**message: Any) -> None:
    if _link is not None:
        _link.parent.send(**message)


def where_the_parent_listens() -> Any:
    """(port, token) of the hub, for process 0 to tell the others; None without a supervisor."""
    if _link is None:
        return None
    tell(connecting=True)
    return _link.listens.get()


def connected(hub: Any) -> None:
    """The processes have met; `hub` is what process 0 told by `where_the_parent_listens`."""
    if _link is not None:
        _link.met = True
    tell(connected=hub)


@contextlib.contextmanager
def forwarded(to: Callable[[int], Any]) -> Iterator[None]:
    """Signals that the parent forwards call to(number), in another thread. Outside they end the process."""
    if _link is None:
        yield
        return
    before, _link.on_signal = _link.on_signal, to
    try:
        yield
    finally:
        _link.on_signal = before


@contextlib.contextmanager
def perhaps_of_another(*kinds: type[BaseException]) -> Iterator[None]:
    """Errors of these kinds may come from the loss of another process: its name is awaited before they are raised.

    If it comes, the parent ends this process, and its line is the only one.
    """
    try:
        yield
    except kinds:
        _await_verdict()
        raise


@contextlib.contextmanager
def last_words(meet: Callable[[], Any]) -> Iterator[None]:
    """The whole program of a child: if it fails, the parent is told why, and ends the other processes too.

    If it fails before the processes have met, as where a file is missing on one host, the others wait for it: then
    meet() is called, by which it comes to them all the same, and they hear of it.
    """
    if _link is None:
        yield
        return
    try:
        yield
    except SystemExit as stopped:
        if stopped.code not in (None, 0):
            _fail(stopped.__context__ or stopped, stopped.code if isinstance(stopped.code, int) else 1, meet)
        raise
    except BaseException as error:
        _await_verdict()
        traceback.print_exc()
        _fail(error, 1, meet)


def _await_verdict() -> None:
    if _link is not None:
        at("failing", 0)
        time.sleep(VERDICT_SECONDS)


def _fail(error: BaseException, code: int, meet: Callable[[], Any]) -> None:
    """Never returns: the parent, once told, ends this process. Leaving by itself, it would wait for the others."""
    sys.stdout.flush()
    sys.stderr.flush()
    text = " ".join(str(error).split()) or type(error).__name__
    words = {"failed": text[:1000], "code": code}
    if _link is not None and not _link.met:
        tell(**words, early=True)
        with contextlib.suppress(Exception):  # such as jax, which is not installed
            meet()
    tell(**words)
    at("failing", 0)
    time.sleep(60)
    os._exit(code)
