"""The word problem of S5 and A5: the product of permutations so far, which is complete for NC¹.

Training is a curriculum from short words to long ones. The words consist of all elements, or only of those that move
few points, which generate the same group: the swaps of S5, the 3-cycles of A5. This table is not in the DeltaFormer
papers. The theory is from Merrill et al., "The illusion of state in state-space models", 2024; the restricted words are
as in Grazzi et al., "Unlocking state-tracking in linear RNNs through negative eigenvalues", 2024.

Every row begins with a start token. Without it a Transformer would read the same from x x as from x.
"""

from __future__ import annotations

from typing import Any

from deltaformer_jax.reproduce import train_task
from deltaformer_jax.reproduce.experiment import Experiment
from deltaformer_jax.reproduce.pictures import accuracy_bars, accuracy_curves, new_figure

PROBLEMS = {
    "S5, swaps": "group=S5,moves=2",
    "S5": "group=S5",
    "A5, 3-cycles": "group=A5,moves=3",
    "A5": "group=A5",
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
    models=tuple(MODELS),
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
    problems = list(dict.fromkeys(record["settings"]["problem"] for record in done))
    picture = new_figure(12, 0.5 + 3.5 * len(problems))
    lengths = [length - 1 for length in done[0]["settings"]["lengths"]]  # without the start
    longest = lengths[-1]
    for (curves, bars), problem in zip(picture.subplots(len(problems), 2, squeeze=False), problems):
        here = [record for record in done if record["settings"]["problem"] == problem]
        accuracy_curves(curves, here, "family")
        curves.set_ylabel("accuracy")
        curves.set_title(f"words of {', '.join(map(str, lengths))} in turn")
        accuracy_bars(bars, here, "family", score=lambda record: record["result"]["tests"][str(longest)])
        bars.set_title(f"words of {longest} after training")
    picture.suptitle("the word problem: what is the product so far?")
    return picture


EXPERIMENT = Experiment(
    cells=cells,
    run=train_task.run,
    rows=rows,
    figure=figure,
    cost=f"ten seconds to six minutes a run on one core, {len(cells(False))} runs; "
    "--quick: a minute, swaps of S5 alone",
)
