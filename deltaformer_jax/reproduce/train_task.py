"""Training on a synthetic task until it is solved: runs as everybody's, one for each length, and a curve of accuracies.

Each length is a stage: an ordinary run in the cell's folder, begun from the state of the stage before it and ended by
what its evaluations say. What a cell trains is in its settings, plain JSON:

    task, lengths          "task:swap,elements=5", [16]; with several lengths, each is trained on until it is solved;
                           a list of tasks, one for each length, where they differ in more than that
    model, optimizer       every field of ModelConfig (but vocab_size, which is the task's) and of OptimizerConfig
    batch_size, steps      steps over all lengths together; rows a step, or a list of them, one for each length
    eval_every, eval_rows  every so many steps, the accuracy on so many rows drawn apart from those trained on; rows, or
                           a list of them, one for each length
    target, patience       a length is solved once `patience` evaluations in a row are at least `target`, or its own
                           target in a list of them
    plateau                [n, least], if there: training ends when none of the last n evaluations was better by `least`
                           than the best before them at that length
    seed                   of the parameters and of the examples
    tests                  {name: [task, length, rows]}, asked once training has ended
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from etils import epath
from flax import nnx

from deltaformer_jax import tasks
from deltaformer_jax.config import ModelConfig, OptimizerConfig
from deltaformer_jax.data.task_data import EVALUATION_SEED
from deltaformer_jax.model import LanguageModel, num_parameters
from deltaformer_jax.reproduce import unfinished
from deltaformer_jax.reproduce.stages import Cell, Progress, Stage, accuracy
from deltaformer_jax.training.loop import train

# The defaults as plain JSON.
MODEL = {
    field: list(value) if isinstance(value, tuple) else value
    for field, value in dataclasses.asdict(ModelConfig()).items()
    if field != "vocab_size"
}


def settings_of(
    label: str,
    task: str | list[str],
    lengths: list[int],
    *,
    model: dict,
    learning_rate: float,
    steps: int,
    seed: int = 0,
    batch_size: int | list[int] = 64,
    eval_every: int = 50,
    eval_rows: int | list[int] = 256,
    target: float | list[float] = 0.995,
    patience: int = 2,
    tests: dict[str, list] | None = None,
    plateau: tuple[int, float] | None = None,
    **optimizer: Any,
) -> dict[str, Any]:
    """A cell's settings. `model` and `optimizer` say what differs from the defaults, the settings say all of it: a
    record whose defaults were others is not gone on with.

    Adam without weight decay, a warm-up of a tenth of the steps, at most 100, then a cosine.

    Of the guard against bad steps only that against infinities is on: after a long gradient no one goes back to a
    checkpoint here, and the guard would leave out all that follow.
    """
    chosen = dict(
        learning_rate=learning_rate,
        warmup_steps=min(100, max(1, steps // 10)),
        decay_steps=steps,
        weight_decay=0.0,
        skip_deviations=0.0,
    )
    return {
        "label": label,
        "task": task,
        "lengths": lengths,
        "model": {**MODEL, **model},
        "optimizer": {**dataclasses.asdict(OptimizerConfig()), **chosen, **optimizer},
        "batch_size": batch_size,
        "steps": steps,
        "eval_every": eval_every,
        "eval_rows": eval_rows,
        "evaluation_seed": EVALUATION_SEED,
        "target": target,
        "patience": patience,
        "seed": seed,
        "tests": tests or {},
        **({"plateau": list(plateau)} if plateau else {}),
    }


def run(
    settings: dict[str, Any],
    folder: epath.Path,
    note: Callable[[str], Any],
    stop: Any,
    *,
    make_task: Callable[[str, int], Any] = tasks.make_task,
    make_model: Callable[..., nnx.Module] = LanguageModel,
) -> dict[str, Any] | None:
    """Train a cell; None if `stop.requested`. `make_task(spec, length)` gives a task, `make_model` is a Program's.

    What it has learnt is kept in `folder` then, at the end of each stage and every minute, and the next call goes on
    from it to the same bits.

    Returns accuracy (the last, at the last length reached), solved_at (the step at which each length was, null where
    it was not), curve ([step, length, accuracy, loss] of each evaluation), steps, tokens, parameters, skipped (updates
    that the guard against infinities left out), and tests.
    """
    cell = Cell(settings, folder, note, make_task, make_model)
    unfinished.claim(folder)
    kept = unfinished.load(folder, settings)
    at = Progress(**kept) if kept else Progress(solved=[None] * len(cell.tasks))
    begun = at if kept else None
    while True:
        cell.keep(at)
        prepared = cell.prepare(at)
        if at is begun:
            note(f"    going on after step {at.step + prepared.position.step}")
        ending = train(
            *prepared,
            stop,
            quiet=True,
            until=cell.until(at, prepared.run.metrics.records),
            save_seconds=unfinished.SAVE_EVERY,
        )
        if not ending.finished:
            return None
        end = cell.after(at, ending.position.step, prepared.run.metrics.records)
        if end.stage == at.stage or end.step == settings["steps"] or end.stage == len(cell.tasks):
            break
        at = end
    answers = dict(at.tests)
    for name, (spec, length, rows) in settings["tests"].items():
        if name in answers:
            continue
        if stop.requested:
            cell.keep(at._replace(tests=answers))
            return None
        asked = Stage(spec, make_task(spec, length), rows)
        answers[name] = round(accuracy(prepared.run.program, ending.state.params, asked), 5)
    others = "".join(f", {name}: {accuracy:.4f}" for name, accuracy in answers.items())
    note(f"    accuracy {end.curve[-1][2]:.4f} after {end.step} steps{others}")
    return {
        "accuracy": end.curve[-1][2],
        "solved_at": end.solved,
        "steps": end.step,
        "tokens": end.tokens,
        "tests": answers,
        "parameters": num_parameters(ending.state.params),
        "skipped": int(ending.state.guard.skipped),
        "curve": end.curve,
    }
