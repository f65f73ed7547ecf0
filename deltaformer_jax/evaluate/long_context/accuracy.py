"""How much of what a long text hides is found, by length, and by depth where the task has one."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from deltaformer_jax.data import Tokenizer
from deltaformer_jax.evaluate.long_context.generators import TASKS, Example

# (texts, the most tokens of each answer) -> the continuations.
Answer = Callable[[list[str], list[int]], list[str]]


def examples(
    task: str, tokenizer: Tokenizer, length: int, depths: Sequence[float], count: int, seed: int
) -> list[Example]:
    """`count` examples for each depth, or `count` in all of a task without depths. They depend on the arguments alone.

    Raises ValueError naming the task or the length.
    """
    if task not in TASKS:
        raise ValueError(f"--tasks {task}: the long-context tasks are {', '.join(TASKS)}")
    make, has_depth = TASKS[task]
    found = []
    for depth in depths if has_depth else (None,):
        for number in range(count):
            name = f"{seed} {task} {length} {depth} {number}"
            draw = random.Random(hashlib.sha256(name.encode()).digest())
            found.append(make(draw, tokenizer, length, depth))
    return found


def accuracy(answer: Answer, task: str, by_length: Mapping[int, Sequence[Example]]) -> list[dict[str, Any]]:
    """One record per length and depth: task, length, depth (None without one), examples, accuracy.

    by_length: the `examples` of each length. An example scores the share of its answers that its continuation holds, in
    any order and in any case, as in RULER.
    """
    records = []
    for length, asked in by_length.items():
        told = answer([example.text for example in asked], [example.answer_tokens for example in asked])
        by_depth: dict[float | None, list[float]] = {}
        for example, text in zip(asked, told, strict=True):
            by_depth.setdefault(example.depth, []).append(share_found(example.answers, text))
        records += [
            {"task": task, "length": length, "depth": depth, "examples": len(x), "accuracy": sum(x) / len(x)}
            for depth, x in by_depth.items()
        ]
    return records


def share_found(answers: Sequence[str], text: str) -> float:
    """The share of `answers` that are whole words of `text`."""
    words = "".join(x if x.isalnum() else " " for x in text.lower()).split()
    return sum(answer.lower() in words for answer in answers) / len(answers)
