"""Figure 5: reachability in a directed acyclic graph of 32 nodes, DeltaFormer of one layer against Transformers.

A node's token is its row of the adjacency matrix: a one at itself and at its parent, and a mark on the first. The rows
are read as they are, padded with zeros to the model's width; only the model is trained. Around one choice of settings
(w a projection of its own, heads wider than the number of nodes, no rotary embedding, keys not normalised, learning
rate 3e-3) each other choice is tried alone. Source: Xu et al., DeltaFormer (NeurIPS 2025), section 4.2.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from deltaformer_jax.config import ModelConfig
from deltaformer_jax.layers.embedding import Embedding
from deltaformer_jax.reproduce import train_task
from deltaformer_jax.reproduce.experiment import Experiment
from deltaformer_jax.reproduce.families import rows
from deltaformer_jax.reproduce.pictures import accuracy_bars, accuracy_curves, new_figure
from deltaformer_jax.tasks import Examples, Reachability

FULL = dict(
    nodes=32, width=64, heads=4, head_dim=64, steps=4000, seeds=3, search=True, batch_size=64,
    similarities=("linear", "relu", "exp", "softmax", "round"), layers=(1, 2, 4),
)  # fmt: skip
QUICK = dict(
    nodes=16, width=32, heads=2, head_dim=32, steps=500, seeds=1, search=False, batch_size=64,
    similarities=("linear", "softmax", "round"), layers=(1, 2),
)  # fmt: skip

BASE = "projected w, no RoPE, raw keys, 3e-3"
TRANSFORMER_BASE = "no RoPE, 3e-3"
DELTA_VARIANTS = {
    "w = k": ({"write_query": "key"}, 3e-3),
    "RoPE": ({"rope_base": 10_000.0}, 3e-3),
    "unit keys": ({"write_key_norm": "on"}, 3e-3),
    "heads of width 16": ({"head_dim": 16}, 3e-3),
    "raw β": ({"beta": "raw"}, 3e-3),
    "1e-3": ({}, 1e-3),
}
TRANSFORMER_VARIANTS = {"RoPE": ({"rope_base": 10_000.0}, 3e-3), "1e-3": ({}, 1e-3)}


@dataclasses.dataclass(frozen=True)
class GraphTokens:
    """`Reachability` in whole numbers: node t with parent p is token t n + p (a root: p = t). length: n, the nodes."""

    length: int

    target_vocabulary = 2

    @property
    def input_vocabulary(self) -> int:
        return self.length**2

    def __call__(self, seed: int | str, indices: np.ndarray) -> Examples:
        graphs = Reachability(nodes=self.length)(seed, indices)
        tokens = np.arange(self.length) * self.length + graphs.parents
        return Examples(tokens.astype(np.int32), graphs.targets, graphs.counted, np.ones_like(graphs.counted))


class AdjacencyRows(Embedding):
    """`Reachability`'s rows of `GraphTokens`, [B,T] -> [B,T,d_model], nothing learnt; and two logits, learnt."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.nodes = round(config.vocab_size**0.5)
        if config.d_model <= self.nodes:
            raise ValueError(f"d_model={config.d_model}: must be at least nodes + 1 = {self.nodes + 1}")
        super().__init__(2, config.d_model, tied=False, dtype=config.compute_dtype, rngs=rngs)
        self.table = None

    def __call__(self, tokens, segment_ids=None):
        del segment_ids  # every row is a whole graph
        node, parent = jnp.divmod(tokens, self.nodes)
        one = lambda place: jax.nn.one_hot(place, self.d_model, dtype=self.dtype)
        mark = jnp.where(node == 0, self.nodes, -1)  # one_hot of -1 is zero
        return jnp.maximum(jnp.maximum(one(node), one(parent)), one(mark))


def cells(quick: bool, sizes: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    sizes = sizes or (QUICK if quick else FULL)
    found = []
    for similarity in sizes["similarities"]:
        model = {"write_similarity": similarity, "write_key_norm": "off", "write_query": "projected"}
        found += _family(sizes, f"DeltaFormer, {similarity}", 1, "delta_former", model, DELTA_VARIANTS)
    for layers in sizes["layers"]:
        name = f"Transformer, {layers} layer{'s' if layers > 1 else ''}"
        found += _family(sizes, name, layers, "softmax_attention", {}, TRANSFORMER_VARIANTS)
    return found


def _family(sizes, family, layers, mixer, model, variants) -> list[dict[str, Any]]:
    width, heads = sizes["width"], sizes["heads"]
    model = {
        "mixers": [mixer], "d_model": width, "num_layers": layers, "num_heads": heads, "num_kv_heads": heads,
        "head_dim": sizes["head_dim"], "tie_embeddings": False, "rope_base": 0.0, "chunk_size": sizes["nodes"], **model,
    }  # fmt: skip

    def cell(variant, changes, learning_rate, seed):
        settings = train_task.settings_of(
            f"{family}, {variant}, seed {seed}", "reachability", [sizes["nodes"]], model={**model, **changes},
            learning_rate=learning_rate, steps=sizes["steps"], seed=seed, batch_size=sizes["batch_size"],
        )  # fmt: skip
        return {**settings, "family": family, "variant": variant}

    base = BASE if mixer == "delta_former" else TRANSFORMER_BASE
    found = [cell(base, {}, 3e-3, seed) for seed in range(sizes["seeds"])]
    if sizes["search"]:
        found += [cell(name, changes, rate, 0) for name, (changes, rate) in variants.items()]
    return found


def run(settings: dict[str, Any], folder, note, stop) -> dict[str, Any] | None:
    make = lambda name, length: GraphTokens(length)
    return train_task.run(settings, folder, note, stop, make=make, embedding=AdjacencyRows)


def figure(done: list[dict[str, Any]]):
    picture = new_figure(12, 4.8)
    curves, bars = picture.subplots(1, 2, width_ratios=(3, 2))
    base = [r for r in done if r["settings"]["variant"] in (BASE, TRANSFORMER_BASE)]
    accuracy_curves(curves, base, "family", 0.5)
    curves.set_title(BASE)
    accuracy_bars(bars, done, "family")
    bars.set_title("all settings tried")
    picture.suptitle(f"{done[0]['settings']['lengths'][0]} nodes in two trees: which are in the first node's?")
    return picture


EXPERIMENT = Experiment(
    cells=cells, run=run, rows=rows, figure=figure,
    cost="one to five minutes a run on two cores, 60 runs; --quick: a minute and a half in all",
)  # fmt: skip
