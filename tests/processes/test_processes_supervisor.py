"""Supervisors of a program that computes nothing: whoever is lost, the others end soon, with one line that names it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.processes import toy_program
from support.processes.several import free_port

from deltaformer_jax.host.interruption import Interruption

ROOT = Path(__file__).parents[2]


class Toys:
    def __init__(self, folder, *behaviours, processes=None, by=()):
        folder.mkdir(exist_ok=True)
        self.folder, where = folder, f"127.0.0.1:{free_port()}"
        self.processes = [
            subprocess.Popen(
                [
                    *(*by, sys.executable, toy_program.__file__, str(folder), behaviour),
                    *(
                        "--coordinator",
                        where,
                        "--processes",
                        str(processes or len(behaviours)),
                        "--process",
                        str(index),
                    ),
                ],
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for index, behaviour in enumerate(behaviours)
        ]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            process.kill()
            process.communicate()

    def meet(self):
        """Wait until all have met. Returns the process ids of the children."""
        came = [self.folder / f"came-{index}" for index in range(len(self.processes))]
        wait_until(lambda: all(path.exists() for path in came))
        time.sleep(1.5)  # the supervisors have met too
        return [int(path.read_text()) for path in came]

    def outcomes(self, seconds=60):
        end = time.monotonic() + seconds
        found = []
        for process in self.processes:
            out, err = process.communicate(timeout=max(0.1, end - time.monotonic()))
            found.append((process.returncode, out, err))
        return found


def wait_until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def is_alive(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state not in "ZX"


def assert_one_line(outcome, code, *words):
    assert outcome[0] == code, outcome
    assert outcome[2].count("\n") == 1, outcome
    for word in words:
        assert word in outcome[2], outcome


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_passed_on_and_the_childs_code_comes_back(number, tmp_path):
    with Toys(tmp_path, "works", "saves") as toys:
        toys.meet()
        for process in toys.processes:
            process.send_signal(number)
        assert [outcome[:2] for outcome in toys.outcomes()] == [(0, "ended well\n")] * 2


def test_other_signals_are_passed_on_as_they_are(tmp_path):
    """Its own supervisor exits with 128 + the signal; SIGUSR2 writes the stacks, and the run goes on. By nohup it goes
    on when its terminal is closed too, which sends SIGHUP to parent and child."""
    with Toys(tmp_path, "works", "works", by=("nohup",)) as toys:
        for child in toys.meet():
            os.kill(child, signal.SIGHUP)
        for process in toys.processes:
            process.send_signal(signal.SIGHUP)
        toys.processes[1].send_signal(signal.SIGUSR2)
        time.sleep(0.5)
        assert toys.processes[1].poll() is None
        toys.processes[1].send_signal(signal.SIGUSR1)
        first, second = toys.outcomes()
    assert_one_line(second, 128 + signal.SIGUSR1, "process 1 on ", "was killed by SIGUSR1")
    assert_one_line(first, 1, "process 1 on ", "was killed by SIGUSR1; this process is stopped with it")


@pytest.mark.parametrize("lost", [0, 2])
def test_a_killed_child_ends_all_with_its_name_and_their_stacks(lost, tmp_path):
    with Toys(tmp_path, "works", "saves", "works") as toys:
        children, begin = toys.meet(), time.monotonic()
        os.kill(children[lost], signal.SIGKILL)
        outcomes = toys.outcomes()
        assert time.monotonic() - begin < 15
    for index, outcome in enumerate(outcomes):
        code = 128 + signal.SIGKILL if index == lost else 1
        assert_one_line(outcome, code, "toy: error: ", f"process {lost} on ", "was killed by SIGKILL")
        assert not is_alive(children[index])
        if index != lost:
            stacks = tmp_path / "stacks" / f"process-{index}.txt"
            assert str(stacks) in outcome[2] and "in program" in stacks.read_text()


@pytest.mark.parametrize("lost", [0, 1])
def test_a_killed_supervisor_takes_its_child_along(lost, tmp_path):
    with Toys(tmp_path, "works", "works", "works") as toys:
        children = toys.meet()
        toys.processes[lost].kill()
        outcomes = toys.outcomes()
    wait_until(lambda: not any(map(is_alive, children)), 10)
    for index, outcome in enumerate(outcomes):
        if index != lost:
            assert_one_line(outcome, 1, f"process {lost} on ", "is gone: it was killed, or its host is down")


def test_a_stopped_child_is_lost(tmp_path):
    with Toys(tmp_path, "works", "works") as toys:
        children, begin = toys.meet(), time.monotonic()
        os.kill(children[1], signal.SIGSTOP)
        outcomes = toys.outcomes()
        assert time.monotonic() - begin < 30
    for outcome in outcomes:
        assert_one_line(outcome, 1, "process 1 on ", "has been stopped (SIGSTOP) for 10 s")
    assert "in program" in (tmp_path / "stacks" / "process-1.txt").read_text()
    assert not any(map(is_alive, children))


@pytest.mark.parametrize("lost", [pytest.param(0, marks=pytest.mark.rare), pytest.param(1, marks=pytest.mark.long)])
def test_a_stopped_host_is_lost(lost, tmp_path):
    """Supervisor and child are both stopped, as by a host that hangs: nobody there says anything."""
    with Toys(tmp_path, "works", "works") as toys:
        children, begin = toys.meet(), time.monotonic()
        for pid in (toys.processes[lost].pid, children[lost]):
            os.kill(pid, signal.SIGSTOP)
        toys.processes[lost].stopped = True
        outcome = toys.processes[1 - lost].communicate(timeout=60)
        assert time.monotonic() - begin < 30
        assert_one_line((toys.processes[1 - lost].returncode, *outcome), 1, f"process {lost} on ", "does not answer")


def test_a_child_that_was_stopped_for_a_moment_goes_on(tmp_path):
    with Toys(tmp_path, "works", "works") as toys:
        children = toys.meet()
        os.kill(children[1], signal.SIGSTOP)
        time.sleep(4)  # longer than it may be silent while it trains
        os.kill(children[1], signal.SIGCONT)
        time.sleep(1)
        for process in toys.processes:
            process.send_signal(signal.SIGTERM)
        assert [outcome[:2] for outcome in toys.outcomes()] == [(0, "ended well\n")] * 2


def test_a_hanging_main_thread_is_told_from_slow_work(tmp_path):
    with Toys(tmp_path, "saves", "hangs", "works") as toys:
        toys.meet()
        outcomes = toys.outcomes()
    for outcome in outcomes:
        assert_one_line(outcome, 1, "process 1 on ", "hangs: training, without a sign of life for 2 s")
    assert "in program" in (tmp_path / "stacks" / "process-1.txt").read_text()


def test_slow_work_is_no_hang(tmp_path):
    with Toys(tmp_path, "saves", "saves") as toys:
        toys.meet()
        time.sleep(3 * toy_program.LIMIT)
        assert [process.poll() for process in toys.processes] == [None, None]
        for process in toys.processes:
            process.send_signal(signal.SIGTERM)
        assert [outcome[0] for outcome in toys.outcomes()] == [0, 0]


def test_a_line_of_one_is_the_line_of_all(tmp_path):
    with Toys(tmp_path, "works", "fails") as toys:
        first, second = toys.outcomes()
    assert second[0] == 2 and second[2] == "toy: error: what is wrong\n"
    assert_one_line(first, 2, "process 1 on ", "ended with code 2: what is wrong; this process is stopped with it")
    assert not (tmp_path / "stacks").exists()  # it is known what was wrong


def test_a_line_from_before_they_met_is_the_line_of_all(tmp_path):
    """As where a file is missing on one host, or on two: the others wait for them, and hear of it once they come."""
    begin = time.monotonic()
    with Toys(tmp_path, "works", "early", "early") as toys:
        works, *early = toys.outcomes()
    assert time.monotonic() < begin + 30
    assert_one_line(works, 2, "ended with code 2: what is wrong; this process is stopped with it")
    for outcome in early:
        assert_one_line(outcome, 2, "toy: error: what is wrong")


def test_a_bug_keeps_its_traceback(tmp_path):
    with Toys(tmp_path, "works", "breaks") as toys:
        first, second = toys.outcomes()
    assert second[0] == 1 and "RuntimeError: a bug\n" in second[2] and "Traceback" in second[2]
    assert_one_line(first, 1, "process 1 on ", "ended with code 1: a bug")


@pytest.mark.parametrize("other", ["works", "aborts"])
def test_a_child_that_just_leaves(other, tmp_path):
    """The trace of another child, which JAX's runtime aborts because of that, is kept back."""
    with Toys(tmp_path, "leaves", other) as toys:
        first, second = toys.outcomes()
    assert_one_line(first, 7, "process 0 on ", "ended with code 7")
    assert_one_line(second, 7, "process 0 on ", "ended with code 7; this process is stopped with it")


def test_the_trace_of_an_abort_is_kept_if_nobody_else_is_lost(tmp_path):
    with Toys(tmp_path, "works", "aborts") as toys:
        first, second = toys.outcomes()
    assert second[0] == 128 + signal.SIGABRT and "client.h:80" in second[2] and "*** Check" in second[2]
    assert_one_line(first, 1, "process 1 on ", "was killed by SIGABRT")


def test_a_coordinator_that_does_not_answer(tmp_path):
    where = f"127.0.0.1:{free_port()}"
    for index, words in ((1, "no answer within 2 s"), (0, "not all of them came")):
        command = [sys.executable, toy_program.__file__, str(tmp_path), "never", "--coordinator", where]
        found = subprocess.run(
            [*command, "--processes", "2", "--process", str(index)],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=60,
        )
        # The toy has no coordinator of jax's: process 0 does not answer either.
        assert found.returncode == 1 and found.stderr.count("\n") == 1, found
        assert f"--coordinator {where}: no answer within 2 s" in found.stderr, words


def test_a_signal_that_comes_to_parent_and_child_counts_once(monkeypatch, capfd):
    """As Slurm and a terminal send it. The second of either way stops at once."""
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    stop = Interruption()
    stop.receive(signal.SIGTERM)
    stop.receive(signal.SIGTERM, "the supervisor")
    assert stop.requested and not ended and capfd.readouterr().err.count("finishing this step") == 1
    stop.receive(signal.SIGTERM, "the supervisor")
    assert ended == [128 + signal.SIGTERM]
