"""What looks into a run on request: a profile of some steps, statistics of the layers, TensorBoard. Nothing by default.

None of it touches the state: a run with instruments makes the same updates as one without.
"""

import jax

from deltaformer_jax.training.setup import Run
from deltaformer_jax.training.watch.metrics import MetricsFile
from deltaformer_jax.training.watch.statistics import as_record, make_statistics_step
from deltaformer_jax.training.watch.tensorboard import TensorBoard

_UNPROFILED = 2  # steps before a profile: the first ones wait for data and warm up


class Instruments:
    """`before_step` and `after_step` around each train step, `close` at the end."""

    def __init__(self, run: Run):
        settings, writes = run.config.run, jax.process_index() == 0
        self._run = run
        self._made = 0  # steps, by this process
        self._profile = range(_UNPROFILED, _UNPROFILED + settings.profile_steps)
        self._tracing = False
        self._statistics = self._file = self._board = None
        if settings.statistics_every:
            self._statistics = make_statistics_step(run.parts, run.mesh, run.config.optimizer.accumulation_steps)
            self._file = MetricsFile(run.workdir / "statistics.jsonl", run.step) if writes else None
        if settings.tensorboard and writes:
            self._board = TensorBoard(run.workdir, run.step)
            run.metrics.follow(self._board.write)

    def before_step(self, batch: dict[str, jax.Array]) -> None:
        """`batch` is the one that the next step takes, on the devices."""
        every, step = self._run.config.run.statistics_every, self._run.step + 1
        if self._statistics is not None and (step == 1 or step % every == 0):
            # Numbered as the loss of that step is, and made from the same parameters and batch.
            record = {"step": step, **as_record(jax.device_get(self._statistics(self._run.state.params, batch)))}
            if self._file is not None:
                self._file.write(record)
            if self._board is not None:
                self._board.write(record)
        if self._profile and self._made == self._profile.start:
            jax.block_until_ready(self._run.state)
            jax.profiler.start_trace(str(self._run.workdir / "profile"))
            self._tracing = True

    def cut(self, step: int) -> None:
        """The run has gone back to `step`: drop what was written after it."""
        for written in (self._file, self._board):
            if written is not None:
                written.cut(step)

    def after_step(self) -> None:
        self._made += 1
        if self._tracing and self._made == self._profile.stop:
            self._stop_trace()

    def _stop_trace(self) -> None:
        jax.block_until_ready(self._run.state)
        jax.profiler.stop_trace()
        self._tracing = False

    def close(self) -> None:
        if self._tracing:
            self._stop_trace()
        if self._board is not None:
            self._board.close()
