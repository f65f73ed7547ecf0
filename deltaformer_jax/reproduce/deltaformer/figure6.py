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
from deltaformer_jax.plot.style import GREY, MARKERS, explain, line_styles, plain, reference
from deltaformer_jax.reproduce.experiment import Experiment
from deltaformer_jax.reproduce.pictures import figure_legend, listed, new_figure, spread, values_of
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
    picture = new_figure(13, 4.8)
    lengths, sizes = values_of(done, "swaps"), sorted(values_of(done, "elements"))
    names, width = values_of(done, "similarity"), done[0]["settings"]["width"]
    styles = line_styles(list(SIMILARITIES))
    panels = picture.subplots(1, len(lengths), sharey=True, squeeze=False)[0]
    for panel, length in zip(panels, lengths):
        for place, (name, shift) in enumerate(zip(names, spread(len(names), 0.06))):
            here = [r for r in done if (r["settings"]["similarity"], r["settings"]["swaps"]) == (name, length)]
            points = [(r["settings"]["elements"] * (1 + shift), r["result"]["accuracy_of_moved"]) for r in here]
            if points:
                mark = dict(marker=MARKERS[place], markersize=7, fillstyle="none")
                panel.plot(*zip(*points), label=name, **mark, **styles[name])
        panel.plot(sizes, [1 / size for size in sizes], color=GREY, linestyle=(0, (1, 2)), label="guessing: 1/n")
        reference(panel, width, f"n = width = {width}", upright=True)
        panel.set(
            xlabel="elements n", xscale="log", ylim=(-0.03, 1.04), xlim=(0.8 * min(width, sizes[0]), 1.25 * sizes[-1])
        )
        panel.set_xticks(sizes, [str(size) for size in sizes])
        panel.minorticks_off()
        plain(panel, f"{length:,} swaps", room=18)
    panels[0].set_ylabel("accuracy on slots that were swapped")
    figure_legend(picture)
    explain(
        picture,
        _finding(done),
        "The paper's claim (Figure 6): with as many elements as the keys are wide or more, the linear similarity "
        "degrades severely; round does not.\n"
        f"n slots are written with fixed, nearly orthogonal keys of width {width}, κ₁ = κ₂, then swapped at random; a "
        "learnt read-out names the element of each slot. Marks of one n stand side by side.",
    )
    return picture


def _finding(done: list[dict[str, Any]]) -> str:
    """Which similarities keep more elements than the keys are wide."""
    width, kept, lost = done[0]["settings"]["width"], [], []
    for name in values_of(done, "similarity"):
        scores = [
            r["result"]["accuracy_of_moved"]
            for r in done
            if r["settings"]["similarity"] == name and r["settings"]["elements"] > width
        ]
        if scores and min(scores) >= 0.99:
            kept.append(f"{name} ({min(scores):.3f} at worst)")
        elif scores:
            lost.append(f"{name} ({min(scores):.3f} at worst)")
    whole = f"more elements than the keys' width {width}"
    if not kept:
        return f"No similarity here keeps {whole}" if lost else f"Which similarities keep {whole}?"
    return f"Accuracy with {whole}: kept by {listed(kept)}" + (f"; lost by {listed(lost)}" if lost else "")


EXPERIMENT = Experiment(
    cells=cells,
    run=run,
    rows=rows,
    figure=figure,
    cost="two minutes on one core; --quick: half a minute",
)
