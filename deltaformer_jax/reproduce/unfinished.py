"""DIR/NAME/LABEL/: the partial work of a cell that was stopped, from which the next invocation resumes.

The file MARKER in a folder shows that this program made it. A folder without it is refused and never removed.
"""

from __future__ import annotations

import json
import time
from typing import Any

from etils import epath

from deltaformer_jax.config import ModelConfig, OptimizerConfig
from deltaformer_jax.host.paths import write_whole

MARKER = "made_by_deltaformer_jax_reproduce.txt"
STAGES = "stages"  # the folder of a cell's runs, which have a folder each
PROGRESS, SECONDS = "progress.json", "seconds.json"
FORMER = "unfinished.msgpack"  # the file in which earlier versions kept a cell's state
SAVE_EVERY = 60.0  # seconds between two saves of a state
ADVICE = "give another --out, or --force to start anew"


def claim(folder: epath.Path) -> None:
    """Make a cell's folder and mark it with MARKER. Raises ValueError if it holds files but no MARKER."""
    if (folder / MARKER).exists():
        return
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"--out: {folder} is there and not made by this program; move it away, or give another --out")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).write_text("deltaformer_jax.reproduce keeps unfinished work here; --force removes this folder.\n")


def release(folder: epath.Path) -> None:
    """Remove a finished cell's stages and the files of `save` and `Clock`; and the folder, if nothing else is in it."""
    if not (folder / MARKER).exists():
        return
    if (folder / STAGES).exists():
        (folder / STAGES).rmtree()
    for name in (PROGRESS, SECONDS):
        (folder / name).unlink(missing_ok=True)
    if [path.name for path in folder.iterdir()] == [MARKER]:
        folder.rmtree()
        _remove_if_empty(folder.parent)


def remove_all(parent: epath.Path) -> list[str]:
    """Remove the marked folders in `parent`, and `parent` itself if it is then empty. Returns the names still there."""
    if not parent.is_dir():
        return []
    for folder in parent.iterdir():
        if (folder / MARKER).exists():
            folder.rmtree()
    return _remove_if_empty(parent)


def _remove_if_empty(folder: epath.Path) -> list[str]:
    left = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    if not left and folder.exists():
        folder.rmtree()
    return left


def same_settings(kept: dict[str, Any], settings: dict[str, Any]) -> bool:
    """Whether the settings in a file are those of a cell.

    A field of the model or of the optimiser that the file lacks did not exist when the file was written. A new field is
    off by default, so the file's settings are the cell's if the cell has the default.
    """
    filled, now = dict(kept), json.loads(json.dumps(settings))
    for section, config in (("model", ModelConfig()), ("optimizer", OptimizerConfig())):
        fields, ours = kept.get(section), now.get(section)
        if isinstance(fields, dict) and isinstance(ours, dict):
            defaults = json.loads(json.dumps({name: x for name, x in vars(config).items() if name in ours}))
            filled[section] = {**defaults, **fields}
    return filled == now


def save(folder: epath.Path, settings: dict[str, Any], progress: dict[str, Any]) -> None:
    """Write a cell's progress, plain JSON, with the cell's settings."""
    write_whole(folder / PROGRESS, json.dumps({"settings": settings, "progress": progress}).encode())


def load(folder: epath.Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The progress that `save` wrote; None if there is none.

    Raises ValueError for a file with other settings, a damaged file, and a file of an earlier version.
    """
    if (folder / FORMER).exists():
        raise ValueError(f"--out: {folder / FORMER} is of an earlier version, in a format no longer read; {ADVICE}")
    path = folder / PROGRESS
    if not path.exists():
        return None
    try:
        saved = json.loads(path.read_text())
        kept, progress = saved["settings"], dict(saved["progress"])
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"--out: {path} is damaged; {ADVICE}") from None
    if not same_settings(kept, settings):
        raise ValueError(
            f"--out: {path} holds other settings than this version's, or those of the other form (--quick or full); "
            f"{ADVICE}"
        )
    return progress


class Clock:
    """A cell's running time over all invocations, by machine; and `requested`, which passes on an Interruption's.

    parts: [{"machine", "seconds"}], with the present machine last. Reading `requested` also writes the parts to a file,
    at most every ten seconds, if the cell has claimed its folder. A cell that keeps no partial work starts its time
    anew too.
    """

    EVERY = 10.0

    def __init__(self, folder: epath.Path, stop: Any, machine: dict[str, Any]):
        self._folder, self._stop = folder, stop
        parts = []
        if (folder / MARKER).exists() and (folder / SECONDS).exists():
            try:
                parts = [
                    {"machine": dict(part["machine"]), "seconds": float(part["seconds"])}
                    for part in json.loads((folder / SECONDS).read_text())
                ]
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"--out: {folder / SECONDS} is damaged; {ADVICE}") from None
        if not parts or parts[-1]["machine"] != machine:
            parts.append({"machine": machine, "seconds": 0.0})
        self._parts, self._before = parts, parts[-1]["seconds"]
        self._start = self._saved = time.perf_counter()

    @property
    def parts(self) -> list[dict[str, Any]]:
        now = round(self._before + time.perf_counter() - self._start, 3)
        return [*self._parts[:-1], {**self._parts[-1], "seconds": now}]

    @property
    def requested(self) -> bool:
        if time.perf_counter() > self._saved + self.EVERY:
            self.save()
        return self._stop.requested

    def save(self) -> None:
        self._saved = time.perf_counter()
        if (self._folder / MARKER).exists():
            write_whole(self._folder / SECONDS, json.dumps(self.parts).encode())
