"""The papers' synthetic tasks. An example is a function of (seed, index): `task(seed, indices)` generates any batch.

| task | what the model must answer |
| --- | --- |
| `SwapTracking` | which element is at the first position after the swaps so far |
| `Reachability` | which nodes of a graph are in the same tree as the first node |
| `MQAR` | which value was stored with this key |
| `ModularArithmetic`, `Parity` | the value of an expression mod 5; of the sum of bits mod 2 |
| `ReverseString`, `DuplicateString`, `OddsFirst` | the symbols of a string in another order, or twice |
| `StackManipulation` | the contents of a stack after some actions |
| `Induction`, `HopK` | which word followed this word before; and which followed that, k times |
| `DistantRecall` | which value was stored with this key, a given distance before |
| `NGram` | which word follows two words, by heart |
| `WordProblem` | the product of the group elements so far, in S5, A5 or a smaller group |
| `SwapConstruction` over `near_orthogonal_keys` | nothing to learn: DeltaFormer's Theorem 1 as keys and values |

The tasks use NumPy only. `TaskSource` turns a task into a grain source. `data.path="task:NAME,option=value"` trains on
a task whose inputs are tokens. The inputs of `Reachability` are rows of an adjacency matrix, for a model that takes
vectors; the experiment figure5 of `deltaformer_jax.reproduce` trains on it.
"""

from deltaformer_jax.tasks.examples import Examples
from deltaformer_jax.tasks.formal_languages import (
    DuplicateString,
    ModularArithmetic,
    OddsFirst,
    Parity,
    ReverseString,
    StackManipulation,
)
from deltaformer_jax.tasks.in_context.distant_recall import DistantRecall
from deltaformer_jax.tasks.in_context.hop_k import HopK
from deltaformer_jax.tasks.in_context.induction import Induction
from deltaformer_jax.tasks.in_context.ngram import NGram
from deltaformer_jax.tasks.mqar import MQAR
from deltaformer_jax.tasks.orthogonal_keys import coherence, near_orthogonal_keys
from deltaformer_jax.tasks.reachability import Graphs, Reachability
from deltaformer_jax.tasks.source import TaskSource
from deltaformer_jax.tasks.spec import TOKEN_TASKS, make_task, read_spec
from deltaformer_jax.tasks.swap import SwapTracking
from deltaformer_jax.tasks.swap_construction import SwapConstruction, SwapMemory
from deltaformer_jax.tasks.word_problem import WordProblem

__all__ = [
    "MQAR",
    "TOKEN_TASKS",
    "DistantRecall",
    "DuplicateString",
    "Examples",
    "Graphs",
    "HopK",
    "Induction",
    "ModularArithmetic",
    "NGram",
    "OddsFirst",
    "Parity",
    "Reachability",
    "ReverseString",
    "StackManipulation",
    "SwapConstruction",
    "SwapMemory",
    "SwapTracking",
    "TaskSource",
    "WordProblem",
    "coherence",
    "make_task",
    "near_orthogonal_keys",
    "read_spec",
]
