"""What an experiment is: cells of work that know nothing of each other, a table and a figure of what they found."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

from etils import epath


@dataclasses.dataclass(frozen=True)
class Experiment:
    """`cells(quick)` gives the settings of each cell, plain JSON, "label" among them and different in each.

    `run(settings, folder, note, stop)` does one and returns plain JSON, or None if `stop.requested` ended it early; it
    may keep what it needs to go on in `folder`, which it has to `unfinished.claim` first. `rows(done)` are the lines of
    the table and `figure(done)` a matplotlib Figure, of the finished cells' records {"settings", "result", "seconds",
    "machine"}. `cost` says how long both forms take.
    """

    cells: Callable[[bool], list[dict[str, Any]]]
    run: Callable[[dict[str, Any], epath.Path, Callable[[str], Any], Any], dict[str, Any] | None]
    rows: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]
    figure: Callable[[list[dict[str, Any]]], Any]
    cost: str


# Name -> (what it shows, the module that holds EXPERIMENT).
NAMES = {
    "mixers": ("every mixer on the standard library's text, parameters and tokens equal", "language.mixers"),
    "theorem1": (
        "an exact memory of n slots under swaps, with and without compression of its cache",
        "deltaformer.theorem1",
    ),
    "snr": ("retrieval: noise to signal against pairs and width, measured and by formula", "associative_memory.snr"),
    "rope_base": ("the bases of a rotary embedding that bound the context", "rope.rope_base"),
    "table6": ("times of the recurrent, parallel and chunked forms on this machine", "deltaformer.table6"),
    "figure3": (
        "tracking swaps of 5 elements: similarities of DeltaFormer against Transformers",
        "deltaformer.figure3",
    ),
    "figure4": ("swaps in rows of 256 by a curriculum and directly, and at 512 and 1024", "deltaformer.figure4"),
    "figure5": ("reachability in a graph: similarities of DeltaFormer against Transformers", "deltaformer.figure5"),
    "figure6": ("more elements than width, with fixed keys: linear against round", "deltaformer.figure6"),
    "table1": ("associative recall by read similarity", "deltaformer.table1"),
    "table5": ("formal languages at lengths never trained on", "deltaformer.table5"),
    "mqar": ("associative recall by every mixer at the four usual sizes, of 256 and of 8,192 words", "recall.mqar"),
    "word_problem": ("products of permutations of five things", "state_tracking.word_problem"),
}


def load(name: str) -> Experiment:
    return importlib.import_module(f"deltaformer_jax.reproduce.{NAMES[name][1]}").EXPERIMENT
