"""Starts the several processes of a run on this machine: each its own train.py with its own simulated devices."""

import os
import signal
import socket
import subprocess
import time
from pathlib import Path

from support.program_run import SMALL, finish, start

FLAGS = (
    *SMALL,
    "--config.run.log_every=1",
    "--config.run.eval_every=10",
    "--config.run.eval_batches=2",
    "--config.run.checkpoint_every=7",
    "--config.run.sample_prompt=",
)


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def environment(devices, **more):
    return {**os.environ, "JAX_NUM_CPU_DEVICES": str(devices), **more}


class Several:
    """The processes of one run. `with Several(...) as run`: what still runs at the end is killed.

    each: flags of single processes, {index: (flag, ...)}. by_variables: each is told its place so, not by flags.
    variables: more of them, of all.
    """

    def __init__(self, count, more_flags, folder, devices=2, each=None, by_variables=False, variables=None):
        where = f"127.0.0.1:{free_port()}"

        def begin(index):
            flags = [*FLAGS, *more_flags, *(each or {}).get(index, ())]
            flags.sort(key=lambda flag: not flag.startswith("--config="))  # it is read before its fields
            place = {"coordinator": where, "processes": count, "process": index}
            if not by_variables:
                flags += [f"--{name}={value}" for name, value in place.items()]
                return start(flags, environment(devices, **variables or {}), folder)
            names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
            told = {name: str(value) for name, value in zip(names, place.values())}
            return start(flags, environment(devices, **told, **variables or {}), folder)

        self.processes = [begin(index) for index in range(count)]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            if process.poll() is None:
                process.kill()
                process.communicate()

    def finish(self, timeout=400):
        """[(code, stdout, stderr)] of all, in their order."""
        end = time.monotonic() + timeout
        return [finish(process, max(1.0, end - time.monotonic())) for process in self.processes]

    def child(self, index):
        """The process id of the program itself, the child of the one that was started; None if it has ended."""
        found = subprocess.run(["pgrep", "-P", str(self.processes[index].pid)], capture_output=True, text=True)
        return int(found.stdout.split()[0]) if found.stdout else None

    def wait_for_line(self, text, index=0):
        """Until this process prints a line with `text`, which finish() then lacks."""
        for line in self.processes[index].stdout:
            if text in line:
                return
        raise AssertionError(self.processes[index].communicate())

    def wait_for_step(self, workdir, step, seconds=300):
        """Until metrics.jsonl has the record of `step`."""
        end, path = time.monotonic() + seconds, Path(workdir) / "metrics.jsonl"
        while time.monotonic() < end:
            if path.exists() and f'{{"step": {step}, "loss"' in path.read_text():
                return
            if any(process.poll() for process in self.processes):
                break
            time.sleep(0.02)
        for process in self.processes:
            process.send_signal(signal.SIGKILL)
        raise AssertionError([process.communicate() for process in self.processes])
