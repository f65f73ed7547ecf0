"""Messages over a socket: one JSON object a line."""

from __future__ import annotations

import contextlib
import json
import socket
from typing import Any


class Lines:
    """Messages to and from whoever has the other end of `connection`. Sending to one who has gone does nothing."""

    def __init__(self, connection: socket.socket):
        self.socket = connection
        self._read = b""

    def fileno(self) -> int:
        return self.socket.fileno()

    def send(self, **message: Any) -> None:
        with contextlib.suppress(OSError):
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]] | None:
        """The messages that are complete, at least after one read, which may wait; None once the other end is gone."""
        try:
            read = self.socket.recv(65536)
        except TimeoutError:
            return []
        except OSError:
            return None
        if not read:
            return None
        *whole, self._read = (self._read + read).split(b"\n")
        try:
            messages = [json.loads(line) for line in whole]
        except ValueError:  # a stranger, such as a scanner of ports
            return None
        return messages if all(isinstance(message, dict) for message in messages) else None

    def close(self) -> None:
        self.socket.close()
