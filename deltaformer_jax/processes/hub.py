"""What the supervisors of a run tell one another, through that of process 0: beats, faults, and the one verdict.

Each supervisor has a connection to the hub and sends a beat every two seconds; so does the hub. A supervisor that finds
a fault tells the hub; the first fault is the verdict, which the hub sends to all. Whoever is silent for SILENT seconds,
or whose connection ends without a farewell, is lost.
"""

from __future__ import annotations

import contextlib
import secrets
import socket
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

from deltaformer_jax.processes.lines import Lines
from deltaformer_jax.processes.place import Place

BEAT = 2.0
SILENT = 15.0
JOINING = 20.0  # seconds in which the supervisors find the hub, once their children have met
SENDING = 2.0  # seconds that a message may take to leave


class Verdict(NamedTuple):
    """Why the run ends: `line` says it, `code` is the exit code, `index` the process at fault.

    lost: it was killed, hangs or does not answer, so that everyone's stacks are of interest. Else it said what it had.
    """

    line: str
    code: int
    index: int
    lost: bool = True


class Hub:
    """The side of process 0's supervisor. `port` and `token` are what the others need to join."""

    def __init__(self, place: Place):
        family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
        self._server = socket.create_server(("", 0), family=family, dualstack_ipv6=family == socket.AF_INET6)
        self._server.setblocking(False)
        self.port, self.token = self._server.getsockname()[1], secrets.token_hex(16)
        self._strangers: list[Lines] = []
        self._members: dict[int, tuple[Lines, str]] = {}
        self._heard: dict[int, float] = {}
        self._awaited = set(range(1, place.count))
        self._beat = 0.0

    def begin(self) -> None:
        """The children have met: from now on each of their supervisors is expected."""
        self._heard = {index: time.monotonic() + JOINING - SILENT for index in self._awaited}

    @property
    def all_left(self) -> bool:
        return not self._awaited

    def sockets(self) -> list[Any]:
        return [self._server, *self._strangers, *(lines for lines, _ in self._members.values())]

    def turn(self, ready: set[int]) -> Iterator[Verdict]:
        """Read from the descriptors that are `ready`, and look at the clock. Yields the faults that are found."""
        if self._server.fileno() in ready:
            with contextlib.suppress(OSError):
                connection, _ = self._server.accept()
                connection.settimeout(SENDING)
                self._strangers.append(Lines(connection))
        for lines in [lines for lines in self._strangers if lines.fileno() in ready]:
            self._strangers.remove(lines)
            hello, *rest = lines.receive() or [{}]
            if hello.get("token") == self.token and hello.get("index") in self._awaited:
                index, host = hello["index"], hello["host"]
                self._members[index] = lines, host
                yield from self._hear(index, rest)
            else:
                lines.close()
        for index, (lines, host) in list(self._members.items()):
            if lines.fileno() in ready:
                yield from self._read(index, lines, host)
        yield from self._look()

    def _read(self, index: int, lines: Lines, host: str) -> Iterator[Verdict]:
        messages = lines.receive()
        if messages is None:
            self._leave(index)
            yield Verdict(f"process {index} on {host} is gone: it was killed, or its host is down", 1, index)
            return
        yield from self._hear(index, messages)

    def _hear(self, index: int, messages: list[dict[str, Any]]) -> Iterator[Verdict]:
        self._heard[index] = time.monotonic()
        for message in messages:
            if "fault" in message:
                yield Verdict(*message["fault"])
            if "farewell" in message:
                self._leave(index)

    def _leave(self, index: int) -> None:
        self._awaited.discard(index)
        self._heard.pop(index, None)
        self._members.pop(index)[0].close()

    def _look(self) -> Iterator[Verdict]:
        now = time.monotonic()
        if now > self._beat + BEAT:
            self._beat = now
            self.tell(beat=True)
        for index, heard in self._heard.items():
            if now > heard + SILENT:
                host = f" on {self._members[index][1]}" if index in self._members else ""
                yield Verdict(f"process {index}{host} does not answer any more", 1, index)
                return

    def forgive(self) -> None:
        """This process itself was stopped for a while: what was not heard meanwhile does not count."""
        now = time.monotonic()
        self._heard = {index: max(heard, now) for index, heard in self._heard.items()}

    def tell(self, **message: Any) -> None:
        for lines, _ in self._members.values():
            lines.send(**message)


class Member:
    """The side of another supervisor."""

    def __init__(self, place: Place, host: str, port: int, token: str):
        self._place, self._address = place, (place.coordinator.rpartition(":")[0].strip("[]"), port)
        self._hello = {"token": token, "index": place.index, "host": host}
        self._lines: Lines | None = None
        self._begun = self._heard = time.monotonic()
        self._beat = self._tried = 0.0
        self._over = False

    def sockets(self) -> list[Any]:
        return [] if self._lines is None else [self._lines]

    def turn(self, ready: set[int]) -> Iterator[Verdict]:
        """As Hub.turn. The verdict of all comes first."""
        now = time.monotonic()
        if self._lines is None:
            yield from self._join(now)
            return
        if self._lines.fileno() in ready:
            messages = self._lines.receive()
            if messages is None:
                if not self._over:
                    self._over = True
                    yield Verdict(self._first("is gone: it was killed, or its host is down"), 1, 0)
                return
            self._heard = now
            for message in messages:
                if "verdict" in message:
                    yield Verdict(*message["verdict"])
                self._over = self._over or "farewell" in message
        if now > self._beat + BEAT:
            self._beat = now
            self._lines.send(beat=True)
        if now > self._heard + SILENT and not self._over:
            yield Verdict(self._first("does not answer any more"), 1, 0)

    def _first(self, what: str) -> str:
        return f"process 0 on {self._address[0]} {what}"

    def _join(self, now: float) -> Iterator[Verdict]:
        if now < self._tried + 1.0:
            return
        self._tried = now
        try:
            connection = socket.create_connection(self._address, timeout=SENDING)
        except OSError as error:
            if now > self._begun + JOINING:
                port = f"port {self._address[1]} there, which its supervisor listens at, is closed: {error}"
                yield Verdict(self._first(f"can not be reached: {port}"), 1, 0)
            return
        self._lines = Lines(connection)
        self._lines.send(**self._hello)
        self._heard = now

    def forgive(self) -> None:
        self._heard = max(self._heard, time.monotonic())

    def tell(self, **message: Any) -> None:
        if self._lines is None:  # it has hardly begun
            self._tried = 0.0
            list(self._join(time.monotonic()))
        if self._lines is not None:
            self._lines.send(**message)
