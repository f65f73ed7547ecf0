"""What `--tasks` does: long-context tasks of this package and tasks of lm-evaluation-harness, for a run's model."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deltaformer_jax.evaluate.long_context.accuracy import accuracy, examples
from deltaformer_jax.evaluate.long_context.generators import Example
from deltaformer_jax.evaluate.task_flags import LONG_FLAGS, split_names
from deltaformer_jax.host.waiting import say_aside, waiting

SHORTEST = 256  # tokens: the first of the lengths where --lengths is not given; each next one is twice as long


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
    # Whatever can be wrong is said before the first answer.
    if flags.out is not None:
        try:
            Path(flags.out).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"--out {flags.out}: {error.strerror or error}; give a folder, new or not") from None
    with waiting("making the long-context texts", say_aside) if long else contextlib.nullcontext():
        asked = {name: _asked(flags, name, run.tokenizer, trained) for name in long}
    if others:
        result["tasks"] = _harness(flags, run, model, others, length, size)
        _write(flags, result)
    for name in long:
        with waiting(f"asking {name}", say_aside):
            records = accuracy(_answering(model, run.tokenizer, size), name, asked[name])
        result["long_context"] = result.get("long_context", []) + records
        _write(flags, result)
    if flags.out is not None and long:
        from deltaformer_jax.evaluate.long_context.picture import heat_map

        picture = heat_map(result["long_context"], Path(flags.workdir).name, trained)
        picture.savefig(Path(flags.out) / "long_context.png", dpi=160)
    return result


def _write(flags, result: dict[str, Any]) -> None:
    """After each task, so that a later one that fails loses nothing."""
    if flags.out is not None:
        (Path(flags.out) / "tasks.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


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


def _asked(flags, name: str, tokenizer, trained: int) -> dict[int, list[Example]]:
    given = {flag: getattr(flags, flag) for flag in LONG_FLAGS}
    depths, count, seed = (
        LONG_FLAGS[flag] if given[flag] is None else given[flag] for flag in ("depths", "examples", "seed")
    )
    lengths = flags.lengths or default_lengths(trained)
    return {length: examples(name, tokenizer, length, depths, count, seed) for length in lengths}


def _answering(model, tokenizer, size: int) -> Callable[[list[str], list[int]], list[str]]:
    from deltaformer_jax.decoding import generate

    def answer(texts: list[str], most: list[int]) -> list[str]:
        completions = generate(
            model, texts, max_tokens=most, tokenizer=tokenizer, temperature=0.0, stop=["\n"], batch_size=size
        )
        return [completion.text for completion in completions]

    return answer


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
