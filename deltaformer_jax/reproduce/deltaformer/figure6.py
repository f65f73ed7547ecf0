"""Figure 6: tracking more elements than keys are wide, with fixed keys and values; only the read-out is trained.

n slots are written with nearly orthogonal keys and values of width 128. Random swaps follow, each written as a
difference of two keys. At the end every slot is read, and the target is the element that it holds. A linear read-out W,
logits = o W, is trained by Adam on the reads of some rows and tested on others. κ₁ = κ₂ = κ. Source: Xu et al.,
DeltaFormer (NeurIPS 2025), appendix B.1.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from deltaformer_jax.ops import Round, delta_attention
from deltaformer_jax.reproduce.experiment import Experiment
from deltaformer_jax.reproduce.pictures import new_figure
from deltaformer_jax.tasks import SwapConstruction, coherence, near_orthogonal_keys

FULL = dict(width=128, elements=(128, 256, 512), lengths=(256, 512, 1024), rows=16, steps=100)
QUICK = dict(width=64, elements=(64, 128), lengths=(64, 128), rows=8, steps=60)
SIMILARITIES = {"round to integers": Round(decimals=0), "round to 2 decimals": Round(decimals=2), "linear": "linear"}
ROWS_AT_ONCE = 4


def cells(quick: bool, sizes: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    sizes = sizes or (QUICK if quick else FULL)
    return [
        {
            "label": f"{name}, n = {elements}, {length} swaps",
            "similarity": name,
            "elements": elements,
            "swaps": length,
            "width": sizes["width"],
            "rows": sizes["rows"],
            "steps": sizes["steps"],
            "optimizer": "adam",
            "learning_rate": 0.1,
            "dtype": "float32",
            "seed": 0,
            "evaluation_seed": "evaluation",
        }
        for name in SIMILARITIES
        for elements in sizes["elements"]
        for length in sizes["lengths"]
    ]


def run(settings: dict[str, Any], folder, note, stop) -> dict[str, Any] | None:
    del folder, note
    elements, count = settings["elements"], settings["rows"]
    vectors = near_orthogonal_keys(elements, settings["width"])
    memory = SwapConstruction(vectors, vectors, settings["swaps"])
    similarity = SIMILARITIES[settings["similarity"]]

    @jax.jit
    def read(keys, values, gate):
        keys, values, gate = (x[:, :, None].astype(jnp.float32) for x in (keys, values, gate))
        out = delta_attention(
            keys,
            keys,
            values,
            alpha=gate,
            beta=gate,
            write_similarity=similarity,
            read_similarity=similarity,
            write_scale=1.0,
            read_scale=1.0,
        )
        return out[:, -elements:, 0]

    def examples(seed):
        reads, held = [], []
        for first in range(0, count, ROWS_AT_ONCE):
            if stop.requested:
                return None
            made = memory(seed, np.arange(first, min(first + ROWS_AT_ONCE, count)))
            reads.append(np.asarray(read(made.keys, made.values, made.gate)))
            held.append(np.argmax(made.expected @ vectors.T, axis=-1))
        return np.concatenate(reads).reshape(-1, settings["width"]), np.concatenate(held)

    training, testing = examples(settings["seed"]), examples(settings["evaluation_seed"])
    if training is None or testing is None:
        return None
    optimiser = optax.adam(settings["learning_rate"])

    @jax.jit
    def step(kernel, state, reads, held):
        def loss(kernel):
            return optax.softmax_cross_entropy_with_integer_labels(reads @ kernel, held).mean()

        value, slope = jax.value_and_grad(loss)(kernel)
        updates, state = optimiser.update(slope, state)
        return kernel + updates, state, value

    kernel = jnp.zeros((settings["width"], elements))
    state, losses = optimiser.init(kernel), []
    for _ in range(settings["steps"]):
        if stop.requested:
            return None
        kernel, state, value = step(kernel, state, training[0], training[1].reshape(-1))
        losses.append(float(value))
    right = (np.argmax(testing[0] @ np.asarray(kernel), axis=-1)).reshape(testing[1].shape) == testing[1]
    moved = testing[1] != np.arange(elements)
    return {
        "accuracy": float(right.mean()),
        "accuracy_of_moved": float(right[moved].mean()),
        "unmoved": float(1 - moved.mean()),
        "coherence": coherence(vectors),
        "loss": losses[-1],
    }


def rows(done: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "similarity": record["settings"]["similarity"],
            "elements n": record["settings"]["elements"],
            "width": record["settings"]["width"],
            "max |k·k'|": f"{record['result']['coherence']:.3f}",
            "swaps": record["settings"]["swaps"],
            "accuracy": f"{record['result']['accuracy']:.4f}",
            "of moved slots": f"{record['result']['accuracy_of_moved']:.4f}",
            "never moved": f"{record['result']['unmoved']:.3f}",
        }
        for record in done
    ]


def figure(done: list[dict[str, Any]]):
    picture = new_figure(12, 4.2)
    lengths = list(dict.fromkeys(record["settings"]["swaps"] for record in done))
    panels = picture.subplots(1, len(lengths), sharey=True, squeeze=False)[0]
    for panel, length in zip(panels, lengths):
        for place, name in enumerate(SIMILARITIES):
            points = [
                (record["settings"]["elements"], record["result"]["accuracy_of_moved"])
                for record in done
                if (record["settings"]["similarity"], record["settings"]["swaps"]) == (name, length)
            ]
            style = "os^"[place] + ("-", "--", ":")[place]  # two of the curves coincide
            panel.plot(*zip(*points), style, color=f"C{place}", fillstyle="none", markersize=6 + 2 * place, label=name)
        panel.axvline(done[0]["settings"]["width"], color="grey", linewidth=0.8, linestyle=":", label="n = width")
        panel.set(title=f"{length} swaps", xlabel="elements n", ylim=(0, 1.03), xscale="log")
        sizes = sorted({record["settings"]["elements"] for record in done})
        panel.set_xticks(sizes, [str(size) for size in sizes])
        panel.minorticks_off()
    panels[0].set_ylabel("accuracy on slots that were swapped")
    panels[-1].legend(fontsize=8, loc="lower left")
    picture.suptitle(f"fixed nearly orthogonal keys of width {done[0]['settings']['width']}, learnt read-out")
    return picture


EXPERIMENT = Experiment(
    cells=cells,
    run=run,
    rows=rows,
    figure=figure,
    cost="two minutes on one core; --quick: half a minute",
)
