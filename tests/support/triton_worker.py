"""A worker process with Triton's interpreter that answers the tests' requests.

It is a separate process because the interpreter must be chosen before Triton is first imported.
"""

from __future__ import annotations

import os
import pickle
import struct
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def send(stream, thing):
    data = pickle.dumps(thing)
    stream.write(struct.pack("<Q", len(data)) + data)
    stream.flush()


def receive(stream):
    header = stream.read(8)
    if len(header) < 8:
        raise EOFError("the interpreter's process has ended: its error is above")
    return pickle.loads(stream.read(struct.unpack("<Q", header)[0]))


class Worker:
    """`Worker()(name, *arguments)` calls the function `name` of triton_interpreter.py in the worker process."""

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "triton_interpreter.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": os.pathsep.join((str(HERE.parent), str(HERE.parents[1])))},
        )

    def __call__(self, name, *arguments):
        send(self.process.stdin, (name, arguments))
        return receive(self.process.stdout)

    def close(self):
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()
