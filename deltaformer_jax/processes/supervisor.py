"""The parent process of each of several: it starts the program as its child, watches it, and ends it with the others.

jax ends the survivors of a lost process after a minute, with the trace of a C++ program. The parent knows at once: it
is told when its child ends or is stopped, it sees on the board where the child's main thread is, and the parents of all
processes are connected (`hub`). They end their children with one line that names the lost process, and leave the stacks
of all threads in DIR/stacks/.

The parent passes on every signal, and exits with its child's code, or 128 + the signal that ended it. If the parent is
killed, its child is too. Imports neither jax nor numpy.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from typing import Any, NoReturn

from deltaformer_jax.processes.board import SIZE, Board
from deltaformer_jax.processes.child import STACKS, STACKS_FOLDER, VARIABLE
from deltaformer_jax.processes.coordinator import Coordinator
from deltaformer_jax.processes.hub import Hub, Member, Verdict
from deltaformer_jax.processes.lines import Lines
from deltaformer_jax.processes.place import Place
from deltaformer_jax.processes.relay import Relay

# By a message: a launcher may send these to parent and child both, and the child counts them apart.
TOLD = (signal.SIGTERM, signal.SIGINT)
SENT = (signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)

TURN = 0.25  # seconds between two looks at the clock
PAUSED = 5.0  # a turn that took longer: this process was stopped itself, and what it missed does not count
STOPPED = 10.0  # seconds after which a child that was stopped (SIGSTOP) is lost
HELD = 3.0  # seconds in which a child's abort may turn out to be jax's answer to the loss of another one
STACKS_SECONDS = 3.0  # for writing the stacks
WORDS_SECONDS = 1.0  # in which the child may say the same as the one that failed, as when their settings differ
FAREWELLS = 60.0  # seconds that the parent of process 0 stays for the others, once its child has ended


def supervise(place: Place, program: str) -> NoReturn:
    """Start this very command again as a child, watch it to its end, and exit with its code."""
    sys.exit(_Supervisor(place, program).run())


class _Supervisor:
    def __init__(self, place: Place, program: str):
        self._place, self._program, self._host = place, program, socket.gethostname()
        self._hub: Hub | Member | None = Hub(place) if place.index == 0 else None
        self._coordinator = Coordinator(place.coordinator)
        self._connected = False
        self._words: tuple[str, int] | None = None  # what a failing child said, and its code
        self._code: int | None = None  # of the child, once it has ended
        self._fault: tuple[float, Verdict] | None = None  # one of our own, and when it is told
        self._stopped_at: float | None = None
        self._since = 0.0  # the child's silence counts from here: it was not stopped after that
        self._left_at: float | None = None
        self._workdir = ""

    def run(self) -> int:
        self._signals, wake = socket.socketpair()
        for end in (self._signals, wake):
            end.setblocking(False)
        signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
        # What is ignored stays so, in the child too: nohup has a run survive the terminal that it was started from.
        wanted = [number for number in SENT if signal.getsignal(number) is not signal.SIG_IGN]
        for number in (*TOLD, *wanted, signal.SIGCHLD):
            signal.signal(number, lambda *_: None)
        with tempfile.TemporaryFile() as board, tempfile.TemporaryFile() as stacks:
            board.truncate(SIZE)
            self._board, self._stacks = Board(board.fileno()), stacks
            if self._place.index == 0 and (line := self._coordinator.take_port()):
                print(f"{self._program}: error: {line}", file=sys.stderr)
                return 2
            self._start(board.fileno())
            last = time.monotonic()
            while True:
                ready = self._wait()
                if time.monotonic() > last + PAUSED:
                    self._forgive()
                last = time.monotonic()
                verdict = self._turn(ready)
                if verdict is not None:
                    return self._end(verdict)
                if self._code == 0 and self._farewell(last):
                    self._stderr.let_go()
                    return 0

    def _start(self, board: int) -> None:
        ours, theirs = socket.socketpair()
        self._child = Lines(ours)
        handed = {
            "place": self._place._asdict(),
            "board": board,
            "stacks": self._stacks.fileno(),
            "socket": theirs.fileno(),
        }
        reader, writer = os.pipe()
        with theirs:
            process = subprocess.Popen(
                [sys.executable, *sys.orig_argv[1:]],
                env={**os.environ, VARIABLE: json.dumps({**handed, "parent": os.getpid()})},
                pass_fds=(board, self._stacks.fileno(), theirs.fileno()),
                stderr=writer,
            )
        os.close(writer)
        self._stderr = Relay(reader)
        self._pid = process.pid
        process.returncode = 0  # waited for below, also when it is stopped, which Popen does not do

    def _wait(self) -> set[int]:
        sockets: list[Any] = [self._signals, *([] if self._hub is None else self._hub.sockets())]
        if self._child is not None:
            sockets.append(self._child)
        if not self._stderr.ended:
            sockets.append(self._stderr)
        poll = select.poll()
        for one in sockets:
            poll.register(one, select.POLLIN)
        return {descriptor for descriptor, _ in poll.poll(1000 * TURN)}

    def _forgive(self) -> None:
        if self._hub is not None:
            self._hub.forgive()
        self._since = time.monotonic()
        if self._stopped_at is not None:
            self._stopped_at = self._since

    def _turn(self, ready: set[int]) -> Verdict | None:
        """The verdict, once there is one."""
        self._stderr.turn()
        if self._signals.fileno() in ready:
            for number in self._signals.recv(64):
                self._pass_on(number)
        self._listen(ready)
        for verdict in () if self._hub is None else self._hub.turn(ready):
            return verdict  # of all, or one that is about another process
        if self._code is None:
            self._look_at_child()
        if self._fault is not None and time.monotonic() > self._fault[0]:
            return self._fault[1]
        return None

    def _listen(self, ready: set[int]) -> None:
        if self._child is None or self._child.fileno() not in ready:
            return
        messages = self._child.receive()
        for message in messages or ():
            self._hear(message)
        if messages is None:
            self._child = None

    def _pass_on(self, number: int) -> None:
        if self._code is not None:
            return
        if number in TOLD:
            self._tell_child(signal=number)
        elif number in SENT:
            os.kill(self._pid, number)

    def _tell_child(self, **message: Any) -> None:
        if self._child is not None:
            self._child.send(**message)

    def _hear(self, message: dict[str, Any]) -> None:
        if "failed" in message:
            self._words = message["failed"], message["code"]
            if "early" in message:  # the others are told once they have met
                return
            line = f"{self._name} ended with code {message['code']}: {message['failed']}"
            self._blame(line, message["code"], lost=False)
        if "workdir" in message:
            self._workdir = message["workdir"]
        if "connecting" in message:  # process 0 tells the others where its parent listens
            self._tell_child(port=self._hub.port, token=self._hub.token)
        if "connected" in message:
            self._connected = True
            if isinstance(self._hub, Hub):
                self._hub.begin()
            else:
                self._hub = Member(self._place, self._host, *message["connected"])

    @property
    def _name(self) -> str:
        return f"process {self._place.index} on {self._host}"

    def _blame(self, line: str, code: int = 1, *, lost: bool = True, after: float = 0.0) -> None:
        if self._fault is None:
            self._fault = time.monotonic() + after, Verdict(line, code, self._place.index, lost)

    def _look_at_child(self) -> None:
        pid, status = os.waitpid(self._pid, os.WNOHANG | os.WUNTRACED | os.WCONTINUED)
        now = time.monotonic()
        if pid and os.WIFSTOPPED(status):
            self._stopped_at = now
        elif pid and os.WIFCONTINUED(status):
            self._stopped_at, self._since = None, now
        elif pid:
            self._code = os.waitstatus_to_exitcode(status)
            if self._code < 0:
                number = -self._code
                self._code = 128 + number
                self._stderr.turn()
                twice = self._stderr.came_twice(self._place.index)
                if twice is not None:
                    self._stderr.held = b""
                    numbers = f"0 to {self._place.count - 1}"
                    self._blame(f"--process {twice}: two processes were started with it; give each its own, {numbers}")
                after = HELD if number == signal.SIGABRT else 0.0
                self._blame(f"{self._name} was killed by {signal.Signals(number).name}", after=after)
            elif self._code > 0:
                self._blame(f"{self._name} ended with code {self._code}", self._code, lost=False)
            return
        if self._stopped_at is not None:
            if now > self._stopped_at + STOPPED:
                self._blame(f"{self._name} has been stopped (SIGSTOP) for {STOPPED:.0f} s")
            return
        if not self._connected and self._place.index > 0 and (line := self._coordinator.look(now)):
            self._blame(line, lost=False)
        doing, seconds, limit = self._board.read()
        seconds = min(seconds, now - self._since)
        if limit and seconds > limit:
            if self._connected:
                self._blame(f"{self._name} hangs: {doing}, without a sign of life for {seconds:.0f} s")
            else:
                self._blame(self._unmet(limit), lost=False)

    def _unmet(self, seconds: float) -> str:
        address = self._place.coordinator
        try:
            self._coordinator.reach(5)
        except OSError as error:
            return (
                f"--coordinator {address}: no answer within {seconds:.0f} s ({error}); start process 0 there, and see "
                "that nothing blocks the port"
            )
        return (
            f"--processes {self._place.count}: not all of them came to the coordinator {address} within {seconds:.0f} "
            "s; start the others too, give the number that is started, or a longer --wait"
        )

    def _farewell(self, now: float) -> bool:
        """The child has ended well. Whether this process may go: the hub serves the others to their end."""
        if isinstance(self._hub, Hub) and self._connected and not self._hub.all_left:
            if self._left_at is None:
                self._left_at = now
            if now < self._left_at + FAREWELLS:
                return False
        if self._hub is not None:
            self._hub.tell(farewell=True)
        return True

    def _end(self, verdict: Verdict) -> int:
        """Tell the others, end the child, say why."""
        if isinstance(self._hub, Hub):
            self._hub.tell(verdict=verdict)
        elif self._hub is not None and verdict.index == self._place.index:
            self._hub.tell(fault=verdict)
        own = verdict.index == self._place.index
        if self._code is None:
            until = time.monotonic() + WORDS_SECONDS
            while not (verdict.lost or self._words or time.monotonic() > until):
                self._stderr.turn()
                self._listen(self._wait())
            # The traces of jax and of its collectives, which miss the others now, go where the stacks go.
            self._tell_child(silence=True)
            written = self._write_stacks() if verdict.lost else None
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)
            said = f"; stacks of all threads: {written}" if written else ""
        else:
            said = ""
        if own and not said:  # else it is in the file of the stacks
            self._stderr.let_go()
        if self._words:  # the child has said it itself
            self._stderr.turn()
        else:
            together = "" if own else "; this process is stopped with it"
            print(f"{self._program}: error: {verdict.line}{together}{said}", file=sys.stderr, flush=True)
        if own and self._words:
            return self._words[1]
        return self._code if own and self._code else verdict.code

    def _write_stacks(self) -> str | None:
        """The file with the stacks of the child, which is asked for them; None if it gives none."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._pid, STACKS)
            os.kill(self._pid, signal.SIGCONT)
        until, size = time.monotonic() + STACKS_SECONDS, -1
        while time.monotonic() < until:
            time.sleep(0.2)
            before, size = size, os.fstat(self._stacks.fileno()).st_size
            if size and size == before:
                break
        self._stacks.seek(0)
        text = self._stderr.held + self._stacks.read()
        if not text or not self._workdir:
            return None
        if "://" in self._workdir:
            from etils.epath import Path
        else:
            from pathlib import Path
        path = Path(self._workdir) / STACKS_FOLDER / f"process-{self._place.index}.txt"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(text)
        except OSError as error:  # a full disk may be why the run ends
            return f"none, {error.strerror or error}"
        return str(path)
