"""A run's folder, examined before jax is imported: does it hold a run, at which step, and is that run finished?"""

import contextlib
import json
import os
import time
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from etils import epath

from deltaformer_jax.config import Config
from deltaformer_jax.config.lines import lines
from deltaformer_jax.config.saved import Saved, check_resumable
from deltaformer_jax.host import processes
from deltaformer_jax.host.lock import lock_file
from deltaformer_jax.host.spelling import nearest
from deltaformer_jax.processes import common
from deltaformer_jax.processes.child import STACKS_FOLDER
from deltaformer_jax.training.checkpoints.checksums import CHECKSUMS, CheckpointError, check_checksums

LOCK = "train"  # the name of the lock that lets only one training at a time use a folder
SHARED_SECONDS = 15.0  # in which the others see a file that process 0 wrote


class Standing(NamedTuple):
    """`line` says whether the run is new or resumed, and at which step. `finished`: it has nothing left to do."""

    line: str
    finished: bool = False


def new_workdir(name: str) -> str:
    """runs/DATE-TIME-NAME, with a number appended if that folder exists.

    Raises ValueError if this is one of several processes, which would not agree on a time.
    """
    if processes.count() > 1:
        raise ValueError("--workdir: missing; give one, since the processes of a run must share it")
    stem = f"{datetime.now():%Y%m%d-%H%M%S}-{name}"
    candidates = (Path("runs") / (stem if i == 0 else f"{stem}-{i}") for i in range(1000))
    return str(next(path for path in candidates if not path.exists()))


def saved_run(config: Config, workdir: epath.Path) -> Saved | None:
    """What the run in `workdir` was started with; None if there is no folder, or only a lock or stacks in it.

    Raises ValueError if `config` differs from it in a setting that may not change, if `workdir` is a file, or if it
    holds files but no run.
    """
    if not workdir.exists():
        return None
    if not workdir.is_dir():
        raise ValueError(f"--workdir {workdir}: is a file; give a folder")
    if not (workdir / Saved.FILE).exists():
        if any(path.name not in (lock_file(LOCK), STACKS_FOLDER) for path in workdir.iterdir()):
            raise ValueError(
                f"--workdir {workdir}: has files but no {Saved.FILE}, so it holds no run; give another folder"
            )
        return None
    saved = Saved.read(workdir)
    check_resumable(saved.config, config, workdir)
    return saved


def standing(workdir: str, config: Config, resume: bool) -> Standing:
    """The standing of the run in `workdir`, which `config` is about to start or resume. Writes nothing.

    Raises ValueError or FileNotFoundError for a run with other settings, for an invalid config.json and, with `resume`,
    for a folder without a run.
    """
    folder = epath.Path(workdir)
    if resume and not (folder / Saved.FILE).exists():
        raise ValueError(f"--resume: --workdir {workdir} holds no run{_nearest_run(folder)}")
    saved = saved_run(config, folder)
    if saved is None:
        return Standing(f"new run in {workdir}")
    step, steps = _newest_whole(folder / "checkpoints"), config.run.steps
    # A run with other data is refused later, when the data are opened.
    same_data = saved.config.data == config.data
    if step == steps and same_data and _is_evaluated(folder, config) and _is_whole(folder / "checkpoints" / str(step)):
        return Standing(
            f"nothing to do: the run in {workdir} has made its {steps} steps; for more, give "
            f"--config.run.steps={2 * steps}",
            finished=True,
        )
    if step is not None and step > steps:
        raise ValueError(f"run.steps = {steps}: the run in {workdir} has made {step} steps; give a larger run.steps")
    if step is None:
        return Standing(f"going on at step 0 of {steps}: the run in {workdir}, which has saved no checkpoint yet")
    return Standing(f"going on at step {step} of {steps}: the run in {workdir}")


def has_checkpoint(workdir: str) -> bool:
    """Whether a run in `workdir` would go on from a checkpoint of its own."""
    return _newest_whole(epath.Path(workdir) / "checkpoints") is not None


def check_shared(workdir: str) -> None:
    """Raise ValueError, in every process of a run, unless all see the lock file that the first one holds.

    An address such as gs://bucket/run is the same for all. A disk of a network may take a while to show a new file.
    """
    if processes.count() == 1 or "://" in workdir:
        return
    path = Path(workdir, lock_file(LOCK))
    text = common.first("text of the lock", path.read_text)
    seen = common.gather("workdir", _appears(path, text))
    if not all(seen):
        raise ValueError(
            f"--workdir {workdir}: process {seen.index(False)} does not see the file {path.name} that process 0 wrote "
            "there; give the full path of a folder on a disk that all hosts share, or gs://..."
        )


def _appears(path: Path, text: str) -> bool:
    end = time.monotonic() + SHARED_SECONDS
    while True:
        with contextlib.suppress(OSError):
            os.listdir(path.parent.parent)  # so that NFS looks for new files
            if path.read_text() == text:
                return True
        if time.monotonic() > end:
            return False
        time.sleep(0.1)


def _newest_whole(checkpoints: epath.Path) -> int | None:
    """The newest step whose save was finished. Its checksums are not verified."""
    if not checkpoints.exists():
        return None
    steps = [int(path.name) for path in checkpoints.iterdir() if path.name.isdigit() and (path / CHECKSUMS).exists()]
    return max(steps, default=None)


def _is_evaluated(folder: epath.Path, config: Config) -> bool:
    """Whether the final evaluation was made. A run that was stopped just before it makes it when it is resumed."""
    if not config.run.eval_every:
        return True
    path = folder / "metrics.jsonl"
    for line in reversed(lines(path.read_text()) if path.exists() else []):
        try:
            record = json.loads(line)
            if record["step"] == config.run.steps and "eval_loss" in record:
                return True
        except (ValueError, KeyError, TypeError):
            continue  # the incomplete line of a run that was killed
    return False


def _is_whole(checkpoint: epath.Path) -> bool:
    try:
        check_checksums(checkpoint)
    except CheckpointError:
        return False  # the run is resumed from the checkpoint before, and says so
    return True


def _nearest_run(folder: epath.Path) -> str:
    """The end of an error: "; did you mean DIR?", or the runs in the same folder."""
    beside = folder.parent
    if not beside.exists():
        return "; there is no such folder"
    runs = sorted(path.name for path in beside.iterdir() if (path / Saved.FILE).exists())
    if near := nearest(folder.name, runs):
        return f"; did you mean {beside / near}?"
    return f"; beside it there are {', '.join(runs[-5:])}" if runs else "; without --resume a new run starts there"
