"""The definition of an experiment: independent cells of work, and a table and a figure of their results."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

from etils import epath


@dataclasses.dataclass(frozen=True)
class Experiment:
    """An experiment, as functions.

    * `cells(quick)` returns the settings of each cell as plain JSON. Each has a different "label".
    * `run(settings, folder, note, stop)` runs one cell. It returns its result as plain JSON, or None if
      `stop.requested` ended it early. To resume later, it may keep files in `folder`, after `unfinished.claim(folder)`.
      `note(text)` prints a message.
    * `rows(done)` returns the lines of the table, `figure(done)` a matplotlib Figure. `done` holds the records of the
      finished cells: {"settings", "result", "seconds", "machine"}.
    * `cost` says how long the full and the quick form take.
    """

    cells: Callable[[bool], list[dict[str, Any]]]
    run: Callable[[dict[str, Any], epath.Path, Callable[[str], Any], Any], dict[str, Any] | None]
    rows: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]
    figure: Callable[[list[dict[str, Any]]], Any]
    cost: str


# Name -> (description, the module that holds EXPERIMENT).
NAMES = {
    "mixers": (
        "the mixers as language models of Python's standard library, with equal numbers of parameters and tokens",
        "language.mixers",
    ),
    "experts": (
        "DeltaFormer against a Transformer, dense and with experts, on code and on prose, several seeds",
        "language.experts",
    ),
    "unipool": (
        "one pool of experts for all layers (UniPool) against experts of each layer's own, by router, several seeds",
        "language.unipool",
    ),
    "redundancy": (
        "how much a model loses without some of its layers: Block Influence and four other rankings, elastic training",
        "language.redundancy",
    ),
    "baichuan": (
        "Baichuan-M1's attention without one of its parts: windows, wide heads, KV shifting, the rotary base",
        "language.baichuan",
    ),
    "shift_ffn": (
        "Shift-FFN, KV shifting, convolutions or neither: bits per byte, change from token to token, loops when greedy",
        "language.shift_ffn",
    ),
    "sepllm": (
        "attention to a window, first tokens and separators (SepLLM) against full attention, for both mixers",
        "language.sepllm",
    ),
    "longred": (
        "a context extended by four: long texts alone, long and short ones, and restoration distillation (LongReD)",
        "language.longred",
    ),
    "extrapolation": (
        "bits per byte at contexts longer than in training: RoPE, ALiBi, Kerple, FIRE, DAPE, mixers without positions",
        "language.extrapolation",
    ),
    "theorem1": (
        "an exact memory of n slots under swaps, with and without compression of its cache",
        "deltaformer.theorem1",
    ),
    "snr": (
        "retrieval from an associative memory: noise to signal by number of pairs and width, measured and by formula",
        "associative_memory.snr",
    ),
    "snr_sweeps": (
        "the same noise by the kernel of a feed-forward layer, by temperature, heads and experts",
        "associative_memory.snr_sweeps",
    ),
    "infinite_context": (
        "what memories know after infinitely many noisy examples: floors of the error, measured and by formula",
        "associative_memory.infinite_context",
    ),
    "ffn_memory": (
        "how many facts a feed-forward layer stores, by its kernel and width",
        "associative_memory.ffn_memory",
    ),
    "rope_base": ("the least base of a rotary embedding for each context length", "rope.rope_base"),
    "rope_retrieval": (
        "recall of a key by its distance, and bits per byte, by the base of the rotary embedding",
        "rope.rope_retrieval",
    ),
    "rope_swap": (
        "tracking swaps by the base of the rotary embedding, and with a write that is not rotated",
        "rope.rope_swap",
    ),
    "table6": ("times of the recurrent, parallel and chunked implementations on this machine", "deltaformer.table6"),
    "figure3": (
        "tracking swaps of 5 elements: similarities of DeltaFormer against Transformers",
        "deltaformer.figure3",
    ),
    "figure4": (
        "tracking 256 swaps, trained by a curriculum and directly, and tested at 512 and 1024 swaps",
        "deltaformer.figure4",
    ),
    "figure5": ("reachability in a graph: similarities of DeltaFormer against Transformers", "deltaformer.figure5"),
    "figure6": (
        "tracking more elements than keys are wide, with fixed keys: linear and round similarity",
        "deltaformer.figure6",
    ),
    "table1": ("associative recall (MQAR) by read similarity", "deltaformer.table1"),
    "table5": ("formal languages, tested at lengths longer than in training", "deltaformer.table5"),
    "mqar": (
        "associative recall (MQAR) by ten mixers at the four usual sizes, with 256 and 8,192 words",
        "recall.mqar",
    ),
    "eviction": (
        "associative recall from caches that keep some of the prompt's entries, by who chooses them",
        "recall.eviction",
    ),
    "streaming": (
        "byte models that read a million bytes through caches of fixed size: loss by position, entries, bytes",
        "language.streaming",
    ),
    "word_problem": ("products of permutations of five elements", "state_tracking.word_problem"),
    "induction": (
        "induction by one layer with KV shifting against vanilla attention and DeltaFormer, and by width",
        "kv_shift.induction",
    ),
    "kv_shift_theory": (
        "KV shifting as an exact induction head, and the loss of its scalars",
        "kv_shift.kv_shift_theory",
    ),
    "kv_shift_tasks": (
        "3-grams and hops, with and without KV shifting, in softmax attention and DeltaFormer",
        "kv_shift.kv_shift_tasks",
    ),
    "kv_shift_rates": (
        "small language models with and without KV shifting, by learning rate and seed",
        "kv_shift.kv_shift_rates",
    ),
}


def load(name: str) -> Experiment:
    return importlib.import_module(f"deltaformer_jax.reproduce.{NAMES[name][1]}").EXPERIMENT
