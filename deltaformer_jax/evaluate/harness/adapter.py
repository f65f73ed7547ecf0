"""The model as a class of lm-evaluation-harness, and a run of its tasks. This file alone imports the harness."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

from deltaformer_jax.evaluate.harness.answers import Answers
from deltaformer_jax.evaluate.long_context.generators import TASKS
from deltaformer_jax.host.spelling import did_you_mean

OWN_TASKS = Path(__file__).parent / "own_tasks"


class HarnessModel(LM):
    """`Answers` behind the three methods of `lm_eval.api.model.LM`, for any program that takes such a model."""

    def __init__(self, answers: Answers):
        super().__init__()
        self._answers = answers

    def loglikelihood(self, requests, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return self._answers.loglikelihood([request.args for request in requests])

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        return self._answers.loglikelihood_rolling([request.args[0] for request in requests])

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        return self._answers.generate_until([request.args for request in requests])


def task_manager(folders: Sequence[str] = ()) -> TaskManager:
    """The harness's tasks, the package's own, and those of YAML files in `folders`."""
    return TaskManager(include_path=[str(OWN_TASKS), *folders])


def check_tasks(manager: TaskManager, names: Sequence[str]) -> None:
    """Raise ValueError for a task that the harness does not know."""
    unknown = [name for name in names if not manager.match_tasks([name])]
    if unknown:
        own = sorted(path.stem for path in OWN_TASKS.glob("*.yaml"))
        raise ValueError(
            f"--tasks {unknown[0]}: no such task; `lm_eval ls tasks` prints the harness's, and this package adds "
            f"{', '.join(own)}{did_you_mean(unknown[0], [*own, *TASKS])}"
        )


def run_tasks(
    answers: Answers,
    names: Sequence[str],
    manager: TaskManager,
    *,
    num_fewshot: int | None = None,
    limit: int | None = None,
) -> dict[str, dict[str, Any]]:
    """Task -> metric -> value, as the harness reports them. `limit`: only the first so many examples of a task."""
    with contextlib.redirect_stdout(sys.stderr):  # stdout is for the result
        found = simple_evaluate(
            HarnessModel(answers),
            tasks=list(names),
            task_manager=manager,
            num_fewshot=num_fewshot,
            limit=limit,
            log_samples=False,
            bootstrap_iters=0,
        )
    return {
        task: {metric.removesuffix(",none"): value for metric, value in metrics.items() if _is_number(value)}
        for task, metrics in found["results"].items()
    }


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
