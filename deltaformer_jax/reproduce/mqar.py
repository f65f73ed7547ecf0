"""Multi-query associative recall at the four usual sizes, of fewer words than usual, every mixer in two layers.

Each mixer has one run: rows of 16 first, and a longer size once the one before it is learnt; at the end all four are
asked for. The usual sizes have 8,192 words, and a run each: see FULL.

Source: Arora et al., "Zoology: measuring and improving recall in efficient language models", 2023.
"""

from __future__ import annotations

from typing import Any

from deltaformer_jax.reproduce import train_task
from deltaformer_jax.reproduce.experiment import Experiment
from deltaformer_jax.reproduce.pictures import new_figure
from deltaformer_jax.tasks import read_spec

# Mixer -> what it is besides its own defaults. Attention without convolutions or KV shifting needs two layers to see
# which value follows a key; the delta rules bring short convolutions of their own, and gated linear attention is given
# them, as the source gives them to every mixer.
MIXERS = {
    "DeltaFormer": {"mixers": ["delta_former"]},
    "DeltaFormer, KV shifting": {"mixers": ["delta_former"], "kv_shift": True},
    "softmax attention": {"mixers": ["softmax_attention"]},
    "linear attention": {"mixers": ["linear_attention"]},
    "retention": {"mixers": ["retention"]},
    "gated linear attention": {"mixers": ["gated_linear_attention"], "conv_size": 4},
    "DeltaNet": {"mixers": ["delta_net"]},
    "Gated DeltaNet": {"mixers": ["gated_delta_net"]},
    "Kimi Delta Attention": {"mixers": ["kimi_delta_attention"]},
}
# The better of 3e-3 and 1e-2 in 240 steps of the first rows, 16 long; for Gated DeltaNet 5e-3, which was better than
# both. docs/results.md has the accuracies.
RATES = {
    "DeltaFormer": 3e-3, "DeltaFormer, KV shifting": 1e-2, "softmax attention": 3e-3, "linear attention": 3e-3,
    "retention": 3e-3, "gated linear attention": 1e-2, "DeltaNet": 1e-2, "Gated DeltaNet": 5e-3,
    "Kimi Delta Attention": 3e-3,
}  # fmt: skip
# Each (T, pairs, rows a step, rows of an evaluation). Rows of 64 alone teach little: of their 64 tokens 4 are asked
# for, and where the memory's output has a gate nothing was learnt from them in 800 steps. The usual sizes have 8,192
# words and 64 epochs of 100,000 rows, hours a run on a CPU: here 256 words, and as few rows as it takes.
FULL = dict(
    stages=((16, 4, 128, 256), (64, 4, 64, 128), (128, 8, 32, 64), (256, 16, 16, 32), (512, 64, 8, 16)),
    sizes=((64, 4), (128, 8), (256, 16), (512, 64)), test_rows=256, vocabulary=256, width=64, heads=1, steps=1000,
    targets=(0.9, 0.95, 0.95, 0.95, 0.99), patience=1, plateau=(12, 0.01), mixers=tuple(MIXERS),
)  # fmt: skip
QUICK = dict(
    stages=((16, 4, 128, 128),), sizes=((16, 4),), test_rows=128, vocabulary=32, width=32, heads=1,
    steps=300, targets=(0.99,), patience=1, plateau=None,
    mixers=("DeltaFormer, KV shifting", "softmax attention", "linear attention", "DeltaNet"),
)  # fmt: skip


def cells(quick: bool, sizes: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    sizes = sizes or (QUICK if quick else FULL)
    width, heads, found = sizes["width"], sizes["heads"], []
    task = lambda pairs: f"task:mqar,vocabulary={sizes['vocabulary']},pairs={pairs}"
    lengths, pairs, rows_a_step, rows_asked = (list(column) for column in zip(*sizes["stages"]))
    for name in sizes["mixers"]:
        settings = train_task.settings_of(
            name, [task(number) for number in pairs], lengths,
            model={
                "d_model": width, "num_layers": 2, "num_heads": heads, "num_kv_heads": heads,
                "head_dim": width // heads, "tie_embeddings": False, "chunk_size": min(64, max(lengths)),
                **MIXERS[name],
            },
            learning_rate=RATES[name], steps=sizes["steps"], batch_size=rows_a_step, eval_rows=rows_asked,
            eval_every=25, target=list(sizes["targets"]), patience=sizes["patience"], plateau=sizes["plateau"],
            tests={
                f"T = {length}, {number} pairs": [task(number), length, sizes["test_rows"]]
                for length, number in sizes["sizes"]
            },
        )  # fmt: skip
        found.append({**settings, "family": name})
    return found


def rows(done: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "mixer": record["settings"]["family"],
            **{size: f"{accuracy:.4f}" for size, accuracy in record["result"]["tests"].items()},
            "rate": f"{record['settings']['optimizer']['learning_rate']:g}",
            "left at step": ", ".join(
                f"{length}: {step or '–'}"
                for length, step in zip(record["settings"]["lengths"], record["result"]["solved_at"])
            ),
            "steps": record["result"]["steps"],
            "parameters": f"{record['result']['parameters']:,}",
            "seconds": f"{record['seconds']:.0f}",
        }
        for record in done
    ]


def figure(done: list[dict[str, Any]]):
    picture = new_figure(10, 4.6)
    panel = picture.subplots()
    sizes = list(done[0]["settings"]["tests"])
    for place, record in enumerate(done):
        scores = [record["result"]["tests"][size] for size in sizes]
        x = [i + 0.85 * place / len(done) for i in range(len(sizes))]
        panel.bar(x, scores, 0.85 / len(done), label=record["settings"]["family"], align="edge")
    panel.set_xticks([i + 0.425 for i in range(len(sizes))], sizes)
    panel.set(ylabel="accuracy after the curriculum", ylim=(0, 1.03))
    panel.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    settings = done[0]["settings"]
    words, width = read_spec(settings["task"][0])[1]["vocabulary"], settings["model"]["d_model"]
    picture.suptitle(f"recall of pairs of {words} words, two layers of width {width}")
    return picture


EXPERIMENT = Experiment(
    cells=cells, run=train_task.run, rows=rows, figure=figure,
    cost=f"one to eleven minutes a run on one core, {len(cells(False))} runs; --quick: a minute and a half in all",
)  # fmt: skip
