"""Training on a synthetic task until it is solved: the library's model, optimiser and step, and a curve of accuracies.

What a cell trains is in its settings, plain JSON:

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
import functools
import json
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx

from deltaformer_jax.config import Config, MeshConfig, ModelConfig, OptimizerConfig
from deltaformer_jax.reproduce import unfinished
from deltaformer_jax.sharding.mesh import make_mesh
from deltaformer_jax.tasks import make_task
from deltaformer_jax.training.evaluation import make_evaluation_step
from deltaformer_jax.training.guard import new_guard
from deltaformer_jax.training.optimiser import make_optimiser
from deltaformer_jax.training.state import ModelParts, TrainState, abstract_state, count_parameters
from deltaformer_jax.training.step import make_train_step

# The seed of an evaluation's examples, which no run trains with. Where there are few examples of a length (32 rows of
# 5 bits), many of them are among those trained on all the same.
EVALUATION = "evaluation"
# The defaults as plain JSON.
MODEL = {
    field: list(value) if isinstance(value, tuple) else value
    for field, value in dataclasses.asdict(ModelConfig()).items()
    if field != "vocab_size"
}
EVALUATION_TOKENS = 8192  # in one batch of an evaluation
SAY_EVERY = 10.0  # seconds


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
        "evaluation_seed": EVALUATION,
        "target": target,
        "patience": patience,
        "seed": seed,
        "tests": tests or {},
        **({"plateau": list(plateau)} if plateau else {}),
    }


class Trainer:
    """A model of `settings` on one device, and what it has learnt so far.

    `embedding(model_config, rngs)`, if given, makes what reads the tokens and gives the logits in the place of the
    model's own embedding. Programs are compiled once for each model and optimiser in a process, whatever the seeds.
    """

    def __init__(self, settings: dict[str, Any], task: Any, embedding: Callable | None = None):
        words = max(task.input_vocabulary, task.target_vocabulary)
        model = json.dumps({**settings["model"], "vocab_size": words}, sort_keys=True)
        programs = _programs(model, json.dumps(settings["optimizer"], sort_keys=True), embedding)
        self._step, self._evaluate, create, self.parameters = programs
        self.settings = settings
        self.state: TrainState = create(jax.random.key(settings["seed"]))
        self.seen = 0  # examples

    def step(self, task: Any, size: int) -> dict[str, jax.Array]:
        """One update on the next `size` examples of `task`; the step's metrics, on the device."""
        batch = _batch(task, self.settings["seed"], np.arange(self.seen, self.seen + size))
        self.seen += size
        self.state, metrics = self._step(self.state, batch)
        return metrics

    def accuracy(self, task: Any, rows: int) -> float:
        """The share of what `task` counts that is right, on `rows` examples of the evaluation."""
        size = max(1, min(rows, EVALUATION_TOKENS // task.length))
        hits = asked = 0
        for first in range(0, rows, size):
            batch = _batch(task, EVALUATION, np.arange(first, first + size))
            real = (np.arange(first, first + size) < rows)[:, None]
            batch["loss_mask"] = batch["loss_mask"] & real
            hits += int(np.sum(self._evaluate(self.state.params, batch)["hits"]))
            asked += int(batch["loss_mask"].sum())
        return hits / asked


@dataclasses.dataclass
class Progress:
    """Where a cell is: steps made, in which of its tasks, evaluations in a row at the target and accuracies there."""

    solved: list[int | None]
    step: int = 0
    place: int = 0
    streak: int = 0
    examples: int = 0
    tokens: int = 0
    ended: bool = False
    here: list[float] = dataclasses.field(default_factory=list)
    curve: list[list] = dataclasses.field(default_factory=list)
    tests: dict[str, float] = dataclasses.field(default_factory=dict)


def run(
    settings: dict[str, Any],
    folder: epath.Path,
    note: Callable[[str], Any],
    stop: Any,
    *,
    make: Callable[[str, int], Any] = make_task,
    embedding: Callable | None = None,
) -> dict[str, Any] | None:
    """Train a cell; None if `stop.requested`. `make(spec, length)` gives the task.

    What it has learnt is kept in `folder` then, and every minute, and the next call goes on from it to the same bits.

    Returns accuracy (the last, at the last length reached), solved_at (the step at which each length was, null where
    it was not), curve ([step, length, accuracy, loss] of each evaluation), steps, tokens, parameters, skipped (updates
    that the guard against infinities left out), and tests.
    """
    lengths, each = settings["lengths"], lambda given: given if isinstance(given, list) else [given] * len(lengths)
    specs, targets, sizes, asked = map(each, (settings[key] for key in ("task", "target", "batch_size", "eval_rows")))
    tasks = [make(spec, length) for spec, length in zip(specs, lengths, strict=True)]
    widest = max(tasks, key=lambda task: max(task.input_vocabulary, task.target_vocabulary))
    trainer, at = Trainer(settings, widest, embedding), Progress(solved=[None] * len(tasks))
    if kept := unfinished.load(folder, settings, trainer.state):
        trainer.state, at = kept[0], Progress(**kept[1])
        trainer.seen = at.examples
        note(f"    going on after step {at.step}")
    said = saved = time.perf_counter()
    keep = lambda: unfinished.save(folder, settings, trainer.state, dataclasses.asdict(at))
    while not at.ended:
        if stop.requested:
            keep()
            return None
        if time.perf_counter() > saved + unfinished.SAVE_EVERY:
            keep()
            saved = time.perf_counter()
        at.step += 1
        task = tasks[at.place]
        metrics = trainer.step(task, sizes[at.place])
        at.examples = trainer.seen
        at.tokens += sizes[at.place] * task.length
        at.ended = at.step == settings["steps"]
        if at.step % settings["eval_every"] and not at.ended:
            continue
        accuracy = trainer.accuracy(task, asked[at.place])
        at.here.append(accuracy)
        at.curve.append([at.step, task.length, round(accuracy, 5), round(float(metrics["loss"]), 5)])
        if time.perf_counter() > said + SAY_EVERY:
            said = time.perf_counter()
            note(f"    step {at.step} of at most {settings['steps']}, length {task.length}: accuracy {accuracy:.4f}")
        at.streak = at.streak + 1 if accuracy >= targets[at.place] else 0
        if at.streak == settings["patience"]:
            at.solved[at.place], at.streak = at.step, 0
            if at.place + 1 == len(tasks):
                at.ended = True
            else:
                at.place, at.here = at.place + 1, []
        elif _stands_still(at.here, settings.get("plateau")):
            at.ended = True
    for name, (spec, length, rows) in settings["tests"].items():
        if name in at.tests:
            continue
        if stop.requested:
            keep()
            return None
        at.tests[name] = round(trainer.accuracy(make(spec, length), rows), 5)
    others = "".join(f", {name}: {accuracy:.4f}" for name, accuracy in at.tests.items())
    note(f"    accuracy {at.curve[-1][2]:.4f} after {at.step} steps{others}")
    return {
        "accuracy": at.curve[-1][2],
        "solved_at": at.solved,
        "steps": at.step,
        "tokens": at.tokens,
        "tests": at.tests,
        "parameters": trainer.parameters,
        "skipped": int(trainer.state.guard.skipped),
        "curve": at.curve,
    }


def _stands_still(accuracies: list[float], plateau: list | None) -> bool:
    """Whether none of the last n accuracies is better by `least` than the best before them, for plateau [n, least]."""
    if plateau is None or len(accuracies) <= plateau[0]:
        return False
    count, least = plateau
    return max(accuracies[-count:]) < max(accuracies[:-count]) + least


@functools.lru_cache(maxsize=8)
def _programs(model: str, optimizer: str, embedding: Callable | None):
    """(step, evaluation, create(key) -> state, number of parameters) for JSON of the two sections."""
    config = Config(model=model_config(json.loads(model)), optimizer=OptimizerConfig(**json.loads(optimizer)))
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])

    def new_model(key: jax.Array) -> tuple[nnx.GraphDef, Any]:
        from deltaformer_jax.model import LanguageModel

        rngs = nnx.Rngs(key)
        made = LanguageModel(config.model, rngs=rngs)
        if embedding is not None:
            made.embedding = embedding(config.model, rngs=rngs)
        return nnx.split(made)

    graphdef, variables = jax.eval_shape(lambda: new_model(jax.random.key(0)))
    params = nnx.to_pure_dict(variables)
    everywhere = lambda value: jax.tree.map(lambda _: value, params)
    parts = ModelParts(graphdef, params, everywhere(()), everywhere(False))
    optimiser = make_optimiser(config.optimizer, parts.decay)
    _, shardings = abstract_state(config, parts, mesh)

    def create(key: jax.Array) -> TrainState:
        params = nnx.to_pure_dict(new_model(key)[1])
        return TrainState(params, optimiser.init(params), jnp.zeros((), jnp.int32), new_guard())

    step = make_train_step(config, parts, mesh, shardings)
    evaluation = make_evaluation_step(parts, mesh)
    return step, evaluation, jax.jit(create, out_shardings=shardings), count_parameters(parts)


def model_config(fields: dict[str, Any]) -> ModelConfig:
    """ModelConfig of a cell's plain fields, whose mixers are a list."""
    return ModelConfig(**{**fields, "mixers": tuple(fields.get("mixers", ("delta_former",)))})


def _batch(task: Any, seed: int | str, indices: np.ndarray) -> dict[str, np.ndarray]:
    examples = task(seed, indices)
    return {
        "tokens": examples.tokens,
        "targets": examples.targets,
        "segment_ids": examples.real.astype(np.int32),
        "loss_mask": examples.counted,
    }
