"""Training on a synthetic task until it is solved, by ordinary training runs, one for each length.

Each length is a stage: a run in the cell's folder that starts from the final state of the stage before it and ends when
its evaluations say so. A cell's settings are plain JSON. Where the text says "or a list", the list has one entry per
length:

    task, lengths          for example "task:swap,elements=5", [16]; or a list of tasks. With several lengths, each is
                           trained on until it is solved
    model, optimizer       all fields of ModelConfig (except vocab_size, which the task gives) and of OptimizerConfig
    batch_size             rows per step, or a list
    steps                  most steps of all lengths together
    eval_every, eval_rows  steps between evaluations; rows per evaluation, drawn separately from training, or a list
    target, patience       a length is solved once `patience` evaluations in a row have at least the accuracy `target`;
                           target may be a list
    plateau                optional, [n, least]: training ends when none of the last n evaluations exceeds the best
                           earlier one at that length by `least`
    seed                   of the initial parameters and of the examples
    tests                  {name: [task, length, rows]}: the accuracies to measure after training
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
from deltaformer_jax.model_parts import merge
from deltaformer_jax.reproduce import unfinished
from deltaformer_jax.reproduce.stages import Cell, Progress, Stage, accuracy
from deltaformer_jax.training.loop import train


def _plain(config: ModelConfig | OptimizerConfig) -> dict[str, Any]:
    """The fields of a config as plain JSON, in which a tuple is a list."""
    return {name: list(x) if isinstance(x, tuple) else x for name, x in dataclasses.asdict(config).items()}


# vocab_size is the task's.
MODEL = {field: value for field, value in _plain(ModelConfig()).items() if field != "vocab_size"}


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
    """A cell's settings. `model` and `optimizer` give the fields that differ from the defaults.

    The settings contain every field, so a record made with other defaults is recognised and not resumed. The optimiser
    is Adam without weight decay, with a warm-up of a tenth of the steps, at most 100, and a cosine schedule.

    skip_deviations is 0: only steps that are not finite are skipped. The runs here never go back to a checkpoint, so
    after a jump of the gradient's norm the guard would skip every later step.
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
        "optimizer": {**_plain(OptimizerConfig()), **chosen, **optimizer},
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
    measure: Callable[[nnx.Module], dict[str, Any]] | None = None,
) -> dict[str, Any] | None:
    """Train a cell. None if `stop.requested` ended it early.

    `measure(model)` -> plain JSON, of the trained model: it is added to the result.

    `make_task(spec, length)` returns a task; `make_model(config, rngs=...)` returns a model. The state is saved in
    `folder` when the cell is stopped, at the end of each stage, and every minute. The next call resumes from it, with
    bit-identical results.

    Returns a dict: accuracy (the last one, at the last length reached), solved_at (the step at which each length was
    solved, or None), curve ([step, length, accuracy, loss] of each evaluation), steps, tokens, parameters, skipped (the
    number of steps that were skipped), and tests.
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
            note(f"    resuming after step {at.step + prepared.position.step}")
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
        **({} if measure is None else measure(merge(prepared.run.program.parts, ending.state.params))),
    }
