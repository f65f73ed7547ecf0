"""Where the time goes: every moment in one part, what restarts lose, and files that a kill has cut off."""

import json
import time

import pytest

from deltaformer_jax.training.watch.ledger import DOWN, FILE, LOST, PARTS, Ledger, read_ledger


class Clock:
    """Stands for the module `time`: both clocks move together, by hand."""

    def __init__(self):
        self.now = 1000.0

    def time(self):
        return self.now + 1e9

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("deltaformer_jax.training.watch.ledger.time", clock)
    return clock


def attempt(clock, path, spans):
    """An attempt: (part, seconds, step at whose end a line is written, or None)."""
    ledger = Ledger(path, clock.time())
    for part, seconds, step in spans:
        with ledger.within(part):
            clock.now += seconds
        if step is not None:
            ledger.write(step)
    return ledger


def test_the_parts_of_one_start_add_up(clock, tmp_path):
    spans = [("start-up", 2.0, 0), ("compiling", 5.0, None), ("steps", 10.0, 10), ("evaluation", 3.0, 20)]
    attempt(clock, tmp_path / FILE, spans)
    spent = read_ledger(tmp_path)
    assert spent.attempts == 1 and spent.running == pytest.approx(20.0)
    assert spent.seconds == pytest.approx(
        {**dict.fromkeys((*PARTS, LOST, DOWN), 0.0), "start-up": 2, "compiling": 5, "steps": 10, "evaluation": 3}
    )
    assert spent.line() == ("time        20 s: steps 50.0%, compiling 25.0%, evaluation 15.0%, start-up 10.0%")


def test_a_part_inside_a_part(clock, tmp_path):
    ledger = Ledger(tmp_path / FILE, clock.time())
    with ledger.within("steps"):
        clock.now += 1
        with ledger.within("data wait"):
            clock.now += 2
        clock.now += 4
    assert (ledger.seconds["steps"], ledger.seconds["data wait"]) == (5, 2)


def test_work_after_the_checkpoint_is_lost(clock, tmp_path):
    """Killed 7 s after step 30, whose line was the last; started 100 s later from the checkpoint of step 20."""
    attempt(clock, tmp_path / FILE, [("start-up", 1, 0), ("steps", 10, 10), ("steps", 10, 20), ("steps", 10, 30)])
    clock.now += 107
    attempt(clock, tmp_path / FILE, [("start-up", 2, 20), ("steps", 20, 40)])
    spent = read_ledger(tmp_path)
    assert spent.attempts == 2
    assert (spent.seconds["steps"], spent.seconds["start-up"]) == (40, 3)
    assert (spent.seconds[LOST], spent.seconds[DOWN]) == (10, 107)
    assert sum(spent.seconds.values()) == clock.now - 1000 and spent.running == clock.now - 1000 - 107
    assert " in 2 starts: " in spent.line()


def test_a_start_that_saved_nothing_is_lost_whole_but_for_its_start(clock, tmp_path):
    attempt(clock, tmp_path / FILE, [("start-up", 1, 0), ("steps", 10, 10)])
    attempt(clock, tmp_path / FILE, [("start-up", 1, 0), ("steps", 10, 10)])
    spent = read_ledger(tmp_path)
    assert (spent.seconds[LOST], spent.seconds["start-up"], spent.seconds["steps"]) == (10, 2, 10)


def test_a_line_cut_off_by_a_kill_is_left_out(clock, tmp_path):
    attempt(clock, tmp_path / FILE, [("steps", 10, 10)])
    with (tmp_path / FILE).open("a") as file:
        file.write('{"started": 1, "ti')
    assert read_ledger(tmp_path).seconds["steps"] == 10
    attempt(clock, tmp_path / FILE, [("start-up", 1, 10), ("steps", 5, 20)])
    assert read_ledger(tmp_path).seconds["steps"] == 15 and read_ledger(tmp_path).attempts == 2
    assert read_ledger(tmp_path / "elsewhere") is None


def test_the_real_clock_and_a_process_that_writes_nothing(tmp_path):
    started = time.time() - 0.5
    ledger = Ledger(tmp_path / FILE, started)
    ledger.write(0)
    Ledger(None, started).write(0)
    (line,) = (tmp_path / FILE).read_text().splitlines()
    record = json.loads(line)
    assert 0.5 <= record["seconds"]["start-up"] <= time.time() - started
    assert record["time"] - record["started"] == pytest.approx(sum(record["seconds"].values()), abs=2e-3)
