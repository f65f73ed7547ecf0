"""Reads the metrics of each step while the devices compute the next one, and measures the time."""

import time

import jax

from deltaformer_jax.config import Config
from deltaformer_jax.processes import child
from deltaformer_jax.training.position import Position
from deltaformer_jax.training.watch.display import TERMS, Display
from deltaformer_jax.training.watch.metrics import MetricsFile
from deltaformer_jax.training.watch.peak import utilisation


class LateReader:
    """Reads the metrics of a step after the next step has been dispatched, writes them and measures the throughput.

    Time is measured from one reading to the next. Evaluations and saves are not included.

    Attributes:
      too_many: the numbers of the batches skipped in a row, once there are optimizer.rollback_after of them; else ().
      last_skip: loss and gradient norm of the newest skipped batch, as text.
    """

    def __init__(self, config: Config, metrics: MetricsFile, display: Display, flops_per_token: float):
        """`flops_per_token`: of a token trained on, forward and backward."""
        self._config, self._metrics, self._display = config, metrics, display
        self._flops_per_token = flops_per_token
        self._waiting = None
        self._last = None
        self._tokens = self._steps = self._seconds = 0
        self.last_skip = ""
        self.too_many: tuple[int, ...] = ()

    def forget(self) -> None:
        """Drop the metrics not read yet: they belong to a state that was given up."""
        self._waiting, self.too_many = None, ()
        self._tokens = self._steps = self._seconds = 0
        self.restart_clock()

    def restart_clock(self) -> None:
        self._last = None

    def before_step(self) -> None:
        if self._last is None:
            self._last = time.perf_counter()

    def after_step(self, position: Position, number: int, metrics: dict[str, jax.Array], tokens: int) -> Position:
        """Read the metrics of the previous step, and keep those of this one, of batch `number`, for the next call."""
        position = self.read(position)
        self._waiting = (position.step, number, metrics, tokens)
        return position

    def read(self, position: Position) -> Position:
        """Read the metrics that are kept. Returns the position with an updated streak of skipped batches."""
        if self._waiting is None:
            return position
        (step, number, metrics, tokens), self._waiting = self._waiting, None
        with child.taking_time("waiting for the devices"):
            values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        child.at("writing the metrics", child.FILES)
        now = time.perf_counter()
        if self._last is not None:
            self._seconds += now - self._last
            self._tokens += tokens
            self._steps += 1
            self._last = now
        self._display.advance(step)
        if values["skipped"]:
            streak = (*position.streak, number)
            if len(streak) >= self._config.optimizer.rollback_after:
                self.too_many = streak
            self._write_skip(step, number, values)
            return position._replace(streak=streak)
        self._write_update(step, values)
        return position._replace(streak=())

    def _write_update(self, step: int, values: dict[str, float]) -> None:
        every = self._config.run.log_every
        if not every or not (step == 1 or step % every == 0):
            return
        rate = self._tokens / self._seconds if self._seconds else 0.0
        record = {
            "step": step,
            "loss": values["loss"],
            "tokens_per_second": round(rate, 1),
            "grad_norm": values["grad_norm"],
            "learning_rate": values["learning_rate"],
        }
        mfu = utilisation(rate, self._flops_per_token, jax.devices())
        if mfu is not None:
            record["mfu"] = round(mfu, 4)
        if "accuracy" in values:
            record["accuracy"] = values["accuracy"]
        if "depth" in values:
            record["depth"] = int(values["depth"])
        record |= {name: values[name] for name in TERMS if name in values}
        self._metrics.write(record)
        self._display.log(record, self._seconds / self._steps if self._steps else None)
        self._tokens = self._steps = self._seconds = 0

    def _write_skip(self, step: int, number: int, values: dict[str, float]) -> None:
        self.last_skip = f"loss {values['loss']:.4g}, gradient {values['grad_norm']:.4g}"
        # As text, since JSON has no NaN.
        self._metrics.write({"step": step, "skipped_batch": number, "because": self.last_skip})
        self._display.note(f"step {step}/{self._config.run.steps}  skipped batch {number}: {self.last_skip}")
