"""Several skipped steps in a row: back to the last checkpoint, and past the batches that were skipped.

Batches are numbered; a run takes them in order, but never those that its position passes over. A run that went back
therefore ends where one ends that never saw them.
"""

from collections.abc import Callable
from typing import Any

import jax

from deltaformer_jax.training.checkpoints.store import Checkpoints
from deltaformer_jax.training.position import Position
from deltaformer_jax.training.setup import Run
from deltaformer_jax.training.state import TrainState

# After so many with no checkpoint in between, more of the same won't help.
LIMIT = 3


def roll_back(
    run: Run, position: Position, bad: tuple[int, ...], note: Callable[[str], Any]
) -> tuple[Position, TrainState]:
    """(position, state) of the newest whole checkpoint, or of the run's beginning, with the `bad` batches passed over
    from there on. The caller lets go of its own state before: the memory is wanted.

    Raises CheckpointError when there are checkpoints and none is whole.
    """
    run.checkpoints.wait()
    _drop_inside_streaks(run.checkpoints)
    if run.checkpoints.steps():
        state, record = run.checkpoints.restore_newest(run.program.abstract, note)
        before = Position.from_record(record)
        run.checkpoints.drop_after(before.step)
    else:
        state, before = run.begin(run.program), Position()
    passed = tuple(sorted({*before.passed, *position.passed, *bad}))
    run.metrics.cut(before.step)
    written: dict[str, Any] = {"step": before.step, "passed_batches": list(passed)}
    if jax.process_index() == 0 and written not in run.metrics.records:  # killed since, and going back again
        run.metrics.write(written)
    note(
        f"step {position.step}: {len(bad)} skipped in a row; back to step {before.step}, "
        f"passing over batches {list(bad)}"
    )
    return before._replace(passed=passed, streak=()), state


def _drop_inside_streaks(checkpoints: Checkpoints) -> None:
    """Delete what was saved in the middle of skipped steps, when the run was stopped there: a run that was not stopped
    would go back further. The oldest stays."""
    steps = checkpoints.steps()
    for step in reversed(steps[1:]):
        if checkpoints.run_record(step)["streak"]:
            checkpoints.drop_after(step - 1)
