"""Runs cases in processes of their own, several at a time, and reports each result as it comes.

A case names a function, "MODULE:FUNCTION", which its process calls as FUNCTION(worker, **settings). The function
prepares its work (imports, draws, compiles) while other processes do the same. What must not be disturbed, it does
within `worker.alone()`. A lock on a file lets one process at a time be there.

A case that crashes is reported by the last line that it wrote to stderr. A case is killed if it stays in one stage for
longer than that stage's limit: "working", or "running" inside `alone`. Waiting for the lock has no limit. When the time
of the whole is over, the cases still in work are killed and those not yet started are reported as such.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import fcntl
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

LIMITS = {"working": 180.0, "running": 90.0}  # seconds in a stage

# How a case can end without a result of its own.
FAILED, NO_MEMORY, HUNG, STOPPED, NOT_STARTED = "failed", "out of memory", "hung", "stopped", "not started"


@dataclasses.dataclass(frozen=True)
class Case:
    """part, op, name: for the reports. function: "MODULE:FUNCTION". settings: its arguments, of JSON's types."""

    part: str
    op: str
    name: str
    function: str
    settings: dict[str, Any]


class Worker:
    """What a case's function gets: it tells the parent process what happens."""

    def __init__(self, lock: str, channel):
        self._lock, self._channel = lock, channel

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """A context in which no other case is."""
        self._say(stage="waiting")
        with open(self._lock, "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            self._say(stage="running")
            yield
        self._say(stage="working")

    def at(self, where: str) -> None:
        """Say what comes next, for the report of a case that ends there."""
        self._say(at=where)

    def result(self, said: str, wrong: bool = False, **numbers) -> None:
        """Report a result: a phrase for a person to read, and the numbers in it. A case may have several."""
        self._say(result={"status": "wrong" if wrong else "done", "said": said, **numbers})

    def _say(self, **message) -> None:
        self._channel.write(json.dumps(message) + "\n")
        self._channel.flush()


def run(
    cases: list[Case],
    report: Callable[[Case, dict[str, Any]], None],
    *,
    processes: int,
    seconds: float,
    limits: dict[str, float] = LIMITS,
    environment: dict[str, str] | None = None,
) -> None:
    """Run the cases, started in their order, and call report(case, row) for each result and each end without one.

    A row has "status" ("done", "wrong", or how the case ended) and "said". That of a result also has its numbers, and
    "seconds": how long the case was in each stage up to then, as far as it has left that stage. `environment` is added
    to that of this process. Takes at most `seconds`, and some more to end what still runs.
    """
    end = time.monotonic() + seconds
    pending, active = collections.deque(cases), []
    with tempfile.TemporaryDirectory(prefix="cases-") as folder:
        try:
            while pending or active:
                late = time.monotonic() >= end
                while pending and not late and len(active) < processes:
                    active.append(_Process(pending.popleft(), f"{folder}/lock", environment or {}))
                for process in active:
                    for row in process.news(limits):
                        report(process.case, row)
                active = [process for process in active if not process.ended]
                if late:
                    break
                time.sleep(0.02)
            for process in active:
                process.end()  # all before the first is waited for
            for process in active:
                report(process.case, process.stop(STOPPED, f"out of time, stopped while {process.where()}"))
            for case in pending:
                report(case, {"status": NOT_STARTED, "said": "not started: out of time"})
        finally:
            for process in active:
                process.kill()


class _Process:
    """A case in work."""

    def __init__(self, case: Case, lock: str, environment: dict[str, str]):
        self.case, self.ended = case, False
        self._stage, self._since, self._at = "working", time.monotonic(), ""
        self._seconds = {"working": 0.0, "waiting": 0.0, "running": 0.0}
        self._unread, self._errors = b"", tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            [sys.executable, __file__, lock, case.function, json.dumps(case.settings)],
            stdin=subprocess.PIPE,  # closes if this process dies, and the case then ends itself
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=os.environ | environment,
            process_group=0,
        )
        os.set_blocking(self._process.stdout.fileno(), False)

    def news(self, limits: dict[str, float]) -> Iterator[dict[str, Any]]:
        """What was reported since the last call. Ends the case if it is over its limit."""
        code = self._process.poll()  # before reading: what a process wrote before its end is then read
        yield from self._results()
        took = time.monotonic() - self._since
        if code is not None:
            self._close()
            if code:
                yield self._failure(code)
        elif took > limits.get(self._stage, float("inf")):
            yield self.stop(HUNG, f"no result within {limits[self._stage]:.0f} s, while {self.where()}")

    def where(self) -> str:
        return f"{self._stage}{self._at and f' on {self._at}'}"

    def stop(self, status: str, said: str) -> dict[str, Any]:
        self.kill()
        return {"status": status, "said": said}

    def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def kill(self) -> None:
        if self.ended:
            return
        self.end()
        # A process that waits for a device may take longer to end. It keeps the lock until then.
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=5)
        self._close()

    def _results(self) -> Iterator[dict[str, Any]]:
        with contextlib.suppress(BlockingIOError):
            while block := os.read(self._process.stdout.fileno(), 1 << 16):
                self._unread += block
        *lines, self._unread = self._unread.split(b"\n")
        for message in map(json.loads, lines):
            if "stage" in message:
                now = time.monotonic()
                self._seconds[self._stage] += now - self._since
                self._stage, self._since = message["stage"], now
            self._at = message.get("at", self._at)
            if "result" in message:
                seconds = {stage: round(took, 1) for stage, took in self._seconds.items()}
                yield message["result"] | {"seconds": seconds}

    def _failure(self, code: int) -> dict[str, Any]:
        said = self._last_line or "nothing on stderr"
        if code < 0:
            said = f"ended by signal {-code}; {said}"
        known = ("RESOURCE_EXHAUSTED", "out of memory", "OutOfMemory")
        status = NO_MEMORY if any(word in said for word in known) else FAILED
        return {"status": status, "said": f"{status} while {self.where()}: {said}"}

    def _close(self) -> None:
        self.ended = True
        self._errors.seek(0)
        lines = [line for line in self._errors.read().decode(errors="replace").splitlines() if line.strip()]
        self._last_line = lines[-1].strip()[:300] if lines else ""
        for file in (self._errors, self._process.stdin, self._process.stdout):
            file.close()


def _end_with_parent() -> None:
    while os.read(0, 1):
        pass
    os._exit(1)


def main() -> None:
    lock, function, settings = sys.argv[1:]
    # Libraries print to stdout: the messages get a file of their own, and prints join stderr.
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    module, name = function.split(":")
    try:
        getattr(importlib.import_module(module), name)(Worker(lock, channel), **json.loads(settings))
    except Exception as error:
        traceback.print_exc()
        first = (str(error).strip() or "no message").splitlines()[0]
        sys.exit(f"{type(error).__name__}: {first}")
    # All is said. To take down a device's client may take seconds, and may fail.
    os._exit(0)


if __name__ == "__main__":
    main()
