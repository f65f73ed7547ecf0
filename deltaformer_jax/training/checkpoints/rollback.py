"""After several skipped steps in a row: go back to the last checkpoint and leave out the batches that were skipped.

Batches are numbered, and a run takes them in order, except those that its position lists as `passed`. So a run that
went back ends bit for bit like a run that never had those batches.
"""

from collections.abc import Callable
from typing import Any

from deltaformer_jax.training.checkpoints.store import Checkpoints
from deltaformer_jax.training.position import Position
from deltaformer_jax.training.setup import Run
from deltaformer_jax.training.state import TrainState

# After going back so often without a new checkpoint in between, going back again would not help.
LIMIT = 3


def roll_back(
    run: Run, position: Position, bad: tuple[int, ...], note: Callable[[str], Any]
) -> tuple[Position, TrainState]:
    """(position, state) of the newest whole checkpoint, or of the start of the run, with the `bad` batches left out.

    The caller must drop its own state before, since its memory is needed for the restored one. Raises CheckpointError
    if there are checkpoints and none is whole.
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
    if written not in run.metrics.records:  # killed after going back, it goes back again
        run.metrics.write(written)
    note(
        f"step {position.step}: {len(bad)} batches skipped in a row; going back to step {before.step}, "
        f"leaving out batches {list(bad)}"
    )
    return before._replace(passed=passed, streak=()), state


def _drop_inside_streaks(checkpoints: Checkpoints) -> None:
    """Delete checkpoints that were saved between skipped steps because the run was stopped there.

    A run that was not stopped would go back further. The oldest checkpoint stays.
    """
    steps = checkpoints.steps()
    for step in reversed(steps[1:]):
        if checkpoints.run_record(step)["streak"]:
            checkpoints.drop_after(step - 1)
