"""The few names of lm-evaluation-harness that the adapter imports, so that it can be tested without those packages.

`simple_evaluate` asks the model what record.json says that the harness asked, hands on the answers, and reports the
record's metrics as the harness does: "acc,none", and texts beside the numbers.
"""

import contextlib
import importlib
import sys
import types
from typing import NamedTuple

ADAPTER = "deltaformer_jax.evaluate.harness.adapter"
KINDS = {
    "offline_choice": "loglikelihood",
    "offline_copy": "generate_until",
    "offline_texts": "loglikelihood_rolling",
}


class LM:
    def __init__(self):
        self.begun = True


class TaskManager:
    def __init__(self, include_path):
        self.include_path = include_path

    def match_tasks(self, names):
        return [name for name in names if name in KINDS]


class Instance(NamedTuple):
    """A request: its `args` are (context, continuation), (text,) or (context, options)."""

    args: tuple


@contextlib.contextmanager
def adapter_over(record):
    """(the adapter, what it was asked with: a list of the options of each `simple_evaluate`, and the answers)."""
    calls, answers = [], {}

    def simple_evaluate(model, tasks, **options):
        assert isinstance(model, LM) and model.begun
        print("what the harness says")
        calls.append({"tasks": tasks, **options})
        for task in tasks:
            requests = [Instance(tuple(one["arguments"])) for one in record["answers"][task]]
            answers[task] = getattr(model, KINDS[task])(requests)
        metrics = {task: {f"{name},none": x for name, x in record["metrics"][task].items()} for task in tasks}
        return {"results": {task: {"alias": task, "higher": True, **found} for task, found in metrics.items()}}

    names = ("lm_eval", "lm_eval.api", "lm_eval.api.model", "lm_eval.tasks")
    modules = {name: types.ModuleType(name) for name in names}
    modules["lm_eval"].simple_evaluate = simple_evaluate
    modules["lm_eval.api.model"].LM = LM
    modules["lm_eval.tasks"].TaskManager = TaskManager
    before = {name: sys.modules.pop(name, None) for name in (*names, ADAPTER)}
    sys.modules.update(modules)
    try:
        yield importlib.import_module(ADAPTER), calls, answers
    finally:
        for name, module in before.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module
