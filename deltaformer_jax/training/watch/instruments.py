"""Optional instruments of a run: a profile of some steps, statistics of the layers, TensorBoard, trackers.

All are off by default. They do not change the state: a run with instruments makes the same updates as one without.
"""

from collections.abc import Callable
from typing import Any

import jax

from deltaformer_jax.host.waiting import waiting
from deltaformer_jax.training.setup import Run
from deltaformer_jax.training.state import TrainState
from deltaformer_jax.training.watch.metrics import MetricsFile
from deltaformer_jax.training.watch.statistics import as_record
from deltaformer_jax.training.watch.tensorboard import TensorBoard
from deltaformer_jax.training.watch.trackers import make_trackers

_UNPROFILED = 2  # steps before the profile, which wait for data and warm up


class Instruments:
    """Call `before_step` and `after_step` around each step, `close` at the end.

    step: where training starts. note: prints a line.
    """

    def __init__(self, run: Run, step: int, note: Callable[[str], Any]):
        settings, writes = run.config.run, jax.process_index() == 0
        self._every, self._folder = settings.statistics_every, run.workdir
        self._note = note
        self._made = 0  # steps made by this process
        self._profile = range(_UNPROFILED, _UNPROFILED + settings.profile_steps)
        self._traced = None  # metrics of the newest step, while a profile is being taken
        self._statistics = self._file = None
        self._followers = []  # TensorBoard and trackers: each has write, cut and close
        if self._every:
            self._statistics = run.program.statistics_step
            self._file = MetricsFile(run.workdir / "statistics.jsonl", step) if writes else None
        if settings.tensorboard and writes:
            self._followers.append(TensorBoard(run.workdir, step))
        if writes:
            history = [*run.metrics.records, *(self._file.records if self._file else ())]
            self._followers += make_trackers(run.config, run.workdir, history)
        for follower in self._followers:
            run.metrics.follow(follower.write)

    def before_step(self, made: int, state: TrainState, batch: dict[str, jax.Array]) -> None:
        """`state` has seen `made` batches; `batch`, on the devices, is the next one."""
        step = made + 1
        if self._statistics is not None and (step == 1 or step % self._every == 0):
            # Has the number of the step whose loss comes from the same parameters and batch.
            with waiting("statistics of the layers, compiled at the first time", self._note):
                record = {"step": step, **as_record(jax.device_get(self._statistics(state.params, batch)))}
            if self._file is not None:
                self._file.write(record)
            for follower in self._followers:
                follower.write(record)
        if self._profile and self._made == self._profile.start:
            jax.block_until_ready(state)
            jax.profiler.start_trace(str(self._folder / "profile"))
            self._traced = {}

    def cut(self, step: int) -> None:
        """Drop what was written after `step`, to which the run has gone back."""
        if self._file is not None:
            self._file.cut(step)
        for follower in self._followers:
            follower.cut(step)

    def after_step(self, metrics: dict[str, jax.Array]) -> None:
        """`metrics` are those of the step just dispatched."""
        self._made += 1
        if self._traced is not None:
            self._traced = metrics
            if self._made == self._profile.stop:
                self._stop_trace()

    def _stop_trace(self) -> None:
        jax.block_until_ready(self._traced)
        jax.profiler.stop_trace()
        self._traced = None

    def close(self) -> None:
        if self._traced is not None:
            self._stop_trace()
        for follower in self._followers:
            follower.close()
