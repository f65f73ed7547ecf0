"""The training loop.

At the top of the loop the state has seen `position.step` batches. The loop first evaluates this state, then saves it,
then takes the next batch. So a checkpoint of step n is written after all lines of metrics.jsonl up to n, and a run
restored from it continues with batch n as if it had never stopped. Metrics are read one step late: while the devices
compute update n + 1, the host reads and writes the metrics of update n.

A `Run` never changes. `train` takes a position and a state, and returns new ones.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax

from deltaformer_jax.config import on_any_device
from deltaformer_jax.config.saved import Saved
from deltaformer_jax.data import TaskData, batches
from deltaformer_jax.decoding.generate import generate
from deltaformer_jax.host import called
from deltaformer_jax.host.interruption import Interruption
from deltaformer_jax.host.paths import to_paste
from deltaformer_jax.host.waiting import begun, waiting
from deltaformer_jax.model import num_parameters, parameters_of_a_token
from deltaformer_jax.model_parts import merge, model_parts
from deltaformer_jax.processes import child, common
from deltaformer_jax.processes.agreement import Alone, Together, agreement
from deltaformer_jax.sharding.mesh import batch_sharding
from deltaformer_jax.sharding.rows import local_rows
from deltaformer_jax.training.checkpoints.rollback import LIMIT, roll_back
from deltaformer_jax.training.checkpoints.store import Checkpoints
from deltaformer_jax.training.evaluation import evaluate
from deltaformer_jax.training.position import Position
from deltaformer_jax.training.setup import Run
from deltaformer_jax.training.state import TrainState
from deltaformer_jax.training.watch.display import Display
from deltaformer_jax.training.watch.instruments import Instruments
from deltaformer_jax.training.watch.late_reader import LateReader
from deltaformer_jax.training.watch.ledger import read_ledger


class RunError(RuntimeError):
    """A cause that stops a run and is not a bug, such as a damaged shard. The message is one line."""


class Ending(NamedTuple):
    """The saved position and state at the end of the loop. `finished`: all steps are made; else the run was stopped."""

    finished: bool
    position: Position
    state: TrainState


def never(evaluation: dict[str, Any]) -> bool:
    return False


def train(
    run: Run,
    position: Position,
    state: TrainState,
    stop: Interruption,
    *,
    quiet: bool = False,
    until: Callable[[dict[str, Any]], bool] = never,
    save_seconds: float = math.inf,
) -> Ending:
    """Train from `position` and `state`, whose buffers are donated, until run.steps or until `stop` is requested.

    A finished run ends with an evaluation, a checkpoint and a sample; a stopped one with a checkpoint.

    until(record)  ends the run when it returns True. It is called after each evaluation, with its record of
                   metrics.jsonl, {"step", "eval_loss", ...}. A run that was stopped at an evaluation calls it again
                   with the same record when it is resumed.
    save_seconds   the state is also saved when this time has passed since the last save.
    """
    settings = run.config.run
    display = Display(settings.steps, position.step, quiet=quiet or jax.process_index() > 0)
    stop = agreement(stop, run.program.mesh)
    with _closing(run.checkpoints), contextlib.closing(display):
        display.note(describe(run, position))
        with contextlib.closing(Instruments(run, position.step, display.note)) as instruments:
            ending = run_steps(run, position, state, stop, display, instruments, until, save_seconds)
            child.at("ending", 0)
        display.close()
        run.ledger.write(ending.position.step)
        step = ending.position.step
        where = run.checkpoints.path(step)
        if ending.finished:
            display.note(f"finished {step} steps; saved in {where}")
            with child.taking_time("sampling"), run.ledger.within("sample"):
                write_sample(run, ending.state, display, stop)
            run.ledger.write(step)
        else:
            display.note(f"stopped at step {step} of {settings.steps}; saved in {where}")
            display.note(f"to go on: {called.command('deltaformer_jax.train')} {to_paste('--workdir', run.workdir)}")
        if spent := read_ledger(run.workdir):
            display.note(spent.line())
    return ending


@contextlib.contextmanager
def _closing(checkpoints: Checkpoints) -> Iterator[None]:
    """Closes them at the end. After an error of one of several processes that would wait for the others for ever."""
    try:
        yield
    except BaseException:
        if jax.process_count() == 1:
            checkpoints.close()
        raise
    checkpoints.close()


def describe(run: Run, position: Position) -> str:
    config, corpus = run.config, run.corpus
    tokens = config.data.batch_size * config.data.sequence_length
    if isinstance(corpus, TaskData):
        material = "drawn anew for every batch"
    else:
        entry = corpus.manifest["splits"]["train"]
        material = f"{entry['tokens']:,} tokens in {entry['documents']:,} documents to train on"
    mixers = ", ".join(dict.fromkeys(m if isinstance(m, str) else m.name for m in config.model.mixers))
    adapters = run.program.adapters_text()
    model = merge(run.program.parts, run.program.parts.params)
    total, used = num_parameters(model), parameters_of_a_token(model)
    experts = f", {used:,} of them for a token" if used < total else ""
    flops = run.program.training_flops(config.data.sequence_length)
    return (
        f"{total:,} parameters ({mixers}){experts}, {flops / 1e6:,.1f} MFLOP per token "
        f"trained on{adapters and '; '}{adapters}\n"
        f"{corpus.path}: {material}\n"
        f"{tokens:,} tokens per step; {'resumed at' if run.resumed else 'from'} step {position.step}, "
        f"up to {config.run.steps}; in {run.workdir}"
    )


def run_steps(
    run: Run,
    position: Position,
    state: TrainState,
    stop: Alone | Together,
    display: Display,
    instruments: Instruments,
    until: Callable[[dict[str, Any]], bool],
    save_seconds: float,
) -> Ending:
    """The loop itself. The state that it returns is saved."""
    settings = run.config.run
    reader = LateReader(run.config, run.metrics, display, run.program.training_flops(run.config.data.sequence_length))
    stream, rollbacks = run.feed.stream(position), 0
    saved, saved_at = position.step if run.resumed else None, time.monotonic()
    run.ledger.enter("steps")
    while True:
        try:
            # Decide what to do with this state. Before that, read the metrics of the step that made it.
            child.at("training", child.TRAINING)
            stop.vote(overdue=time.monotonic() > saved_at + save_seconds)
            done = position.step == settings.steps
            evaluating = (done or _due(position.step, settings.eval_every)) and not stop.requested
            evaluating = evaluating and settings.eval_every > 0
            due = done or _due(position.step, settings.checkpoint_every) or stop.overdue
            if evaluating or due or stop.requested:
                position = reader.read(position)

            if reader.too_many:
                rollbacks += 1
                if rollbacks > LIMIT:
                    raise RunError(_stuck(position, reader))
                state = None  # frees its memory for the restored state
                with child.taking_time("going back"):
                    position, state = roll_back(run, position, reader.too_many, display.note)
                saved = position.step if run.checkpoints.steps() else None
                instruments.cut(position.step)
                reader.forget()
                stream = run.feed.stream(position)
                continue

            if evaluating:
                # A resumed run may have made this evaluation before it was stopped.
                spending = run.ledger.within("evaluation")
                with waiting("evaluating", display.note), child.taking_time("evaluating"), spending:
                    made = common.first("evaluation", lambda step=position.step: run.metrics.evaluation(step))
                    evaluation = made or _evaluate(run, position, state, display, stop)
                done = done or (evaluation is not None and until(evaluation))
                reader.restart_clock()

            stopping = stop.requested
            if stopping:
                position = reader.read(position)
                if reader.too_many:
                    continue
            # Between skipped steps no scheduled checkpoint is made: going back to it would not help.
            if (done or stopping or (due and not position.streak)) and position.step != saved:
                with child.taking_time("saving"), run.ledger.within("checkpoints"):
                    run.checkpoints.save(state, _record(run, position))
                run.ledger.write(position.step)
                saved, saved_at, rollbacks = position.step, time.monotonic(), 0
                reader.restart_clock()
            if done or (stop.requested and position.step == saved):
                spending = run.ledger.within("checkpoints")
                with waiting("saving", display.note), child.taking_time("saving"), spending:
                    run.checkpoints.wait()
                return Ending(done, position, state)

            child.at("reading a batch", child.FILES)
            with run.ledger.within("data wait"):
                number, batch = _next(stream, position)
            child.at("training", child.TRAINING)
            with child.taking_time("computing"):
                on_devices = run.feed.to_devices(batch)
                instruments.before_step(position.step, state, on_devices)
                reader.before_step()
                state, metrics = run.train_step(state, on_devices)
                instruments.after_step(metrics)
            position = position.after(number)
            with run.ledger.within("checkpoints"):
                run.checkpoints.poll()
            # Of several processes each reads a part of the batch: its tokens stand for all.
            tokens = int((batch["segment_ids"] > 0).sum()) * run.config.data.batch_size // len(batch["segment_ids"])
            position = reader.after_step(position, number, metrics, tokens)
            if _due(position.step, settings.log_every):
                run.ledger.write(position.step)
        except OSError as error:  # metrics.jsonl on a full disk, or a disk that is no longer there
            where, what = error.filename or run.workdir, error.strerror or error
            raise RunError(f"step {position.step}: {where}: {what}") from error


def _due(step: int, every: int) -> bool:
    return every > 0 and step > 0 and step % every == 0


def _stuck(position: Position, reader: LateReader) -> str:
    return (
        f"step {position.step}: {reader.last_skip}, and again after going back {LIMIT} times; the newest "
        "checkpoint is from before this step. Start a new run with a lower optimizer.learning_rate, more "
        "optimizer.warmup_steps or, if such gradients are to be used, a larger optimizer.skip_deviations"
    )


def _next(stream: Iterator, position: Position) -> tuple[int, dict[str, Any]]:
    try:
        return next(stream)
    except (ValueError, OSError) as error:  # a shard is missing or damaged
        raise RunError(f"data, batch {position.next_batch}: {error}") from error


def _record(run: Run, position: Position) -> dict[str, Any]:
    saved = Saved(run.config, run.corpus.tokenizer.hash, run.corpus.hash)
    return {**position.as_record(), **saved.as_json()}


def _evaluate(
    run: Run, position: Position, state: TrainState, display: Display, stop: Alone | Together
) -> dict[str, Any] | None:
    """The record that is written to metrics.jsonl; None if `stop` was requested during the evaluation."""
    start, length = time.perf_counter(), run.config.data.sequence_length
    sharding = batch_sharding(run.program.mesh)
    rows = local_rows(sharding, run.evaluation_batch_size, length)
    result = evaluate(
        run.program.evaluation_step,
        state.params,
        batches(
            run.corpus,
            "eval",
            sequence_length=length,
            batch_size=run.evaluation_batch_size,
            seed=0,
            rows=None if rows is None else rows.numbers,
        ),
        token_bytes=run.corpus.tokenizer.token_bytes,
        sharding=sharding,
        rows=rows,
        limit=run.config.run.eval_batches,
        stop=stop.ask,
    )
    if result is None:
        return None
    record = {"step": position.step, "eval_loss": result.loss}
    if result.accuracy is not None:
        record["eval_accuracy"] = result.accuracy
    if result.bits_per_byte is not None:
        record["eval_bits_per_byte"] = result.bits_per_byte
    run.metrics.write(record)
    display.evaluation(record, time.perf_counter() - start)
    return record


def write_sample(run: Run, state: TrainState, display: Display, stop: Alone | Together) -> None:
    """Continue run.sample_prompt and print the text as it is generated. Does nothing for a task, which has no text."""
    settings, tokenizer = run.config.run, run.corpus.tokenizer
    if not settings.sample_prompt or not settings.sample_tokens or isinstance(run.corpus, TaskData):
        return
    prompt = [tokenizer.eot, *tokenizer.encode(settings.sample_prompt)]
    stream = tokenizer.stream()
    display.note(f"\na sample of {settings.sample_tokens} tokens, after {settings.sample_prompt!r}:\n")
    model = merge(model_parts(on_any_device(run.config.model), run.program.make_model), state.params)
    tokens = generate(model, prompt, settings.sample_tokens, seed=settings.seed)
    # The first token compiles the prompt's program, the second one that of a step.
    tokens = begun(tokens, 2, "compiling the model for this prompt", display.note)
    display.write(settings.sample_prompt)
    for token in tokens:
        if stop.ask() or token == tokenizer.eot:
            break
        display.write(stream.push(token))
    display.note(stream.end())
