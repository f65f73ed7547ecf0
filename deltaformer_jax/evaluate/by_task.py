"""What `--tasks` does: long-context tasks of this package and tasks of lm-evaluation-harness, for a run's model."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deltaformer_jax.evaluate.long_context.generators import TASKS
from deltaformer_jax.host.waiting import say_aside, waiting

SHORTEST = 256  # tokens: the first of the lengths where --lengths is not given; each next one is twice as long


def split_names(flags) -> tuple[list[str], list[str]]:
    """(long-context tasks, tasks of the harness) of --tasks. Raises ValueError naming the flag that cannot be."""
    names = [name.strip() for name in flags.tasks.split(",") if name.strip()]
    if not names:
        raise ValueError("--tasks: no task; give names with commas between them")
    for name, least in (("examples", 1), ("limit", 1), ("fewshot", 0)):
        if getattr(flags, name) is not None and getattr(flags, name) < least:
            raise ValueError(f"--{name} {getattr(flags, name)}: give {least} or more")
    outside = [depth for depth in flags.depths if not 0 <= depth <= 1]
    if outside:
        raise ValueError(f"--depths {outside[0]}: give shares of the text, from 0 (its beginning) to 1 (its end)")
    long = [name for name in names if name in TASKS]
    others = [name for name in names if name not in TASKS]
    if others and importlib.util.find_spec("lm_eval") is None:
        raise ValueError(
            f"--tasks {others[0]}: needs lm-evaluation-harness, pip install 'deltaformer-jax[eval]'; without it there "
            f"are {', '.join(TASKS)}"
        )
    return long, others


def default_lengths(trained: int) -> list[int]:
    """Powers of two from SHORTEST to twice the length of training."""
    lengths = [SHORTEST]
    while lengths[-1] < 2 * trained:
        lengths.append(2 * lengths[-1])
    return lengths


def run(flags, run, model) -> dict[str, Any]:
    """The result of --tasks, which is printed as JSON: {"tasks": task -> metric -> value, "long_context": records}.

    With --out also DIR/tasks.json, the same, and DIR/long_context.png if a long-context task is among the tasks.
    """
    long, others = split_names(flags)
    trained = run.config.data.sequence_length
    length, size = flags.sequence_length or trained, flags.batch_size or run.config.data.batch_size
    result: dict[str, Any] = {"step": run.step, "sequence_length": length}
    if others:
        result["tasks"] = _harness(flags, run, model, others, length, size)
    if long:
        lengths = flags.lengths or default_lengths(trained)
        result["long_context"] = _long_context(flags, run, model, long, lengths, size)
    if flags.out is not None:
        out = Path(flags.out)
        out.mkdir(parents=True, exist_ok=True)
        (out / "tasks.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        if long:
            from deltaformer_jax.evaluate.long_context.picture import heat_map

            picture = heat_map(result["long_context"], Path(flags.workdir).name, trained)
            picture.savefig(out / "long_context.png", dpi=160)
    return result


def _harness(flags, run, model, names, length, size):
    with waiting("importing lm_eval", say_aside):
        from deltaformer_jax.evaluate.harness.adapter import check_tasks, run_tasks, task_manager
        from deltaformer_jax.evaluate.harness.answers import Answers
    manager = task_manager([flags.include] if flags.include else [])
    check_tasks(manager, names)
    answers = Answers(
        model, run.tokenizer, length=length, batch_size=size, separator=not flags.no_separator, advance=_counted()
    )
    return run_tasks(answers, names, manager, num_fewshot=flags.fewshot, limit=flags.limit)


def _long_context(flags, run, model, names, lengths, size):
    from deltaformer_jax.decoding import generate
    from deltaformer_jax.evaluate.long_context.accuracy import accuracy

    def answer(texts: list[str], most: list[int]) -> list[str]:
        completions = generate(
            model, texts, max_tokens=most, tokenizer=run.tokenizer, temperature=0.0, stop=["\n"], batch_size=size
        )
        return [completion.text for completion in completions]

    records = []
    for name in names:
        with waiting(f"asking {name}", say_aside):
            records += accuracy(
                answer, name, run.tokenizer, lengths=lengths, depths=flags.depths, count=flags.examples, seed=flags.seed
            )
    return records


def _counted() -> Callable[[int], None]:
    """Says on stderr how many answers there are, after each hundred."""
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        if done // 100 < (done + count) // 100:
            say_aside(f"{done + count} answers")
        done += count

    return advance


def table(result: dict[str, Any]) -> str:
    """A text table: a line per task and metric, then a line per task, length and depth."""
    lines = [
        (task, metric, f"{value:.4f}")
        for task, metrics in result.get("tasks", {}).items()
        for metric, value in metrics.items()
        if isinstance(value, float)
    ]
    for record in result.get("long_context", ()):
        depth = "" if record["depth"] is None else f", depth {record['depth']:.2f}"
        lines.append((record["task"], f"{record['length']} tokens{depth}", f"{record['accuracy']:.4f}"))
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join(f"{a.ljust(widths[0])}  {b.ljust(widths[1])}  {c.rjust(widths[2])}" for a, b, c in lines)
