"""The stages of a cell that trains a model: successive ordinary training runs, each on a task at one length.

A stage starts from the final state of the stage before it. It ends when its evaluations show that the task is solved,
or that the accuracy no longer improves. Its folder is the folder of an ordinary run, so an interrupted cell resumes
like any run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from etils import epath
from flax import nnx
from jax.sharding import Mesh

from deltaformer_jax.config import Config, DataConfig, Mixer, ModelConfig, OptimizerConfig, RunConfig
from deltaformer_jax.data import TaskData, batches
from deltaformer_jax.data.task_data import TaskRows
from deltaformer_jax.data.tokenizer import TaskVocabulary
from deltaformer_jax.reproduce import unfinished
from deltaformer_jax.sharding.mesh import batch_sharding
from deltaformer_jax.tasks.spec import PREFIX
from deltaformer_jax.training.checkpoints.store import Checkpoints
from deltaformer_jax.training.evaluation import evaluate
from deltaformer_jax.training.program import Program
from deltaformer_jax.training.setup import Prepared, prepare
from deltaformer_jax.training.state import TrainState

EVALUATION_TOKENS = 8192  # most tokens in one batch of an evaluation
SAY_EVERY = 10.0  # seconds between progress messages


class Stage(TaskData):
    """The data of a stage: a task at one length. Training begins at example `first`; evaluation has `rows` examples."""

    def __init__(self, spec: str, task: Any, rows: int, first: int = 0):
        self.path, self.length, self.examples = spec, task.length, rows
        self._task, self._first = task, first
        self.tokenizer = TaskVocabulary(max(task.input_vocabulary, task.target_vocabulary))
        self.hash = hashlib.sha256(repr((task, rows, first)).encode()).hexdigest()

    @property
    def evaluation_batch_size(self) -> int:
        return max(1, min(self.examples, EVALUATION_TOKENS // self.length))

    def rows(self, sequence_length: int, seed: int | None) -> TaskRows:
        return TaskRows(self._task, seed, first=0 if seed is None else self._first, examples=self.examples)


class Progress(NamedTuple):
    """The progress of a cell at the beginning of stage number `stage`, as plain JSON.

    solved: the step at which each stage was solved, or None. step, examples, tokens: totals so far. curve: one entry
    per evaluation so far. tests: the accuracies of the tests that are done; tests run after training.
    """

    solved: list[int | None]
    stage: int = 0
    step: int = 0
    examples: int = 0
    tokens: int = 0
    curve: list[list] = []
    tests: dict[str, float] = {}


@contextlib.contextmanager
def _damage_is_said(folder: epath.Path) -> Iterator[None]:
    """Turn an error in reading existing stages into a ValueError that names --out."""
    there = folder.parent.exists()  # whether this stage or an earlier one has been started
    try:
        yield
    except (ValueError, OSError) as error:
        if not there:
            raise
        raise ValueError(f"--out: {folder} is damaged: {error}; {unfinished.ADVICE}") from None


class Cell:
    """The stages of a cell with these `settings`: their tasks, configs, runs and progress."""

    def __init__(
        self,
        settings: dict[str, Any],
        folder: epath.Path,
        note: Callable[[str], Any],
        make_task: Callable[[str, int], Any],
        make_model: Callable[..., nnx.Module],
    ):
        lengths = settings["lengths"]
        each = lambda given: given if isinstance(given, list) else [given] * len(lengths)
        self.specs, self.targets, self.sizes, self.asked = (
            each(settings[key]) for key in ("task", "target", "batch_size", "eval_rows")
        )
        self.tasks = [make_task(spec, length) for spec, length in zip(self.specs, lengths, strict=True)]
        # The vocabulary must fit the stage with the most tokens: a token id beyond it would give NaN.
        words = max(max(task.input_vocabulary, task.target_vocabulary) for task in self.tasks)
        self._model = json.dumps({**settings["model"], "vocab_size": words}, sort_keys=True)
        self._settings, self._folder, self._note, self._make_model = settings, folder, note, make_model

    def keep(self, at: Progress) -> None:
        unfinished.save(self._folder, self._settings, at._asdict())

    def stage_folder(self, stage: int) -> epath.Path:
        return self._folder / unfinished.STAGES / str(stage)

    def config(self, at: Progress) -> Config:
        """The config of the stage's run. rollback_after is set so high that the run never goes back to a checkpoint."""
        steps, task = self._settings["steps"] - at.step, self.tasks[at.stage]
        optimizer = OptimizerConfig(**self._settings["optimizer"])
        return Config(
            model=model_config(json.loads(self._model)),
            data=DataConfig(
                path=PREFIX + self.specs[at.stage].removeprefix(PREFIX),
                sequence_length=task.length,
                batch_size=self.sizes[at.stage],
            ),
            optimizer=dataclasses.replace(optimizer, rollback_after=self._settings["steps"] + 1),
            run=RunConfig(
                steps=steps,
                seed=self._settings["seed"],
                log_every=1,
                # A stage can end only at an evaluation.
                eval_every=self._settings["eval_every"],
                checkpoint_every=0,
                keep_checkpoints=1,
                sample_prompt="",
            ),
        )

    def prepare(self, at: Progress) -> Prepared:
        """The stage's run, new or resumed. Raises ValueError if an existing one is damaged."""
        config, folder = self.config(at), self.stage_folder(at.stage)
        data = Stage(config.data.path, self.tasks[at.stage], self.asked[at.stage], at.examples)
        with _damage_is_said(folder):
            return prepare(
                config,
                folder,
                devices=jax.devices()[:1],  # only one device is used, since the models are small
                corpus=data,
                evaluation_batch_size=data.evaluation_batch_size,
                make_program=lambda config, mesh: _program(
                    self._model, json.dumps(self._settings["optimizer"], sort_keys=True), self._make_model, mesh
                ),
                begin=self._last_state(at.stage - 1) if at.stage else None,
            )

    def _last_state(self, stage: int) -> Callable[[Program], TrainState]:
        """A function that reads the final state of stage number `stage`."""

        def read(program: Program) -> TrainState:
            with contextlib.closing(Checkpoints(self.stage_folder(stage) / "checkpoints")) as checkpoints:
                return checkpoints.restore_newest(program.abstract, self._note)[0]

        return read

    def until(self, at: Progress, records: list[dict[str, Any]]) -> Callable[[dict[str, Any]], bool]:
        """A function of an evaluation's record: whether to end the stage, because it is solved or has a plateau."""
        said = time.perf_counter()

        def ends(evaluation: dict[str, Any]) -> bool:
            nonlocal said
            if time.perf_counter() > said + SAY_EVERY:
                said = time.perf_counter()
                self._note(
                    f"    step {at.step + evaluation['step']} of at most {self._settings['steps']}, "
                    f"length {self.tasks[at.stage].length}: accuracy {evaluation['eval_accuracy']:.4f}"
                )
            scores = [record["eval_accuracy"] for record in records if "eval_accuracy" in record]
            return self._is_solved(at.stage, scores) or _stands_still(scores, self._settings.get("plateau"))

        return ends

    def _is_solved(self, stage: int, scores: list[float]) -> bool:
        patience = self._settings["patience"]
        return len(scores) >= patience and all(score >= self.targets[stage] for score in scores[-patience:])

    def after(self, at: Progress, steps: int, records: list[dict[str, Any]]) -> Progress:
        """The cell's progress after `steps` steps of the current stage, whose metrics are `records`.

        If the stage is solved, the progress is at the next stage.
        """
        task, size = self.tasks[at.stage], self.sizes[at.stage]
        losses = {record["step"]: _loss(record) for record in records if "eval_loss" not in record}
        scores = {record["step"]: record["eval_accuracy"] for record in records if "eval_loss" in record}
        solved = list(at.solved)
        if is_solved := self._is_solved(at.stage, list(scores.values())):
            solved[at.stage] = at.step + steps
        return at._replace(
            solved=solved,
            stage=at.stage + is_solved,
            step=at.step + steps,
            examples=at.examples + steps * size,
            tokens=at.tokens + steps * size * task.length,
            curve=[
                *at.curve,
                *(
                    [at.step + step, task.length, round(score, 5), round(losses[step], 5)]
                    for step, score in scores.items()
                ),
            ],
        )


def _loss(record: dict[str, Any]) -> float:
    """The loss in a record of metrics.jsonl; a skipped step's record has it in a text, "loss nan, gradient nan"."""
    return record["loss"] if "loss" in record else float(record["because"].split()[1].rstrip(","))


def _stands_still(accuracies: list[float], plateau: list | None) -> bool:
    """Whether, for plateau [n, least], none of the last n accuracies exceeds the best earlier one by `least`."""
    if plateau is None or len(accuracies) <= plateau[0]:
        return False
    count, least = plateau
    return max(accuracies[-count:]) < max(accuracies[:-count]) + least


def accuracy(program: Program, params: Any, asked: Stage) -> float:
    """The accuracy on the evaluation examples: the fraction of counted positions that are predicted correctly."""
    rows = batches(asked, "eval", sequence_length=asked.length, batch_size=asked.evaluation_batch_size, seed=0)
    return evaluate(
        program.evaluation_step,
        params,
        rows,
        token_bytes=asked.tokenizer.token_bytes,
        sharding=batch_sharding(program.mesh),
    ).accuracy


@functools.lru_cache(maxsize=8)
def _program(model: str, optimizer: str, make_model: Callable[..., nnx.Module], mesh: Mesh) -> Program:
    """A Program for a model and an optimiser, both given as JSON. It is cached, so cells that differ only in seed share
    compiled programs."""
    config = Config(model=model_config(json.loads(model)), optimizer=OptimizerConfig(**json.loads(optimizer)))
    return Program(config, mesh, make_model)


def model_config(fields: dict[str, Any]) -> ModelConfig:
    """The ModelConfig of a cell's fields, in which mixers is a list."""
    return ModelConfig(**{**fields, "mixers": tuple(map(mixer_of, fields.get("mixers", ("delta_former",))))})


def mixer_of(plain: str | list) -> str | Mixer:
    """An entry of a pattern from plain JSON: a name, or [name, {field: value}]."""
    return plain if isinstance(plain, str) else Mixer(plain[0], **plain[1])
