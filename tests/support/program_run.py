"""train.py in a process of its own."""

import subprocess
import sys
from pathlib import Path

from support.program_output import ours

WARNINGS = "error,ignore:the load_module() method is deprecated:DeprecationWarning"


def start(arguments, environment, folder):
    return subprocess.Popen(
        [sys.executable, str(Path(__file__).parents[2] / "train.py"), *arguments],
        env=environment,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process, timeout=120):
    out, err = process.communicate(timeout=timeout)
    return process.returncode, out, ours(err)
