"""The flags of `--tasks`, and which of them the tasks use. It imports nothing large."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from pathlib import Path

from deltaformer_jax.config.argument_parser import ArgumentParser
from deltaformer_jax.evaluate.long_context.generators import TASKS
from deltaformer_jax.host.paths import expand
from deltaformer_jax.host.spelling import did_you_mean

# The flags that only the one or the other kind of task uses, with their defaults.
HARNESS_FLAGS = {"fewshot": None, "limit": None, "include": None, "no_separator": False, "sequence_length": None}
LONG_FLAGS = {"lengths": None, "depths": (0.0, 0.25, 0.5, 0.75, 1.0), "examples": 10, "seed": 0}


def split_names(flags) -> tuple[list[str], list[str]]:
    """(long-context tasks, tasks of the harness) of --tasks. Raises ValueError naming the flag that cannot be."""
    names = [name.strip() for name in flags.tasks.split(",") if name.strip()]
    if not names:
        raise ValueError("--tasks: no task; give names with commas between them")
    for name, least in (("examples", 1), ("limit", 1), ("fewshot", 0)):
        if getattr(flags, name) is not None and getattr(flags, name) < least:
            raise ValueError(f"--{name} {getattr(flags, name)}: give {least} or more")
    outside = [depth for depth in flags.depths or () if not 0 <= depth <= 1]
    if outside:
        raise ValueError(f"--depths {outside[0]}: give shares of the text, from 0 (its beginning) to 1 (its end)")
    if flags.include is not None and not Path(flags.include).is_dir():
        raise ValueError(f"--include {flags.include}: no such folder; give one with YAML files of tasks")
    long = [name for name in names if name in TASKS]
    others = [name for name in names if name not in TASKS]
    if others and importlib.util.find_spec("lm_eval") is None:
        raise ValueError(
            f"--tasks {others[0]}: needs lm-evaluation-harness, pip install 'deltaformer-jax[eval]'; without it there "
            f"are {', '.join(TASKS)}{did_you_mean(others[0], TASKS)}"
        )
    _refuse(flags, ("data", "batches"), "is for the loss on data, not for --tasks")
    if not others:
        _refuse(flags, HARNESS_FLAGS, f"is for tasks of lm-evaluation-harness, not for {', '.join(long)}")
    if not long:
        _refuse(flags, LONG_FLAGS, f"is for long-context tasks ({', '.join(TASKS)}), not for {', '.join(others)}")
    elif flags.depths is not None and not any(TASKS[name][1] for name in long):
        raise ValueError(f"--depths: is for needle and needle_multikey, not for {', '.join(long)}; leave it out")
    return long, others


def refuse_task_flags(flags) -> None:
    """Raise ValueError for a flag that only --tasks uses; `flags` are without --tasks."""
    only = [name for name in HARNESS_FLAGS if name != "sequence_length"]
    _refuse(flags, ("out", *only, *LONG_FLAGS), "is for --tasks")


def _refuse(flags, names: Iterable[str], why: str) -> None:
    for name in names:
        if getattr(flags, name) is not None and getattr(flags, name) is not False:  # a 0 is given
            raise ValueError(f"--{name}: {why}; leave it out")


def add_task_flags(parser: ArgumentParser) -> None:
    parser.add_argument("--tasks", metavar="NAME,...", help="tasks to answer, instead of the loss on data")
    parser.add_argument("--out", type=expand, metavar="FOLDER", help="also write tasks.json and long_context.png here")
    parser.add_argument("--fewshot", type=int, metavar="N", help="worked examples in a prompt (default: the task's)")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N examples of each task of the harness")
    parser.add_argument("--include", type=expand, metavar="FOLDER", help="folder with more tasks of the harness (YAML)")
    parser.add_argument(
        "--no_separator",
        action="store_true",
        help="nothing before contexts: neither end-of-text, nor what an imported model's tokenizer begins texts with",
    )
    parser.add_argument(
        "--lengths",
        type=int,
        nargs="+",
        metavar="N",
        help="tokens of long-context texts (default: 256 and doubled, to twice the run's)",
    )
    parser.add_argument(
        "--depths",
        type=float,
        nargs="+",
        metavar="SHARE",
        help="where needles lie, 0: at the beginning, 1: at the end (default: 0 0.25 0.5 0.75 1)",
    )
    parser.add_argument(
        "--examples", type=int, metavar="N", help="long-context texts per length and depth (default: 10)"
    )
    parser.add_argument("--seed", type=int, metavar="N", help="draws the long-context texts (default: 0)")
