"""SIGINT and SIGTERM: the first signal asks the run to finish its step and save, the second stops it at once."""

import collections
import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator


class Interruption:
    """`with Interruption() as stop:` ... `if stop.requested: ...`. Outside the main thread `requested` stays False.

    Python runs signal handlers between bytecodes, so a handler would wait for a compilation of minutes. Python's
    wake-up socket is written at once, and a separate thread reads it. `doing`: the text printed on the first signal.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, doing: str = "finishing this step, then saving"):
        self.requested = False
        self._doing = doing
        self._received: collections.Counter[str] = collections.Counter()

    def __enter__(self) -> "Interruption":
        self._active = threading.current_thread() is threading.main_thread()
        if not self._active:
            return self
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._old_handlers = {number: signal.signal(number, lambda *_: None) for number in self.SIGNALS}
        self._old_fd = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._watcher = threading.Thread(target=self._watch, daemon=True, name="signals")
        self._watcher.start()
        return self

    def __exit__(self, *_) -> None:
        if not self._active:
            return
        signal.set_wakeup_fd(self._old_fd)
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)
        self._writer.close()  # the thread then reads the end of the stream and returns
        self._watcher.join(timeout=1.0)  # with a timeout, since stderr may be a pipe that nobody reads

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """In the block signals end the process at once, also while the main thread is in a call that is not Python."""
        if not self._active:
            yield
            return
        ours = {number: signal.signal(number, signal.SIG_DFL) for number in self.SIGNALS}
        try:
            yield
        finally:
            for number, handler in ours.items():
                signal.signal(number, handler)

    def _watch(self) -> None:
        with self._reader:
            while number := self._reader.recv(1):
                if number[0] in self.SIGNALS:
                    self.receive(number[0])

    def receive(self, number: int, way: str = "this process") -> None:
        """A signal has come. One that was sent to a supervisor too comes in two ways: it is the second in neither."""
        self._received[way] += 1
        if self._received[way] > 1:
            if sys.stdout.isatty():
                os.write(1, b"\x1b[?25h\n")  # the progress bar hides the cursor
            os._exit(128 + number)
        if self.requested:
            return
        self.requested = True
        os.write(2, f"\n{self._doing}; interrupt once more to stop at once\n".encode())
