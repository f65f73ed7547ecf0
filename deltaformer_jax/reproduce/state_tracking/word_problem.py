"""The word problem of S5 and A5: the product of permutations so far, which is complete for NC¹.

Training is a curriculum from short words to long ones. The words consist of all elements, or only of those that move
few points, which generate the same group: the swaps of S5, the 3-cycles of A5. This table is not in the DeltaFormer
papers. The theory is from Merrill et al., "The illusion of state in state-space models", 2024; the restricted words are
as in Grazzi et al., "Unlocking state-tracking in linear RNNs through negative eigenvalues", 2024.

Every row begins with a start token. Without it a Transformer would read the same from x x as from x.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from deltaformer_jax.plot.style import COLOURS, explain, plain
from deltaformer_jax.reproduce import train_task
from deltaformer_jax.reproduce.experiment import Experiment
from deltaformer_jax.reproduce.pictures import figure_legend, listed, name_rows, new_figure, values_of

PROBLEMS = {
    "S5, swaps": "group=S5,moves=2",
    "S5": "group=S5",
    "A5, 3-cycles": "group=A5,moves=3",
    "A5": "group=A5",
}
# What a problem's words are made of.
SAID = {
    "S5, swaps": "swaps of S5",
    "S5": "elements of S5",
    "A5, 3-cycles": "3-cycles of A5",
    "A5": "elements of A5",
}
MODELS = {
    "DeltaFormer": {
        "mixers": ["delta_former"],
        "rope_base": 0.0,
        "write_similarity": "round",
        "write_key_norm": "off",
    },
    "Transformer": {"mixers": ["softmax_attention"]},
    "DeltaNet": {"mixers": ["delta_net"], "negative_eigenvalues": True},
    "DeltaProduct": {"mixers": ["delta_product"], "householder_steps": 2, "negative_eigenvalues": True},
    "Gated DeltaNet-2": {"mixers": ["gated_delta_net_2"], "negative_eigenvalues": True},
    "RWKV-7": {"mixers": ["rwkv7"]},
}
FULL = dict(
    problems=tuple(PROBLEMS),
    models=tuple(MODELS),
    layers=(1, 3),
    lengths=(2, 4, 8, 16),
    longer=32,
    width=128,
    heads=4,
    steps=1500,
    batch_size=64,
    rate=1e-3,
    target=0.99,
    plateau=(10, 0.01),
)
QUICK = dict(
    problems=("S5, swaps",),
    models=("DeltaFormer", "Transformer", "DeltaNet"),
    layers=(1,),
    lengths=(4, 8),
    longer=16,
    width=128,
    heads=4,
    steps=500,
    batch_size=64,
    rate=1e-3,
    target=0.99,
    plateau=None,
)


def cells(quick: bool, sizes: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    sizes = sizes or (QUICK if quick else FULL)
    width, heads, found = sizes["width"], sizes["heads"], []
    for problem in sizes["problems"]:
        task = f"task:word_problem,{PROBLEMS[problem]},start=true"
        for name in sizes["models"]:
            for layers in sizes["layers"]:
                family = f"{problem}, {name}, {layers} layer{'s' if layers > 1 else ''}"
                settings = train_task.settings_of(
                    family,
                    task,
                    [length + 1 for length in sizes["lengths"]],
                    model={
                        "d_model": width,
                        "num_layers": layers,
                        "num_heads": heads,
                        "num_kv_heads": heads,
                        "head_dim": width // heads,
                        "tie_embeddings": False,
                        "chunk_size": max(sizes["lengths"]) + 1,
                        **MODELS[name],
                    },
                    learning_rate=sizes["rate"],
                    schedule="constant",
                    steps=sizes["steps"],
                    batch_size=sizes["batch_size"],
                    target=sizes["target"],
                    plateau=sizes["plateau"],
                    tests={str(length): [task, length + 1, 256] for length in (sizes["lengths"][-1], sizes["longer"])},
                )
                found.append({**settings, "family": family, "problem": problem})
    return found


def rows(done: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "model": record["settings"]["family"],
            "0.99 at step": ", ".join(
                f"{length - 1}: {step or '–'}"
                for length, step in zip(record["settings"]["lengths"], record["result"]["solved_at"])
            ),
            **{f"at {length}": f"{score:.4f}" for length, score in record["result"]["tests"].items()},
            "steps": record["result"]["steps"],
            "seconds": f"{record['seconds']:.0f}",
        }
        for record in done
    ]


def figure(done: list[dict[str, Any]]):
    problems, tests = values_of(done, "problem"), list(done[0]["settings"]["tests"])
    models = {problem: [r for r in done if r["settings"]["problem"] == problem] for problem in problems}
    counts = [max(4, len(here)) for here in models.values()]
    picture = new_figure(14, 2.2 + 0.7 * len(problems) + 0.29 * sum(counts))
    panels = picture.subplots(len(problems), 2, squeeze=False, height_ratios=counts, width_ratios=(3, 2), sharex="col")
    for (stages, bars), (problem, here) in zip(panels, models.items()):
        names = [record["settings"]["family"].removeprefix(f"{problem}, ") for record in here]
        for place, record in enumerate(here):
            _draw_stages(stages, place, record)
        for number, (test, colour) in enumerate(zip(tests, COLOURS)):
            scores = [record["result"]["tests"][test] for record in here]
            places = np.arange(len(here)) + 0.38 * (number - (len(tests) - 1) / 2)
            bars.barh(places, scores, 0.36, color=colour, alpha=0.6, label=f"words of {test}")
            for at, score in zip(places, scores):
                bars.text(score + 0.01, at, f"{score:.3f}", va="center", fontsize=7.5)
        for panel in (stages, bars):
            name_rows(panel, names)
        bars.set_xlim(0, 1.08)
        plain(stages, f"Words of {SAID[problem]}: the length trained on, step by step", "x")
        plain(bars, f"Words of {SAID[problem]}: accuracy after training", "x")
    panels[-1, 0].set(xlabel="training step", xlim=(0, 1.25 * max(r["settings"]["steps"] for r in done)))
    panels[-1, 1].set_xlabel("accuracy")
    figure_legend(picture, panels[0, 1])
    settings = done[0]["settings"]
    lengths = [length - 1 for length in settings["lengths"]]  # without the start
    explain(
        picture,
        _finding(done),
        "The word problem: after each element of a word, what is the product so far? Words of "
        f"{listed(lengths)} elements are trained on in turn, the next once the one before is solved "
        f"({settings['patience']} evaluations in a row reach {settings['target']:g}).\n"
        f"Width {settings['model']['d_model']}, at most {settings['steps']:,} steps, fewer where nothing more is "
        f"learnt. Words of {tests[-1]} are longer than any trained on. No paper of DeltaFormer has this table.",
    )
    return picture


def _draw_stages(axes, place: int, record: dict[str, Any]) -> None:
    """The steps spent on each length, one after the other, and what came of the last one."""
    from matplotlib import colormaps

    settings, result = record["settings"], record["result"]
    start, lengths = 0, [length - 1 for length in settings["lengths"]]
    for number, (length, solved) in enumerate(zip(lengths, result["solved_at"])):
        end = solved or result["steps"]
        shade = 0.15 + 0.5 * number / max(1, len(lengths) - 1)
        axes.barh(place, end - start, 0.7, start, color=colormaps["Blues"](shade), edgecolor="white")
        axes.text((start + end) / 2, place, str(length), ha="center", va="center", fontsize=8)
        start = end
        if not solved:
            break
    said = "all solved" if solved else f"{result['accuracy']:.3f} in words of {length}"
    axes.text(end, place, f" {said}", va="center", fontsize=8)


def _finding(done: list[dict[str, Any]]) -> str:
    """Which models solve the longest words, for each problem."""
    longest, parts, unsolved = done[0]["settings"]["lengths"][-1] - 1, [], []
    for problem in values_of(done, "problem"):
        here = [r for r in done if r["settings"]["problem"] == problem and r["result"]["solved_at"][-1] is not None]
        names = [record["settings"]["family"].removeprefix(f"{problem}, ").replace(",", " of") for record in here]
        if names:
            parts.append(f"words of {longest} {SAID[problem]} are solved by {listed(names)}")
        else:
            unsolved.append(SAID[problem])
    if not parts:
        return f"No model here solves words of {longest} {listed(unsolved, 'or')}"
    if unsolved:
        parts.append(f"words of {longest} {listed(unsolved, 'or')} by no model here")
    found = "; ".join(parts)
    return found[0].upper() + found[1:]


EXPERIMENT = Experiment(
    cells=cells,
    run=train_task.run,
    rows=rows,
    figure=figure,
    cost=f"ten seconds to six minutes a run on one core, {len(cells(False))} runs; "
    "--quick: a minute, swaps of S5 alone",
)
