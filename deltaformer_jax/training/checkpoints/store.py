"""Saving and restoring checkpoints: orbax writes them in the background, this package adds checksums.

DIR/checkpoints/STEP/ holds `state` (the TrainState), `run` (position in the data, config, tokenizer hash, dtypes and
shapes) and, written last, `sha256.json`. A folder without sha256.json, or one whose files do not match it, does not
count as a checkpoint. The checksums are needed because orbax restores flipped bytes without an error.
"""

import concurrent.futures
import contextlib
import re
from collections.abc import Iterator
from typing import Any

import jax
from etils import epath

from deltaformer_jax.host.claim import check_claim
from deltaformer_jax.processes import common
from deltaformer_jax.training.checkpoints.checksums import (
    CHECKSUMS,
    CheckpointError,
    check_checksums_together,
    write_checksums,
)
from deltaformer_jax.training.state import TrainState
from deltaformer_jax.training.workdir import LOCK

UNFINISHED = ".orbax-checkpoint-tmp"  # in the name of a folder that orbax is writing


class SaveError(RuntimeError):
    """A save that failed, for example on a full disk. The message is one line."""


class Checkpoints:
    """The checkpoints of one run. `keep`: how many of the newest are kept on disk."""

    def __init__(self, folder: epath.PathLike, keep: int = 1):
        import orbax.checkpoint as ocp

        self._ocp = ocp
        self._folder = epath.Path(folder)
        if "://" not in str(folder):
            self._folder = self._folder.absolute()  # orbax refuses relative paths, but only at the first save
        self._manager = ocp.CheckpointManager(
            self._folder,
            options=ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, enable_async_checkpointing=True),
            item_names=("state", "run"),
        )
        self._sealer = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint-sealer")
        self._sealing: concurrent.futures.Future | None = None
        self._failed = False

    def _mark(self, step: int) -> epath.Path:
        return self._folder / f"saving-{step}"

    def path(self, step: int) -> epath.Path:
        return self._folder / str(step)

    def steps(self) -> list[int]:
        """The steps that have a checkpoint folder, oldest first, whole or not."""
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState, run: dict[str, Any]) -> None:
        """Start saving. Returns when the state has been copied from the devices, which may then reuse its memory.

        Waits for the previous save first, and raises SaveError if that one failed.
        """
        self.wait()
        step = int(run["step"])
        with self._named(step):
            if jax.process_index() == 0:
                check_claim(str(self._folder.parent), LOCK)
                self._mark(step).write_text("being saved; not whole until this file is gone\n")
            saved = self._manager.save(
                step,
                args=self._ocp.args.Composite(
                    state=self._ocp.args.StandardSave(state),
                    run=self._ocp.args.JsonSave({**run, "arrays": _signatures(state)}),
                ),
            )
        if not saved:
            raise CheckpointError(f"{self.path(step)}: orbax refused to save step {step}; its steps are {self.steps()}")
        self._sealing = self._sealer.submit(self._seal, step)

    def _seal(self, step: int) -> None:
        # Runs in its own thread: hashing some gigabytes must not block training either.
        with self._named(step):
            self._manager.wait_until_finished()
            write_checksums(self.path(step))
            if jax.process_index() == 0:
                self._mark(step).unlink()

    @contextlib.contextmanager
    def _named(self, step: int) -> Iterator[None]:
        """Turns errors of orbax and the disk into a SaveError that names the step and the newest whole checkpoint."""
        try:
            yield
        except (OSError, ValueError, RuntimeError) as error:
            whole = [other for other in self.steps() if other != step and (self.path(other) / CHECKSUMS).exists()]
            left = f"the newest whole checkpoint is {whole[-1]}" if whole else "there is no whole checkpoint"
            reason = error.strerror if isinstance(error, OSError) and error.strerror else _first_line(error)
            self._failed = True
            raise SaveError(f"{self.path(step)}: not saved: {reason}; {left}") from error

    def wait(self) -> None:
        """Wait until the save under way is whole on disk, checksums included. Raises SaveError if it failed."""
        if self._sealing is not None:
            sealing, self._sealing = self._sealing, None
            sealing.result()

    def poll(self) -> None:
        """Raise SaveError if the save under way has already failed. Never waits."""
        if self._sealing is not None and self._sealing.done():
            self.wait()

    def restore_newest(self, abstract: TrainState, note) -> tuple[TrainState, dict[str, Any]]:
        """(state, `run` record) of the newest whole checkpoint. Calls `note(text)` for each damaged newer one.

        Raises CheckpointError if no checkpoint is whole. Changes nothing on disk.
        """
        problems = []
        for step in reversed(self.steps()):
            try:
                check_checksums_together(self.path(step))
            except CheckpointError as error:
                problems.append(str(error))
                continue
            for problem in problems:
                note(f"damaged, not used: {problem}; going back to step {step}")
            return self.restore(step, abstract)
        raise CheckpointError(
            f"{self._folder}: no whole checkpoint. " + "; ".join(problems or ["there is none"]) + ". "
            "Restore the folder from a copy, or start a new run in another --workdir"
        )

    def restore(self, step: int, abstract: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """(state, `run` record) of `step`; the state has the shapes and shardings of `abstract`.

        Check its checksums before. Raises CheckpointError if dtypes or shapes differ.
        """
        run = self.run_record(step)
        expected = _signatures(abstract)
        if run["arrays"] != expected:
            # orbax would silently cast, for example float32 to bfloat16 or back.
            names = sorted(
                name for name in {*run["arrays"], *expected} if run["arrays"].get(name) != expected.get(name)
            )
            name = names[0]
            raise CheckpointError(
                f"{self.path(step)}: holds other arrays than this run's: {name} is {run['arrays'].get(name)} in the "
                f"checkpoint and {expected.get(name)} in the run ({len(names)} differ)"
            )
        restored = self._manager.restore(
            step, args=self._ocp.args.Composite(state=self._ocp.args.StandardRestore(abstract))
        )
        return restored["state"], run

    def run_record(self, step: int) -> dict[str, Any]:
        restored = self._manager.restore(step, args=self._ocp.args.Composite(run=self._ocp.args.JsonRestore()))
        return restored["run"]

    def settle(self) -> None:
        """Clean up after a process that was killed between orbax's last write and this package's checksums.

        If an older checkpoint is whole, the unfinished one is deleted. Otherwise it gets its checksums now, since orbax
        renames a folder only when it has written all of it. A checkpoint that is damaged for another reason stays, so
        that it is reported.
        """
        common.gather("checkpoints", None)  # every process has read the folder before anything in it is removed
        for step, delete, seal in common.first("settling", self._cut_short):
            if delete:
                self._manager.delete(step)
            if seal:
                write_checksums(self.path(step))
            if jax.process_index() == 0:
                self._mark(step).unlink()

    def _cut_short(self) -> list[tuple[int, bool, bool]]:
        """(step, whether to delete it, whether to write its checksums) of each save that was not finished.

        Deletes what orbax itself had not finished; it would warn, in a line of its own, when it saves that step again.
        """
        for half in self._folder.glob(f"*{UNFINISHED}*"):
            half.rmtree()
        found = []
        for mark in self._folder.glob("saving-*"):
            step = int(mark.name.removeprefix("saving-"))
            sealed = [other for other in self.steps() if (self.path(other) / CHECKSUMS).exists()]
            unfinished = step in self.steps() and step not in sealed
            found.append((step, unfinished and bool(sealed), unfinished and not sealed))
        return found

    def drop_after(self, step: int) -> None:
        """Delete the folders of later steps. A run that went back saves them again, and orbax never overwrites."""
        for later in self.steps():
            if later > step:
                self._manager.delete(later)

    def close(self) -> None:
        """Raises SaveError if a save has failed and nobody was told. If somebody was, orbax does not tell it again."""
        try:
            self.wait()
        finally:
            self._sealer.shutdown()
            with contextlib.suppress(Exception) if self._failed else contextlib.nullcontext():
                self._manager.close()


def _first_line(error: BaseException) -> str:
    """One line about the innermost cause, which for a full disk is the OSError."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split())
    found = re.search(r"No space left on device|Disk quota exceeded", text)
    return found.group() if found else text[:300]


def _signatures(state: TrainState) -> dict[str, list]:
    return {
        jax.tree_util.keystr(path): [str(leaf.dtype), list(leaf.shape)]
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }
