"""Multi-query associative recall: 4 pairs in rows of 64 and 8 in rows of 128, of 256 words, every mixer in two layers.

These are the shorter two of the usual four sizes, which have 8,192 words: see FULL.

Source: Arora et al., "Zoology: measuring and improving recall in efficient language models", 2023.
"""

from __future__ import annotations

from typing import Any

from deltaformer_jax.reproduce import train_task
from deltaformer_jax.reproduce.experiment import Experiment
from deltaformer_jax.reproduce.pictures import new_figure
from deltaformer_jax.tasks import read_spec

# Mixer -> what it is besides its own defaults. Attention without convolutions or KV shifting needs two layers to see
# which value follows a key; the recurrent mixers bring short convolutions of their own.
MIXERS = {
    "DeltaFormer": {"mixers": ["delta_former"]},
    "DeltaFormer, KV shifting": {"mixers": ["delta_former"], "kv_shift": True},
    "softmax attention": {"mixers": ["softmax_attention"]},
    "linear attention": {"mixers": ["linear_attention"]},
    "retention": {"mixers": ["retention"]},
    "gated linear attention": {"mixers": ["gated_linear_attention"]},
    "DeltaNet": {"mixers": ["delta_net"]},
    "Gated DeltaNet": {"mixers": ["gated_delta_net"]},
    "Kimi Delta Attention": {"mixers": ["kimi_delta_attention"]},
}
# The usual sizes go on to (256, 16) and (512, 64), of 8192 words: hours a run on a CPU. These are the shorter two, of
# 256 words.
FULL = dict(
    sizes=((64, 4), (128, 8)), vocabulary=256, width=64, heads=2, steps=800, batch_size=32, rates=(5e-3,),
    mixers=tuple(MIXERS),
)  # fmt: skip
QUICK = dict(
    sizes=((32, 4),), vocabulary=64, width=32, heads=1, steps=250, batch_size=64, rates=(5e-3,),
    mixers=("DeltaFormer, KV shifting", "softmax attention", "linear attention", "DeltaNet"),
)  # fmt: skip


def cells(quick: bool, sizes: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    sizes = sizes or (QUICK if quick else FULL)
    width, heads, found = sizes["width"], sizes["heads"], []
    for name in sizes["mixers"]:
        for length, pairs in sizes["sizes"]:
            for rate in sizes["rates"]:
                settings = train_task.settings_of(
                    f"{name}, T = {length}, {pairs} pairs, {rate:g}",
                    f"task:mqar,vocabulary={sizes['vocabulary']},pairs={pairs}", [length],
                    model={
                        "d_model": width, "num_layers": 2, "num_heads": heads, "num_kv_heads": heads,
                        "head_dim": width // heads, "tie_embeddings": False, "chunk_size": min(64, length),
                        **MIXERS[name],
                    },
                    learning_rate=rate, steps=sizes["steps"], batch_size=sizes["batch_size"],
                )  # fmt: skip
                found.append({**settings, "family": name, "size": f"{length}, {pairs} pairs", "rate": rate})
    return found


def _best(done: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """family -> size -> the record with the best accuracy over the learning rates."""
    best: dict[str, dict[str, dict[str, Any]]] = {}
    for record in done:
        row = best.setdefault(record["settings"]["family"], {})
        size = record["settings"]["size"]
        if size not in row or record["result"]["accuracy"] > row[size]["result"]["accuracy"]:
            row[size] = record
    return best


def rows(done: list[dict[str, Any]]) -> list[dict[str, Any]]:
    sizes = list(dict.fromkeys(record["settings"]["size"] for record in done))
    return [
        {
            "mixer": family,
            **{f"T = {size}": f"{row[size]['result']['accuracy']:.4f}" if size in row else "" for size in sizes},
            "parameters": f"{next(iter(row.values()))['result']['parameters']:,}",
            "steps": ", ".join(str(row[size]["result"]["steps"]) for size in sizes if size in row),
        }
        for family, row in _best(done).items()
    ]


def figure(done: list[dict[str, Any]]):
    picture = new_figure(10, 4.6)
    panel = picture.subplots()
    best = _best(done)
    sizes = list(dict.fromkeys(record["settings"]["size"] for record in done))
    for place, (family, row) in enumerate(best.items()):
        scores = [row[size]["result"]["accuracy"] if size in row else 0 for size in sizes]
        panel.bar([i + 0.85 * place / len(best) for i in range(len(sizes))], scores, 0.85 / len(best), label=family)
    panel.set_xticks([i + 0.4 for i in range(len(sizes))], [f"T = {size}" for size in sizes])
    rates = sorted({record["settings"]["rate"] for record in done})
    panel.set(ylabel="accuracy" + (", the best over learning rates" if len(rates) > 1 else ""), ylim=(0, 1.03))
    panel.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    settings = done[0]["settings"]
    words, width = read_spec(settings["task"])[1]["vocabulary"], settings["model"]["d_model"]
    rates = ", ".join(f"{rate:g}" for rate in rates)
    picture.suptitle(f"recall of pairs of {words} words, two layers of width {width}, learning rate {rates}")
    return picture


EXPERIMENT = Experiment(
    cells=cells, run=train_task.run, rows=rows, figure=figure,
    cost=f"one to three minutes a run on two cores, {len(cells(False))} runs; --quick: a minute and a half in all",
)  # fmt: skip
