"""Checkpoints: orbax writes them in the background; checksums of our own tell whether they are read as written.

DIR/checkpoints/STEP/ holds `state` (the TrainState), `run` (position in the data, config, tokenizer hash, dtypes and
shapes) and, written last, `sha256.json`. A folder without it, or one that doesn't match it, is not a checkpoint: orbax
restores flipped bytes without a word.
"""

import concurrent.futures
import contextlib
import re
from collections.abc import Iterator
from typing import Any

import jax
from etils import epath

from deltaformer_jax.training.checkpoints.checksums import CHECKSUMS, CheckpointError, check_checksums, write_checksums
from deltaformer_jax.training.state import TrainState


class SaveError(RuntimeError):
    """A save that failed, a full disk for one: a message for one line."""


class Checkpoints:
    """The checkpoints of one run. `keep`: how many of the newest stay on disk."""

    def __init__(self, folder: epath.PathLike, keep: int = 1):
        import orbax.checkpoint as ocp

        self._ocp = ocp
        self._folder = epath.Path(folder)
        if "://" not in str(folder):
            self._folder = self._folder.absolute()  # orbax refuses relative paths, at the first save
        self._manager = ocp.CheckpointManager(
            self._folder,
            options=ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, enable_async_checkpointing=True),
            item_names=("state", "run"),
        )
        self._sealer = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint-sealer")
        self._sealing: concurrent.futures.Future | None = None

    def _mark(self, step: int) -> epath.Path:
        return self._folder / f"saving-{step}"

    def path(self, step: int) -> epath.Path:
        return self._folder / str(step)

    def steps(self) -> list[int]:
        """The steps that have a folder, oldest first, whole or not."""
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState, run: dict[str, Any]) -> None:
        """Start saving; returns when the state has been copied from the devices, which may then reuse its memory.

        Waits for the save before it, and raises here what went wrong with that one.
        """
        self.wait()
        step = int(run["step"])
        with self._named(step):
            if jax.process_index() == 0:
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
        # In a thread of its own: hashing some gigabytes must not hold up training either.
        with self._named(step):
            self._manager.wait_until_finished()
            if jax.process_index() == 0:
                write_checksums(self.path(step))
                self._mark(step).unlink()

    @contextlib.contextmanager
    def _named(self, step: int) -> Iterator[None]:
        """What orbax and the disk say, as a SaveError that names the step and what there is to go back to."""
        try:
            yield
        except (OSError, ValueError, RuntimeError) as error:
            whole = [other for other in self.steps() if other != step and (self.path(other) / CHECKSUMS).exists()]
            left = f"the newest whole checkpoint is {whole[-1]}" if whole else "there is no whole checkpoint"
            reason = error.strerror if isinstance(error, OSError) and error.strerror else _first_line(error)
            raise SaveError(f"{self.path(step)}: not saved: {reason}; {left}") from error

    def wait(self) -> None:
        """Until the save under way is whole on disk, checksums included. Raises SaveError if it failed."""
        if self._sealing is not None:
            sealing, self._sealing = self._sealing, None
            sealing.result()

    def poll(self) -> None:
        """Raise SaveError if the save under way has failed already; never waits."""
        if self._sealing is not None and self._sealing.done():
            self.wait()

    def restore_newest(self, abstract: TrainState, note) -> tuple[TrainState, dict[str, Any]]:
        """The newest whole checkpoint; `note(text)` is told of each newer one that was passed over.

        Raises CheckpointError when there are checkpoints and none is whole; nothing on disk is changed.
        """
        problems = []
        for step in reversed(self.steps()):
            try:
                check_checksums(self.path(step))
            except CheckpointError as error:
                problems.append(str(error))
                continue
            for problem in problems:
                note(f"passed over {problem}; going back to step {step}")
            return self.restore(step, abstract)
        raise CheckpointError(
            f"{self._folder}: no whole checkpoint. " + "; ".join(problems or ["there is none"]) + ". "
            "Restore the folder from a copy, or start a new run in another --workdir"
        )

    def restore(self, step: int, abstract: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The state of `step`, laid out as `abstract` says, and its `run` record. Call check_checksums before."""
        run = self.run_record(step)
        expected = _signatures(abstract)
        if run["arrays"] != expected:
            # orbax would cast float32 to bfloat16, and back, silently.
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
        """Clear up after a process that was killed between orbax's last write and our checksums.

        What it was saving is deleted if an older checkpoint is whole, and else given its checksums now: orbax renames a
        folder when it has written all of it. What is damaged without that excuse stays, to be reported.
        """
        for mark in self._folder.glob("saving-*"):
            step = int(mark.name.removeprefix("saving-"))
            sealed = [other for other in self.steps() if (self.path(other) / CHECKSUMS).exists()]
            if step in self.steps() and step not in sealed:
                if sealed:
                    self._manager.delete(step)
                else:
                    write_checksums(self.path(step))
            mark.unlink()

    def drop_after(self, step: int) -> None:
        """Delete the folders of later steps: a run that went back makes them again, and orbax never overwrites."""
        for later in self.steps():
            if later > step:
                self._manager.delete(later)

    def close(self) -> None:
        self.wait()
        self._sealer.shutdown()
        self._manager.close()


def _first_line(error: BaseException) -> str:
    """The cause at the bottom, where an OSError says it best."""
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
