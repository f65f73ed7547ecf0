"""Follows a run in Weights & Biases (`run.wandb`) and in Trackio (`run.trackio`), each step once.

metrics.jsonl and statistics.jsonl are the truth. A tracker gets one row per step, in the order of the steps. What it
holds of steps after the one that training starts from (of a process that was killed, or before a rollback) is replaced:

  wandb, offline   the run's older folders in DIR/wandb are deleted, and all rows are written again
  wandb, online    a resumed run goes on in the same W&B run, from the step that W&B has; after a rollback, which W&B
                   cannot undo, the rows are written to a new W&B run
  trackio          the run is deleted from Trackio's local database, and all rows are written again

The run's name there is the workdir's, with an id that is kept in DIR/trackers.json.
"""

import importlib.util
import json
import os
import secrets
import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from etils import epath

from deltaformer_jax.config import Config, RunConfig
from deltaformer_jax.config.saved import to_json
from deltaformer_jax.host.called import install
from deltaformer_jax.training.watch.scalars import scalars

ID_FILE = "trackers.json"
PACKAGES = ("wandb", "trackio")
# Variables with which Trackio would send to a server, where a run cannot be replaced.
REMOTE = ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL")


def check_trackers(settings: RunConfig) -> None:
    """Raise ValueError, naming the field, for a tracker that is asked for and cannot be used."""
    for name in PACKAGES:
        if getattr(settings, name) and importlib.util.find_spec(name) is None:
            raise ValueError(f"run.{name} = True: needs {name}, which is not installed: {install(name)}")
    for variable in REMOTE:
        if settings.trackio and os.environ.get(variable):
            raise ValueError(
                f"run.trackio = True: {variable} is set, but only Trackio's local database is written; unset it, and "
                "send the finished run with `trackio sync`"
            )


def make_trackers(config: Config, workdir: epath.Path, history: Iterable[dict[str, Any]]) -> list["Tracker"]:
    """The trackers that the config asks for. They hold the records of `history`, the run's so far, and nothing else."""
    kinds = [kind for kind, asked in ((WandB, config.run.wandb), (Trackio, config.run.trackio)) if asked]
    history = list(history)
    return [kind(config, workdir, history) for kind in kinds]


class Tracker:
    """Call `write` with each record, `cut` after a rollback and `close` at the end.

    Records of a step are gathered into one row. It is sent when a record that is two or more steps newer comes: the
    statistics of step n + 1 are written before the loss of step n.
    """

    def __init__(self, config: Config, workdir: epath.Path, history: list[dict[str, Any]]):
        self._project, self._workdir, self._config = config.run.project, epath.Path(workdir), to_json(config)
        self._history: list[dict[str, Any]] = []
        self._rows: dict[int, dict[str, int | float]] = {}
        self._begin(self._id(), history)

    def _id(self, new: bool = False) -> str:
        """The id in DIR/trackers.json. It is made if there is none, or with `new`."""
        path = self._workdir / ID_FILE
        if path.exists() and not new:
            return json.loads(path.read_text())["id"]
        identity = secrets.token_hex(4)
        path.write_text(json.dumps({"id": identity}) + "\n")
        return identity

    def _begin(self, identity: str, history: list[dict[str, Any]]) -> None:
        self._first = self._open(identity)
        self._history = sorted(history, key=lambda record: record["step"])
        for record in self._history:
            self._gather(record)

    def write(self, record: dict[str, Any]) -> None:
        self._history.append(record)
        self._gather(record)

    def _gather(self, record: dict[str, Any]) -> None:
        self._send(before=record["step"] - 1)
        # Steps that are there were sent by a process that was killed: from the same state they have the same values.
        if record["step"] >= self._first and (values := scalars(record)):
            self._rows.setdefault(record["step"], {}).update(values)

    def _send(self, before: float) -> None:
        for step in sorted(step for step in self._rows if step < before):
            self._log(self._rows.pop(step), step)

    def cut(self, step: int) -> None:
        """Drop what was written after `step`, to which the run has gone back."""
        self._rows = {}
        self._finish()
        history = [record for record in self._history if record["step"] <= step]
        self._begin(self._id_after_cut(), history)

    def close(self) -> None:
        self._send(before=float("inf"))
        self._finish()

    # What each service does in its own way.

    def _open(self, identity: str) -> int:
        """Begin or continue the run there. Returns the first step that is not there yet."""
        raise NotImplementedError

    def _id_after_cut(self) -> str:
        return self._id()

    def _log(self, values: dict[str, int | float], step: int) -> None:
        raise NotImplementedError

    def _finish(self) -> None:
        raise NotImplementedError


class WandB(Tracker):
    """Weights & Biases. Its own files go to DIR/wandb, or for a workdir on an object store to where it likes."""

    def _open(self, identity: str) -> int:
        import wandb

        local = None if "://" in str(self._workdir) else str(self._workdir)
        for folder in Path(local or ".", "wandb").glob(f"offline-run-*-{identity}"):
            _remove(folder)
        try:
            self._run = wandb.init(
                project=self._project,
                id=identity,
                name=self._workdir.name,
                dir=local,
                config=self._config,
                resume=None if wandb.setup().settings.mode == "offline" else "allow",
                settings=wandb.Settings(console="off"),  # the live bar would fill its log
            )
        except wandb.errors.Error as error:
            raise ValueError(
                f"run.wandb = True: {' '.join(str(error).split())}; call `wandb login`, or set WANDB_MODE=offline"
            ) from None
        return self._run.starting_step

    def _id_after_cut(self) -> str:
        return self._id(new=not self._run.offline)

    def _log(self, values: dict[str, int | float], step: int) -> None:
        self._run.log(values, step=step, commit=True)

    def _finish(self) -> None:
        self._run.finish()


class Trackio(Tracker):
    """Trackio's database on this machine, in TRACKIO_DIR or where Trackio likes; `trackio show` draws it."""

    def _open(self, identity: str) -> int:
        import trackio

        name = f"{self._workdir.name}-{identity}"
        try:
            runs = list(trackio.Api().runs(self._project))
        except ValueError:  # no such project yet
            runs = []
        for run in runs:
            if run.name == name:
                run.delete()
        self._run = trackio.init(
            project=self._project, name=name, config=self._config, embed=False, auto_log_gpu=False, auto_log_cpu=False
        )
        return 0

    def _log(self, values: dict[str, int | float], step: int) -> None:
        self._run.log(values, step=step)

    def _finish(self) -> None:
        import trackio

        trackio.finish()


def _remove(folder: Path) -> None:
    try:
        shutil.rmtree(folder)
    except OSError:  # the service of a killed process was still writing there
        time.sleep(2)
        shutil.rmtree(folder)
