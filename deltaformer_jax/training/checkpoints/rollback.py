"""Several skipped steps in a row: back to the last checkpoint, and past the batches that were skipped.

Batches are numbered; a run takes them in order, but never those in `passed`. A run that went back therefore ends where
one ends that never saw them.
"""

from typing import Any

import jax

from deltaformer_jax.training.setup import NEW_RECORD, Run
from deltaformer_jax.training.state import create_state

# After so many with no checkpoint in between, more of the same won't help.
LIMIT = 3


def roll_back(run: Run, bad: list[int], note) -> None:
    """Put `run` back to its newest whole checkpoint, or to its beginning, with the `bad` batches passed over from
    now on.

    Raises CheckpointError when there are checkpoints and none is whole.
    """
    run.checkpoints.wait()
    reached = run.step
    run.state = None  # its memory is wanted
    _drop_inside_streaks(run)
    if run.checkpoints.steps():
        run.state, record = run.checkpoints.restore_newest(run.abstract, note)
        run.checkpoints.drop_after(int(record["step"]))
    else:
        record = NEW_RECORD
        shardings = jax.tree.map(lambda leaf: leaf.sharding, run.abstract)
        run.state = create_state(run.config, run.parts, shardings)
    run.step, run.next_batch = int(record["step"]), int(record["next_batch"])
    run.passed, run.streak = sorted({*record["passed"], *run.passed, *bad}), []
    run.metrics.cut(run.step)
    written: dict[str, Any] = {"step": run.step, "passed_batches": run.passed}
    if jax.process_index() == 0 and written not in run.metrics.records:  # killed since, and going back again
        run.metrics.write(written)
    note(f"step {reached}: {len(bad)} skipped in a row; back to step {run.step}, passing over batches {bad}")


def _drop_inside_streaks(run: Run) -> None:
    """Delete what was saved in the middle of skipped steps, when the run was stopped there: a run that was not stopped
    would go back further. The oldest stays."""
    steps = run.checkpoints.steps()
    for step in reversed(steps[1:]):
        if run.checkpoints.run_record(step)["streak"]:
            run.checkpoints.drop_after(step - 1)
