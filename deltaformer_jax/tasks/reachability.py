"""Reachability in a directed acyclic graph of two random trees: is a node in the same tree as the first node?

Source: Xu et al., DeltaFormer (NeurIPS 2025), section 4.2, Figure 5.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np

from deltaformer_jax.tasks.draws import Draws
from deltaformer_jax.tasks.examples import check_least


class Graphs(NamedTuple):
    """N graphs of n nodes.

    * rows float32 [N, n, width]: the model's input, in place of embedded tokens.
    * targets int32 [N, n]: 1 if the node is in the same tree as node 0, else 0.
    * counted bool [N, n]: all True.
    * parents int64 [N, n]: each node's parent; a root is its own parent.
    """

    rows: np.ndarray
    targets: np.ndarray
    counted: np.ndarray
    parents: np.ndarray


@dataclasses.dataclass(frozen=True)
class Reachability:
    """row_t = e_t + e_parent(t), or e_t for a root; row_0 also has a 1 in column n, as a mark.

    Nodes are in topological order. A random half of them forms one tree, the rest the other. In each tree every node
    but the first has one parent, uniform among the earlier nodes of its tree.

    Args: nodes: n, even. width: the width of the rows, or 0 for n + 1; the columns after column n are 0. Raises
      ValueError for arguments that don't fit. `task(seed, indices)` -> Graphs.
    """

    nodes: int = 32
    width: int = 0

    target_vocabulary = 2

    def __post_init__(self):
        check_least("nodes", self.nodes, 2)
        if self.nodes % 2:
            raise ValueError(f"nodes={self.nodes}: must be even, since each tree has half of them")
        if self.width and self.width <= self.nodes:
            raise ValueError(f"width={self.width}: must be at least nodes + 1 = {self.nodes + 1}, or 0 to take that")

    def __call__(self, seed: int | str, indices: np.ndarray) -> Graphs:
        draws = Draws(seed, "reachability", indices)
        n, half = self.nodes, self.nodes // 2
        tree = np.ones((len(np.asarray(indices)), n), np.int64)
        np.put_along_axis(tree, draws.choices(half, n), 0, axis=1)
        members = np.argsort(tree, axis=1, kind="stable")  # the first tree's nodes in order, then the second's
        rank = np.where(tree == 0, np.cumsum(tree == 0, axis=1), np.cumsum(tree, axis=1)) - 1
        earlier = draws.integers(n, np.maximum(rank, 1))
        parents = np.take_along_axis(members, half * tree + earlier, axis=1)
        parents = np.where(rank == 0, np.arange(n), parents)

        rows = np.zeros((*tree.shape, self.width or n + 1), np.float32)
        np.put_along_axis(rows, parents[..., None], 1, axis=2)
        rows[:, np.arange(n), np.arange(n)] = 1
        rows[:, 0, n] = 1
        targets = (tree == tree[:, :1]).astype(np.int32)
        return Graphs(rows, targets, np.ones(tree.shape, bool), parents)
