"""Where a run's time goes: DIR/time.jsonl, and what it adds up to over all starts of the run.

Each start of a run ("attempt") writes lines of its own: the seconds that it has spent so far on each part, at which
step it is, and the time of day. Every moment belongs to exactly one part, so the parts add up to the wall clock.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from etils import epath

from deltaformer_jax.config.lines import lines

FILE = "time.jsonl"
# What an attempt does, in the order of a run.
PARTS = ("start-up", "compiling", "data wait", "steps", "evaluation", "checkpoints", "sample")
# What only the next attempt shows: work after the checkpoint that it starts from, and the time without a process.
LOST, DOWN = "lost to restarts", "not running"


class Ledger:
    """The clock of one attempt. One part runs at a time; `within` gives a part the time of a block.

    started: `time.time()` at the start of the process. path: None if this process writes nothing.
    """

    def __init__(self, path: epath.PathLike | None, started: float, part: str = PARTS[0]):
        self._path = None if path is None else epath.Path(path)
        self._started = started
        # The clock of the machine may be set; differences are measured by one that only goes forward.
        self._offset = time.time() - time.monotonic()
        self._since, self._part = started - self._offset, part
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._before: str | None = None  # the file before this attempt
        self._lines: list[str] = []  # of this attempt, not appended yet

    def enter(self, part: str) -> str:
        """From now on time goes to `part`. Returns the part before."""
        now, before = time.monotonic(), self._part
        self.seconds[before] += now - self._since
        self._since, self._part = now, part
        return before

    @contextlib.contextmanager
    def within(self, part: str) -> Iterator[None]:
        """The block's time goes to `part`; after it the part before goes on."""
        before = self.enter(part)
        try:
            yield
        finally:
            self.enter(before)

    def write(self, step: int) -> None:
        """A line that says how far the attempt is. Raises OSError as `open` does."""
        if self._path is None:
            return
        self.enter(self._part)
        record = {
            "started": round(self._started, 3),
            "time": round(self._since + self._offset, 3),
            "step": step,
            "seconds": {part: round(seconds, 3) for part, seconds in self.seconds.items()},
        }
        if self._before is None:
            self._before = self._path.read_text() if self._path.exists() else ""
            if self._before and not self._before.endswith("\n"):  # a process was killed while it wrote
                self._lines.append("\n")
        self._lines.append(json.dumps(record) + "\n")
        if "://" in str(self._path):  # object stores cannot append: the whole file is written again
            self._path.write_text(self._before + "".join(self._lines))
        else:
            with self._path.open("a") as file:
                file.write("".join(self._lines))
            self._lines.clear()


class Spent(NamedTuple):
    """Seconds of a run by part, LOST and DOWN among them, and its number of attempts. They sum to the wall clock from
    the first attempt's start to the last line."""

    seconds: dict[str, float]
    attempts: int

    @property
    def running(self) -> float:
        """Seconds in which there was a process."""
        return sum(seconds for part, seconds in self.seconds.items() if part != DOWN)

    def line(self) -> str:
        """Shares of the running time, the largest first, without those under half a percent."""
        shares = sorted(((seconds / self.running, part) for part, seconds in self.seconds.items() if part != DOWN))
        listed = ", ".join(f"{part} {share:.1%}" for share, part in reversed(shares) if share >= 0.005)
        starts = f" in {self.attempts} starts" if self.attempts > 1 else ""
        return f"time        {self.running:,.0f} s{starts}: {listed}"


def read_ledger(folder: epath.PathLike) -> Spent | None:
    """What the run in `folder` has spent; None if it has no ledger.

    An attempt's first line has the step that it starts from. What the attempt before it did after that step was lost:
    its time since its last line with no later step. Time between its last line and the next start is DOWN; of an
    attempt that was killed, that includes what it did since its last line.
    """
    path = epath.Path(folder) / FILE
    if not path.exists():
        return None
    attempts: list[list[dict[str, Any]]] = []
    for line in lines(path.read_text()):
        try:
            record = json.loads(line)
            started = record["started"]
        except (ValueError, KeyError, TypeError):
            continue  # the line that was being written when the process was killed
        if not attempts or attempts[-1][0]["started"] != started:
            attempts.append([])
        attempts[-1].append(record)
    return _added_up(attempts) if attempts else None


def _added_up(attempts: Iterable[list[dict[str, Any]]]) -> Spent:
    attempts = list(attempts)
    total = dict.fromkeys((*PARTS, LOST, DOWN), 0.0)
    for attempt, following in zip(attempts, [*attempts[1:], None]):
        last = kept = attempt[-1]
        if following is not None:
            start = following[0]["step"]
            kept = next((record for record in reversed(attempt) if record["step"] <= start), attempt[0])
            total[LOST] += last["time"] - kept["time"]
            total[DOWN] += following[0]["started"] - last["time"]
        for part, seconds in kept["seconds"].items():
            total[part] += seconds
    return Spent(total, len(attempts))
