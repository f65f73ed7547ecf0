"""DIR/NAME/LABEL/: what a cell that was stopped has done so far, so that the next invocation goes on from there.

A folder is the program's own by the file MARKER in it; one that is there without it is refused and never removed.
"""

from __future__ import annotations

import json
import time
from typing import Any

import jax
import numpy as np
from etils import epath

MARKER = "made_by_deltaformer_jax_reproduce.txt"
STATE, SECONDS = "unfinished.msgpack", "seconds.json"
SAVE_EVERY = 60.0  # seconds between two saves of a state
ADVICE = "give another --out, or --force to start anew"


def claim(folder: epath.Path) -> None:
    """Make a cell's folder, marked. Raises ValueError for one that holds files and no mark."""
    if (folder / MARKER).exists():
        return
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"--out: {folder} is there and not made by this program; move it away, or give another --out")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).write_text("deltaformer_jax.reproduce keeps unfinished work here; --force removes this folder.\n")


def release(folder: epath.Path) -> None:
    """Remove what `save` and `Clock` wrote, and the folder if that was all. What else a cell keeps there stays."""
    if not (folder / MARKER).exists():
        return
    for name in (STATE, SECONDS):
        (folder / name).unlink(missing_ok=True)
    if [path.name for path in folder.iterdir()] == [MARKER]:
        folder.rmtree()
        _remove_if_empty(folder.parent)


def remove_all(parent: epath.Path) -> list[str]:
    """Remove the marked folders in `parent`, and `parent` if nothing is left; the names of what is left."""
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


def _write(path: epath.Path, content: bytes) -> None:
    part = path.parent / (path.name + ".part")  # an interruption leaves the old file or the new one
    part.write_bytes(content)
    part.replace(path)


def save(folder: epath.Path, settings: dict[str, Any], state: Any, progress: dict[str, Any]) -> None:
    """Keep a pytree of arrays, and progress in plain JSON, of the cell that `settings` describes."""
    from flax import serialization

    claim(folder)
    leaves = {str(number): np.asarray(leaf) for number, leaf in enumerate(jax.tree.leaves(state))}
    words = json.dumps({"settings": settings, "progress": progress})
    _write(folder / STATE, serialization.msgpack_serialize({"leaves": leaves, "words": words}))


def load(folder: epath.Path, settings: dict[str, Any], like: Any) -> tuple[Any, dict[str, Any]] | None:
    """What `save` kept, placed like `like`'s arrays, and the progress; None if there is none.

    Raises ValueError for a file of other settings, or one that is damaged.
    """
    from flax import serialization

    path = folder / STATE
    if not (folder / MARKER).exists() or not path.exists():
        return None
    try:
        saved = serialization.msgpack_restore(path.read_bytes())
        words = json.loads(saved["words"])
        kept, progress = words["settings"], words["progress"]
        leaves = [saved["leaves"][str(number)] for number in range(len(saved["leaves"]))]
    except Exception:  # msgpack has its own kinds, and none of them says more
        raise ValueError(f"--out: {path} is damaged; {ADVICE}") from None
    old, structure = jax.tree.flatten(like)
    shapes = lambda arrays: [(array.shape, array.dtype) for array in arrays]
    if kept != json.loads(json.dumps(settings)) or shapes(leaves) != shapes(old):
        raise ValueError(f"--out: {path} is of other settings than this version's or form's; {ADVICE}")
    # A copy: the training step gives its state's memory away.
    placed = [jax.device_put(new, leaf.sharding, may_alias=False) for new, leaf in zip(leaves, old)]
    return jax.tree.unflatten(structure, placed), progress


class Clock:
    """`requested`, an Interruption's, and the seconds of a cell over all invocations, by machine.

    parts: [{"machine", "seconds"}], the present machine's last. Asking `requested` keeps them every ten seconds, if the
    cell keeps anything else: one that begins anew takes its time anew.
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
            _write(self._folder / SECONDS, json.dumps(self.parts).encode())
