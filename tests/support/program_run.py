"""Runs train.py in a separate process, and removes from its stderr the lines that libraries print in every process."""

import subprocess
import sys
from pathlib import Path

WARNINGS = "error,ignore:the load_module() method is deprecated:DeprecationWarning"

# A model so small that a test of the program is about the program.
SMALL = (
    "--config.data.sequence_length=32",
    "--config.data.batch_size=8",
    "--config.model.d_model=32",
    "--config.model.num_layers=2",
    "--config.model.num_heads=2",
    "--config.model.num_kv_heads=2",
    "--config.model.head_dim=16",
    "--config.model.implementation=parallel",
)

PREAMBLE = "WARNING: All log messages before absl::InitializeLog() is called are written to STDERR"


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


def ours(stderr: str) -> str:
    """`stderr` without the lines in which JAX's CUDA plugin says that there is no GPU.

    The plugin is installed because jax-triton needs it. It prints these lines when it is loaded; no setting stops it.
    """
    lines = stderr.splitlines(keepends=True)
    return "".join(line for line in lines if line.rstrip() != PREAMBLE and "cudart_stub.cc" not in line)
