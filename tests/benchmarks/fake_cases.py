"""Cases for the tests of benchmarks/cases.py. They append what they do to a file."""

import os
import signal
import sys
import time


def _note(path, *words):
    with open(path, "a") as file:
        file.write(" ".join(map(str, words)) + "\n")


def good(worker, number, path, alone=0.0, prepare=0.0):
    _note(path, "begin", number)
    time.sleep(prepare)
    print("a print is no message")
    with worker.alone():
        _note(path, "in", number, time.monotonic())
        time.sleep(alone)
        _note(path, "out", number, time.monotonic())
    worker.result(f"{number} is good", number=number)
    worker.result(f"{number} is wrong", wrong=True)


def fails(worker):
    worker.at("shape 3")
    worker.result("the first half")
    with worker.alone():
        raise RuntimeError("RESOURCE_EXHAUSTED: 5 bytes\nand much more")


def leaves(worker):
    sys.exit("the last line")


def dies(worker):
    os.kill(os.getpid(), signal.SIGKILL)


def hangs(worker, path, alone):
    if not alone:
        time.sleep(600)
    with worker.alone():
        _note(path, "pid", os.getpid())
        time.sleep(600)
