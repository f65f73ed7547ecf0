"""benchmarks/cases.py, which runs cases in processes, with cases that need no device; and what gpu.py makes of it."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import cases
import gpu

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {"PYTHONPATH": str(Path(__file__).parent)}


def case(function, **settings):
    return cases.Case("part", "op", str(settings.get("number", function)), f"fake_cases:{function}", settings)


def run(some, **more):
    """[(the case's name, the row)] as they came."""
    rows = []
    more = {"processes": 2, "seconds": 60, "environment": ENVIRONMENT} | more
    cases.run(some, lambda case, row: rows.append((case.name, row)), **more)
    return rows


@pytest.fixture
def notes(tmp_path):
    return str(tmp_path / "notes")


def read(notes):
    return [line.split() for line in Path(notes).read_text().splitlines()]


def gone(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z"


def test_cases_start_in_their_order_and_are_alone_one_at_a_time(notes):
    rows = run([case("good", number=n, path=notes, alone=0.15) for n in range(5)], processes=4)
    assert sorted(row["said"] for _, row in rows) == sorted(
        f"{n} is {what}" for n in range(5) for what in ("good", "wrong")
    )
    assert {row["status"] for _, row in rows} == {"done", "wrong"}
    events = [line for line in read(notes) if line[0] in ("in", "out")]
    for entered, left in zip(events[::2], events[1::2]):
        assert (entered[0], left[0]) == ("in", "out") and entered[1] == left[1], events
    assert [line[1] for line in read(notes) if line[0] == "begin"][-1] == "4"  # started when a place was free


def test_with_one_process_the_order_is_that_of_the_list(notes):
    run([case("good", number=n, path=notes) for n in range(3)], processes=1)
    assert [line[:2] for line in read(notes)] == [[word, str(n)] for n in range(3) for word in ("begin", "in", "out")]


def test_a_failure_is_reported_by_its_last_line_and_the_others_go_on(notes):
    rows = run([case("fails"), case("leaves"), case("dies"), case("good", number=1, path=notes)])
    said = {name: (row["status"], row["said"]) for name, row in rows if row["status"] not in ("done", "wrong")}
    assert said == {
        "fails": (
            "out of memory",
            "out of memory while running on shape 3: RuntimeError: RESOURCE_EXHAUSTED: 5 bytes",
        ),
        "leaves": ("failed", "failed while working: the last line"),
        "dies": ("failed", "failed while working: ended by signal 9; nothing on stderr"),
    }
    assert ("fails", "done", "the first half") in [(name, row["status"], row["said"]) for name, row in rows]
    assert [name for name, row in rows if row["status"] == "done"][-1] in ("fails", "1")


def test_a_hang_is_killed_and_frees_the_lock(notes, tmp_path):
    # The good case waits for the lock for longer than the limit, which does not count.
    hung, good = case("hangs", path=notes, alone=True), case("good", number=1, path=str(tmp_path / "good"), prepare=0.5)
    rows = run([hung, good], limits={"working": 30, "running": 1.5})
    assert rows[0] == ("hangs", {"status": "hung", "said": "no result within 2 s, while running"})
    assert [row["said"] for _, row in rows[1:]] == ["1 is good", "1 is wrong"]
    assert rows[1][1]["seconds"]["waiting"] > 0.5 > rows[1][1]["seconds"]["running"]
    assert gone(int(read(notes)[0][1]))


def test_preparing_has_a_limit_too(notes):
    ((_, row),) = run([case("hangs", path=notes, alone=False)], limits={"working": 1.0, "running": 30})
    assert row == {"status": "hung", "said": "no result within 1 s, while working"}


def test_the_deadline(notes):
    start = time.monotonic()
    rows = run([case("hangs", path=notes, alone=True), case("leaves")], processes=1, seconds=1.5)
    assert time.monotonic() - start < 10
    assert rows == [
        ("hangs", {"status": "stopped", "said": "out of time, stopped while running"}),
        ("leaves", {"status": "not started", "said": "not started: out of time"}),
    ]
    assert gone(int(read(notes)[0][1]))


def test_cases_end_with_their_parent(notes):
    program = (
        f"import sys; sys.path.append({str(ROOT / 'benchmarks')!r}); import cases\n"
        f"case = cases.Case('', '', '', 'fake_cases:hangs', {{'path': {notes!r}, 'alone': True}})\n"
        f"cases.run([case], print, processes=1, seconds=60, environment={ENVIRONMENT!r})"
    )
    parent = subprocess.Popen([sys.executable, "-c", program])
    end = time.monotonic() + 20
    while not Path(notes).exists() or not read(notes):
        assert time.monotonic() < end
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    while not gone(int(read(notes)[0][1])):
        assert time.monotonic() < end
        time.sleep(0.05)


def log_of(tmp_path, rows):
    """gpu.py's Log after these (part, op, status) rows, and the contents of its file after each."""
    options, contents = gpu.parse(["--json", str(tmp_path / "out.json")]), []
    log = gpu.Log(options, {"device": "none"}, time.monotonic())
    for part, op, status in rows:
        numbers = {"times": {"direction": "forward", "ms": 1.5}, "long": {"differences": {"out": 0.01}}}.get(part, {})
        log.add(cases.Case(part, op, "form", "", {}), {"status": status, "said": "said", **numbers})
        contents.append(json.loads(options.json.read_text(encoding="utf-8")))
    return log, contents


def test_every_result_is_printed_and_written_when_it_comes(tmp_path, capsys):
    log, contents = log_of(
        tmp_path, [("long", "delta", "done"), ("times", "delta", "done"), ("times", "gated", "hung")]
    )
    assert [len(content["rows"]) for content in contents] == [1, 2, 3]
    assert contents[0]["machine"] == {"device": "none"} and contents[0]["options"]["length"] == 8192
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and lines[1].split(" s  ")[1] == "times   delta  form: said"
    assert [row["op"] for row in log.without] == ["gated"] and log.failed
    log.tables()
    printed = capsys.readouterr().out
    assert "Checks" in printed and "delta_attention" in printed and "1.5" in printed


def test_times_of_an_op_with_wrong_results_are_marked(tmp_path, capsys):
    rows = [("long", "delta", "wrong"), ("times", "delta", "done"), ("times", "gated", "done")]
    log, contents = log_of(tmp_path, rows)
    wrong, marked, unmarked = capsys.readouterr().out.splitlines()
    assert "WRONG: said" in wrong and "are wrong" in marked and "wrong" not in unmarked.lower()
    assert "note" in contents[-1]["rows"][1] and log.failed and len(log.wrong) == 1


@pytest.mark.parametrize(
    "status, failed",
    [("done", False), ("out of memory", False), ("stopped", False), ("not started", False), ("failed", True)],
)
def test_the_exit_code_is_about_faults(tmp_path, status, failed):
    log, _ = log_of(tmp_path, [("shapes", "delta", status)])
    assert log.failed == failed


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--tile", "write=64,64,4,3"], "'write=64,64,4,3' is not KERNEL=ROWS,COLUMNS,WARPS,STAGES"),
        (["--tile", "write_forward=64,64,4"], "is not KERNEL=ROWS"),
        (["--tile", "write_forward=64,48,4,3"], "columns must be one of 16, 32, 64, 128, 256"),
        (["--tile", "tied_backward=128,64,8,3"], "rows must be one of 16, 32, 64"),
        (["--length", "-5"], "'-5' is not a positive whole number"),
        (["--only", "kernels", "--op", "gated"], "leave out --op gated"),
        (["--json", "/no/such/folder/x.json"], "the folder does not exist"),
    ],
)
def test_a_wrong_argument_is_one_line(capsys, arguments, says):
    with pytest.raises(SystemExit) as ended:
        gpu.parse(arguments)
    said = capsys.readouterr().err
    assert ended.value.code == 2 and says in said and said.count("\n") == 1, said


def test_without_a_gpu_it_says_so():
    program = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--quick"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(program, capture_output=True, text=True, timeout=60, env=environment)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == ("benchmarks/gpu.py: error: no NVIDIA GPU found: this program needs one, and JAX finds cpu\n")
