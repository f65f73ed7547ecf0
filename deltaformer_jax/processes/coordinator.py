"""The port of jax's coordinator, as the supervisors see it before their children have met there."""

from __future__ import annotations

import contextlib
import errno
import socket
import sys

LOOK = 1.0  # seconds between two looks: process 0 may end soon after it came
GONE = 12.0  # seconds after which a coordinator that answered and does not any more counts as gone


class Coordinator:
    """`address` is HOST:PORT."""

    def __init__(self, address: str):
        self._address = address
        host, _, port = address.rpartition(":")
        self._host, self._port = host.strip("[]"), int(port)
        self._looked = self._answered = 0.0
        self._held: socket.socket | None = None

    def take_port(self) -> str | None:
        """Of process 0, before its coordinator listens. Returns what is wrong if another one does, or is about to.

        gRPC shares its port with whoever asks for it (SO_REUSEPORT): two coordinators would each get some of the
        processes. So the port is bound here too, without listening, in a way that only gRPC can share.
        """
        if sys.platform != "linux":
            return None
        for option in (socket.SO_REUSEADDR, socket.SO_REUSEPORT):  # the first one shares with connections that ended
            family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
            one = socket.socket(family)
            if family == socket.AF_INET6:
                one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            one.setsockopt(socket.SOL_SOCKET, option, 1)
            try:
                one.bind(("", self._port))
            except OSError as error:
                one.close()
                if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                    return None  # jax says it
                return (
                    f"--coordinator {self._address}: port {self._port} of this host cannot be used ({error.strerror}); "
                    "give another port, and each process its own number by --process if this is not process 0"
                )
            if option == socket.SO_REUSEADDR:
                one.close()
            else:
                self._held = one
        return None

    def reach(self, seconds: float) -> None:
        """Raises OSError unless somebody listens there."""
        socket.create_connection((self._host, self._port), timeout=seconds).close()

    def look(self, now: float) -> str | None:
        """Of the others, while they wait for all to come: what is wrong, once a coordinator was there and is gone."""
        if now < self._looked + LOOK:
            return None
        self._looked = now
        with contextlib.suppress(OSError):
            self.reach(0.5)
            self._answered = now
        if not self._answered or now < self._answered + GONE:
            return None
        return f"--coordinator {self._address}: process 0 was there, and has ended; start all processes again"
