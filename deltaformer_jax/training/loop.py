"""The training loop.

The order, and why. At the top of the loop the state has seen `step` updates, and all that happens there belongs to
that state: first evaluate it, then save it, then take the next batch. So a checkpoint of step n comes after
everything that metrics.jsonl says up to n, and a run restored from it goes on with batch n as if it had never stopped.
Metrics are read one step late: while the devices make update n + 1, the host reads and writes those of update n.
"""

import contextlib
import time
from typing import Any

import jax

from deltaformer_jax.config import on_any_device
from deltaformer_jax.config.settings import Saved
from deltaformer_jax.data import TaskData, batches
from deltaformer_jax.decoding.generate import generate
from deltaformer_jax.sharding.mesh import batch_sharding
from deltaformer_jax.training.checkpoints.rollback import LIMIT, roll_back
from deltaformer_jax.training.data_stream import number_batches
from deltaformer_jax.training.evaluation import evaluate, to_devices
from deltaformer_jax.training.interruption import Interruption
from deltaformer_jax.training.setup import Run
from deltaformer_jax.training.state import count_parameters, merge, model_parts
from deltaformer_jax.training.watch.instruments import Instruments
from deltaformer_jax.training.watch.metrics import Display


class RunError(RuntimeError):
    """What stops a run on its way and is not a bug: a message for one line."""


def train(run: Run, stop: Interruption, *, quiet: bool = False) -> bool:
    """Train until run.steps, or until `stop` is requested; False if it stopped early.

    Ends with an evaluation, a checkpoint and a sample; when it stops early, with a checkpoint.
    """
    display = Display(run.config.run.steps, run.step, quiet=quiet or jax.process_index() > 0)
    with contextlib.closing(run.checkpoints), contextlib.closing(display):
        display.note(describe(run))
        with contextlib.closing(Instruments(run)) as instruments:
            try:
                finished = run_steps(run, display, stop, instruments)
            except OSError as error:  # metrics.jsonl on a full disk, or a disk that is gone
                where, what = error.filename or run.workdir, error.strerror or error
                raise RunError(f"step {run.step}: {where}: {what}") from error
        display.close()
        if finished:
            display.note(f"finished {run.step} steps; saved in {run.checkpoints.path(run.step)}")
            write_sample(run, display, stop)
        else:
            where = run.checkpoints.path(run.step)
            display.note(f"stopped at step {run.step} of {run.config.run.steps}; saved in {where}")
            display.note(f"to go on: python train.py --workdir {run.workdir}")
    return finished


def describe(run: Run) -> str:
    config, corpus = run.config, run.corpus
    tokens = config.data.batch_size * config.data.sequence_length
    if isinstance(corpus, TaskData):
        material = "drawn anew for every batch"
    else:
        entry = corpus.manifest["splits"]["train"]
        material = f"{entry['tokens']:,} tokens in {entry['documents']:,} documents to train on"
    mixers = ", ".join(dict.fromkeys(m if isinstance(m, str) else m.name for m in config.model.mixers))
    flops = 3 * merge(run.parts, run.parts.params).flops_per_token(config.data.sequence_length)
    return (
        f"{count_parameters(run.parts):,} parameters ({mixers}), {flops / 1e6:,.1f} MFLOP per token trained on\n"
        f"{corpus.path}: {material}\n"
        f"{tokens:,} tokens per step; {'resumed at' if run.resumed else 'from'} step {run.step}, "
        f"up to {config.run.steps}; in {run.workdir}"
    )


def run_steps(run: Run, display: Display, stop: Interruption, instruments: Instruments) -> bool:
    """Train until run.steps (True) or until asked to stop (False); either way the last state is saved.

    Changes run.state and run.step.
    """
    config, settings = run.config, run.config.run
    reader = _LateReader(run, display)
    stream, rollbacks = number_batches(run.corpus, config, run.next_batch, run.passed), 0
    sharding = batch_sharding(run.mesh)
    saved = run.step if run.resumed else None
    while True:
        done = run.step == settings.steps
        evaluating = settings.eval_every and (done or _due(run.step, settings.eval_every)) and not stop.requested
        due = done or _due(run.step, settings.checkpoint_every)
        if evaluating or due or stop.requested:
            reader.flush()
        if reader.too_many:
            rollbacks += 1
            if rollbacks > LIMIT:
                raise RunError(
                    f"step {run.step}: {reader.last_skip}, and so again after going back {LIMIT} times; the newest "
                    "checkpoint is from before this step. Lower optimizer.learning_rate, raise optimizer.warmup_steps "
                    "or, if such gradients are to be taken, optimizer.skip_deviations, in a new run"
                )
            roll_back(run, reader.too_many, display.note)
            saved = run.step if run.checkpoints.steps() else None
            instruments.cut(run.step)
            reader.forget()
            stream = number_batches(run.corpus, config, run.next_batch, run.passed)
            continue
        if evaluating:
            if not run.metrics.has_evaluation(run.step):  # a resumed run may have made it before it stopped
                _evaluate(run, display, stop)
            reader.restart_clock()
        stopping = stop.requested
        if stopping:
            reader.flush()
            if reader.too_many:
                continue
        # In the middle of skipped steps there is nothing worth going back to.
        if (done or stopping or (due and not run.streak)) and run.step != saved:
            run.checkpoints.save(run.state, _record(run))
            saved, rollbacks = run.step, 0
            reader.restart_clock()
        if done or (stop.requested and run.step == saved):
            run.checkpoints.wait()
            return done
        number, batch = _next(stream, run)
        on_devices = to_devices(batch, sharding)
        instruments.before_step(on_devices)
        reader.before_step()
        run.state, metrics = run.train_step(run.state, on_devices)
        run.step, run.next_batch = run.step + 1, number + 1
        instruments.after_step()
        run.checkpoints.poll()
        reader.after_step(run.step, number, metrics, int((batch["segment_ids"] > 0).sum()) * jax.process_count())


def _due(step: int, every: int) -> bool:
    return every > 0 and step > 0 and step % every == 0


def _next(stream, run: Run) -> tuple[int, dict[str, Any]]:
    try:
        return next(stream)
    except (ValueError, OSError) as error:  # a shard that is gone or damaged
        raise RunError(f"data, batch {run.next_batch}: {error}") from error


def _record(run: Run) -> dict[str, Any]:
    saved = Saved(run.config, run.corpus.tokenizer.hash, run.corpus.hash)
    # The number of the next batch, and those to pass over, are the whole position in the data.
    position = {"step": run.step, "next_batch": run.next_batch, "passed": run.passed, "streak": run.streak}
    return {**position, **saved.as_json()}


def _evaluate(run: Run, display: Display, stop: Interruption) -> None:
    config, start = run.config, time.perf_counter()
    result = evaluate(
        run.evaluation_step,
        run.state.params,
        batches(
            run.corpus,
            "eval",
            sequence_length=config.data.sequence_length,
            batch_size=config.data.batch_size,
            seed=0,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        ),
        token_bytes=run.corpus.tokenizer.token_bytes,
        sharding=batch_sharding(run.mesh),
        limit=config.run.eval_batches,
        stop=lambda: stop.requested,
    )
    if result is None:
        return
    record = {"step": run.step, "eval_loss": result.loss}
    if result.accuracy is None:
        record["eval_bits_per_byte"] = result.bits_per_byte
    else:
        record["eval_accuracy"] = result.accuracy
    if jax.process_index() == 0:
        run.metrics.write(record)
    display.evaluation(record, time.perf_counter() - start)


class _LateReader:
    """Reads the metrics of a step after the next one has been dispatched, and keeps the time.

    The clock runs from dispatch to dispatch and from reading to reading; evaluations and saves are outside it.
    """

    def __init__(self, run: Run, display: Display):
        self._run, self._display = run, display
        self._waiting = None
        self._last = None
        self._tokens = self._steps = self._seconds = 0
        self.last_skip = ""
        self.too_many: list[int] = []  # batches skipped in a row, once they are as many as rollback_after

    def forget(self) -> None:
        """What is waiting belongs to a state that is gone."""
        self._waiting, self.too_many = None, []
        self._tokens = self._steps = self._seconds = 0
        self.restart_clock()

    def restart_clock(self) -> None:
        self._last = None

    def before_step(self) -> None:
        if self._last is None:
            self._last = time.perf_counter()

    def after_step(self, step: int, number: int, metrics: dict[str, jax.Array], tokens: int) -> None:
        self.flush()
        self._waiting = (step, number, metrics, tokens)

    def flush(self) -> None:
        """Read what is waiting, and keep run.streak."""
        if self._waiting is None:
            return
        (step, number, metrics, tokens), self._waiting = self._waiting, None
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        now = time.perf_counter()
        if self._last is not None:
            self._seconds += now - self._last
            self._tokens += tokens
            self._steps += 1
            self._last = now
        self._display.advance(step)
        if values["skipped"]:
            self._skipped(step, number, values)
            return
        self._run.streak.clear()
        every = self._run.config.run.log_every
        if every and (step == 1 or step % every == 0):
            rate = self._tokens / self._seconds if self._seconds else 0.0
            record = {
                "step": step,
                "loss": values["loss"],
                "tokens_per_second": round(rate, 1),
                "grad_norm": values["grad_norm"],
                "learning_rate": values["learning_rate"],
            }
            if "accuracy" in values:
                record["accuracy"] = values["accuracy"]
            if jax.process_index() == 0:
                self._run.metrics.write(record)
            self._display.log(record, self._seconds / self._steps if self._steps else None)
            self._tokens = self._steps = self._seconds = 0

    def _skipped(self, step: int, number: int, values: dict[str, float]) -> None:
        self._run.streak.append(number)
        if len(self._run.streak) >= self._run.config.optimizer.rollback_after:
            self.too_many = list(self._run.streak)
        self.last_skip = f"loss {values['loss']:.4g}, gradient {values['grad_norm']:.4g}"
        # JSON has no NaN: what was seen is told as text.
        record = {"step": step, "skipped_batch": number, "because": self.last_skip}
        if jax.process_index() == 0:
            self._run.metrics.write(record)
        self._display.note(f"step {step}/{self._run.config.run.steps}  skipped batch {number}: {self.last_skip}")


def write_sample(run: Run, display: Display, stop: Interruption) -> None:
    """Go on from run.sample_prompt, as it comes; a task has no text to go on with."""
    settings, tokenizer = run.config.run, run.corpus.tokenizer
    if not settings.sample_prompt or not settings.sample_tokens or isinstance(run.corpus, TaskData):
        return
    prompt = [tokenizer.eot, *tokenizer.encode(settings.sample_prompt)]
    stream = tokenizer.stream()
    display.note(f"\na sample of {settings.sample_tokens} tokens, after {settings.sample_prompt!r}:\n")
    display.write(settings.sample_prompt)
    parts = model_parts(on_any_device(run.config.model))
    for token in generate(parts, run.state.params, prompt, settings.sample_tokens, seed=settings.seed):
        if stop.requested or token == tokenizer.eot:
            break
        display.write(stream.push(token))
    display.note(stream.end())
