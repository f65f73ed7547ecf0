"""XLA's banner about slow compilations does not reach stderr, and everything else does."""

import subprocess
import sys

import pytest

from deltaformer_jax.host.compiler_alarm import without_banner

STARS = "*" * 32
ASK = "Very slow compile? If you want to file a bug, run with envvar XLA_FLAGS=--xla_dump_to=/tmp/foo and attach ..."
HEAD = "E0000 00:00:1795798837.423552    7601 slow_operation_alarm.cc:73] "
END = "E0000 00:00:1795798837.423552    7601 slow_operation_alarm.cc:140] The operation took 2m12.850942799s"
FIRST = [HEAD, STARS, f"[Compiling module jit_step] {ASK}", STARS]
LAST = [END, "", *FIRST[1:]]
# The same file's alarm about something else.
FOLDING = [HEAD + "Constant folding an instruction is taking > 1s:", "", "  %pad.1 = f32[8] pad(...)"]
ERROR = ["E0000 an error that another thread logged", "more of it"]
FOLDED = [END, "Constant folding an instruction is taking > 1s:", ""]


@pytest.mark.parametrize(
    ("lines", "left"),
    [
        (FIRST, []),
        (LAST, []),
        (["a", *FIRST, "b", *LAST, "c"], ["a", "b", "c"]),
        ([*FIRST, *LAST], []),
        (FOLDING, FOLDING),
        (FOLDED, FOLDED),
        ([*FOLDED, *FIRST, *FOLDING], [*FOLDED, *FOLDING]),
        ([HEAD], [HEAD]),
        ([*FIRST[:2], *ERROR], ERROR),
        ([STARS, "a text of ours", STARS], [STARS, "a text of ours", STARS]),
        (["", "Traceback", ""], ["", "Traceback", ""]),
    ],
)
def test_the_banner_alone_is_left_out(lines, left):
    encoded = [f"{line}\n".encode() for line in lines]
    assert list(without_banner(encoded)) == [f"{line}\n".encode() for line in left]


PROGRAM = f"""
import os, sys, time
from deltaformer_jax.host import compiler_alarm
compiler_alarm.AFTER = float(sys.argv[1])
os.write(2, b"before\\n")
with compiler_alarm.without_alarm():
    time.sleep(0.3)
    os.write(2, {chr(10).join(["an error", *FIRST, ""]).encode()!r})
    print("python's own", file=sys.stderr)
    if sys.argv[2] == "abort":
        os.abort()
os.write(2, b"after\\n")
"""


def stderr(after, how):
    done = subprocess.run([sys.executable, "-c", PROGRAM, after, how], capture_output=True, text=True, timeout=60)
    return done.stderr.splitlines()


def test_stderr_of_a_process():
    assert stderr("0.01", "end") == ["before", "an error", "python's own", "after"]
    assert stderr("100", "end") == ["before", "an error", *FIRST, "python's own", "after"]


def test_a_crash_loses_nothing():
    assert stderr("0.01", "abort")[:3] == ["before", "an error", "python's own"]
