"""The papers' synthetic tasks. Every example is a function of (seed, its index): `task(seed, indices)` draws any batch.

| task | what is asked |
| --- | --- |
| `SwapTracking` | which element is first after these swaps? |
| `Reachability` | which nodes of a graph are in the first one's tree? |
| `MQAR` | which value came with this key? |
| `ModularArithmetic`, `Parity`, `ReverseString`, `DuplicateString`, `OddsFirst`, `StackManipulation` | of a string |
| `WordProblem` | the product of these elements of S5 or A5 |
| `SwapConstruction` over `near_orthogonal_keys` | Theorem 1 of DeltaFormer, as keys and values |

NumPy alone; `TaskSource` makes grain sources of them, and a `data.path` of "task:NAME,option=value" trains on one whose
inputs are tokens. `Reachability`'s are rows of an adjacency matrix, for a model that takes vectors: figure5 of
`deltaformer_jax.reproduce` trains it; `SwapConstruction` has nothing to learn.
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
    "DuplicateString",
    "Examples",
    "Graphs",
    "ModularArithmetic",
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
