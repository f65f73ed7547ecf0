"""Figure 5: reachability in a directed acyclic graph of 32 nodes, a DeltaFormer of one layer against Transformers.

A node's input is its row of the adjacency matrix: ones at the node itself and at its parent; the first node's row also
has a mark. The rows, padded with zeros to the model's width, are the embeddings; these are not trained. The base
settings are: w = k, raw β, heads wider than the number of nodes, no rotary embedding, keys not normalised, learning
rate 3e-3. For one of the similarities, variants change these one at a time, and two of them together once.

Why β is raw: the rows of two siblings, and of a parent and its child, have an entry in common; other rows have none. So
with w = k a row attends to its parent and its siblings, which are all in its tree. With β = −1 it adds their mean to
itself, and the mark of the first node spreads through its tree. With β > 0 the sign changes at every hop, and the
contributions of a parent and of siblings cancel.

Source: Xu et al., DeltaFormer (NeurIPS 2025), section 4.2.
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
from deltaformer_jax.model import LanguageModel
from deltaformer_jax.plot.style import explain
from deltaformer_jax.reproduce import train_task
from deltaformer_jax.reproduce.experiment import Experiment
from deltaformer_jax.reproduce.families import rows, who_solves
from deltaformer_jax.reproduce.pictures import accuracy_figure
from deltaformer_jax.tasks import Examples, Reachability

# layers: number of layers of a Transformer -> number of seeds. search: the similarities for which variants are run.
FULL = dict(
    nodes=32,
    width=64,
    heads=2,
    head_dim=64,
    steps=1200,
    seeds=2,
    search=("softmax",),
    batch_size=64,
    similarities=("softmax", "linear", "relu", "exp", "round"),
    layers={1: 2, 2: 2, 4: 1},
)
QUICK = dict(
    nodes=16,
    width=32,
    heads=2,
    head_dim=32,
    steps=300,
    seeds=1,
    search=(),
    batch_size=64,
    similarities=("softmax", "linear", "round"),
    layers={1: 1, 2: 1},
)

BASE = "w = k, raw β, no RoPE, raw keys, 3e-3"
TRANSFORMER_BASE = "no RoPE, 3e-3"
DELTA_VARIANTS = {
    "projected w": ({"write_query": "projected"}, 3e-3),
    "β in (0, 1)": ({"beta": "sigmoid"}, 3e-3),
    "projected w, β in (0, 1)": ({"write_query": "projected", "beta": "sigmoid"}, 3e-3),
    "RoPE": ({"rope_base": 10_000.0}, 3e-3),
    "unit keys": ({"write_key_norm": "on"}, 3e-3),
    "heads of width 16": ({"head_dim": 16}, 3e-3),
    "1e-3": ({}, 1e-3),
}
TRANSFORMER_VARIANTS = {"RoPE": ({"rope_base": 10_000.0}, 3e-3)}


@dataclasses.dataclass(frozen=True)
class GraphTokens:
    """`Reachability` as token ids: node t with parent p is token t n + p (for a root p = t). length: n, the nodes."""

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
    """The rows of `Reachability` for `GraphTokens` [B,T] -> [B,T,d_model], not trained; and a trained kernel for two
    logits."""

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
        mark = jnp.where(node == 0, self.nodes, -1)  # one_hot(-1) is all zeros
        return jnp.maximum(jnp.maximum(one(node), one(parent)), one(mark))


def cells(quick: bool, sizes: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    sizes = sizes or (QUICK if quick else FULL)
    found = []
    for similarity in sizes["similarities"]:
        model = {"write_similarity": similarity, "write_key_norm": "off", "beta": "raw"}
        variants = DELTA_VARIANTS if similarity in sizes["search"] else {}
        found += _family(sizes, f"DeltaFormer, {similarity}", 1, "delta_former", model, variants)
    for layers, seeds in sizes["layers"].items():
        name, variants = f"Transformer, {layers} layer{'s' if layers > 1 else ''}", TRANSFORMER_VARIANTS
        found += _family(
            {**sizes, "seeds": seeds}, name, layers, "softmax_attention", {}, variants if sizes["search"] else {}
        )
    return found


def _family(sizes, family, layers, mixer, model, variants) -> list[dict[str, Any]]:
    width, heads = sizes["width"], sizes["heads"]
    model = {
        "mixers": [mixer],
        "d_model": width,
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": heads,
        "head_dim": sizes["head_dim"],
        "tie_embeddings": False,
        "rope_base": 0.0,
        "chunk_size": sizes["nodes"],
        **model,
    }

    def cell(variant, changes, learning_rate, seed):
        settings = train_task.settings_of(
            f"{family}, {variant}, seed {seed}",
            "reachability",
            [sizes["nodes"]],
            model={**model, **changes},
            learning_rate=learning_rate,
            steps=sizes["steps"],
            seed=seed,
            batch_size=sizes["batch_size"],
        )
        return {**settings, "family": family, "variant": variant}

    base = BASE if mixer == "delta_former" else TRANSFORMER_BASE
    found = [cell(base, {}, 3e-3, seed) for seed in range(sizes["seeds"])]
    return found + [cell(name, changes, rate, 0) for name, (changes, rate) in variants.items()]


def make_model(config: ModelConfig, *, rngs: nnx.Rngs) -> LanguageModel:
    model = LanguageModel(config, rngs=rngs)
    model.embedding = AdjacencyRows(config, rngs=rngs)
    return model


def run(settings: dict[str, Any], folder, note, stop) -> dict[str, Any] | None:
    make = lambda name, length: GraphTokens(length)
    return train_task.run(settings, folder, note, stop, make_task=make, make_model=make_model)


def figure(done: list[dict[str, Any]]):
    settings = done[0]["settings"]
    nodes = settings["lengths"][0]
    picture = accuracy_figure(
        done,
        [record for record in done if record["settings"]["variant"] in (BASE, TRANSFORMER_BASE)],
        {"guessing: 0.5": 0.5},
        settings["target"],
        ("All settings tried", f"Base setting: {BASE.replace('3e-3', 'rate 3e-3')}"),
    )
    explain(
        picture,
        who_solves(done, f"solves reachability in a graph of {nodes} nodes"),
        "The paper's claim (Figure 5): one layer of DeltaFormer is highly accurate, Transformers of several layers "
        "struggle to reach 100 %.\n"
        f"{nodes} nodes in two random trees, one token a node: is it in the first node's tree? A DeltaFormer has one "
        f"layer and is named after its κ₁. Width {settings['model']['d_model']}, at most {settings['steps']:,} steps. "
        f"Solved: {settings['patience']} evaluations in a row reach {settings['target']:g}.",
    )
    return picture


EXPERIMENT = Experiment(
    cells=cells,
    run=run,
    rows=rows,
    figure=figure,
    cost=f"half a minute to two minutes a run on one core, {len(cells(False))} runs; "
    "--quick: a minute and a half in all",
)
