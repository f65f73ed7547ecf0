"""The mixers as language models of the standard library's text: as many parameters and tokens, one seed and schedule.

Each model's feed-forward width is chosen, to within 2 features, so that it has as many parameters as DeltaFormer's
model. The score is bits per byte on the evaluation split. This table is not from a paper. It shows that each
trains, and compares small models of Python code.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from etils import epath

from deltaformer_jax.config import Mixer
from deltaformer_jax.config.lines import lines
from deltaformer_jax.plot.style import explain, line_styles, plain
from deltaformer_jax.reproduce.experiment import Experiment
from deltaformer_jax.reproduce.language.byte_models import byte_model, matched, parameters, prepared
from deltaformer_jax.reproduce.pictures import figure_legend, listed, name_rows, new_figure

# Label -> the repeating pattern of mixers.
PATTERNS: dict[str, tuple[str | Mixer, ...]] = {
    "DeltaFormer": ("delta_former",),
    "DeltaFormer, gated": (Mixer("delta_former", output_gate="on", conv_size=4),),
    "softmax attention": ("softmax_attention",),
    "forgetting attention": (Mixer("softmax_attention", forget_gate=True),),
    "self-adjusted softmax": (Mixer("softmax_attention", read_similarity="self_adjust"),),
    "DeltaFormer, self-adjusted read": (Mixer("delta_former", read_similarity="self_adjust"),),
    "linear attention": ("linear_attention",),
    "retention": ("retention",),
    "gated linear attention": ("gated_linear_attention",),
    "DeltaNet": ("delta_net",),
    "Gated DeltaNet": ("gated_delta_net",),
    "Kimi Delta Attention": ("kimi_delta_attention",),
    "Gated DeltaNet-2": ("gated_delta_net_2",),
    "Gated DeltaProduct, two steps": ("gated_delta_product",),
    "RWKV-7": ("rwkv7",),
    "3 Gated DeltaNet + 1 softmax": ("gated_delta_net",) * 3 + ("softmax_attention",),
}

FULL = dict(d_model=128, num_layers=4, num_heads=4, head_dim=32, sequence_length=256, batch_size=8, steps=500)
QUICK = dict(d_model=64, num_layers=4, num_heads=2, head_dim=32, sequence_length=128, batch_size=8, steps=40)
# Left out of the quick form, most of whose time is compilation.
NOT_QUICK = (
    "DeltaFormer, gated",
    "forgetting attention",
    "self-adjusted softmax",
    "DeltaFormer, self-adjusted read",
    "retention",
    "gated linear attention",
    "Kimi Delta Attention",
    "Gated DeltaNet-2",
    "Gated DeltaProduct, two steps",
    "RWKV-7",
)


def cells(quick: bool) -> list[dict[str, Any]]:
    sizes = QUICK if quick else FULL
    target = parameters(byte_model(sizes, PATTERNS["DeltaFormer"], mlp_dim=0))
    found = []
    for label, pattern in PATTERNS.items():
        if quick and label in NOT_QUICK:
            continue
        found.append({"label": label, **matched(sizes, pattern, target), "eval_batches": 4 if quick else 40})
    return found


def run(settings: dict[str, Any], folder: epath.Path, note, stop) -> dict[str, Any] | None:
    from deltaformer_jax.training.loop import train

    if not train(*prepared(settings, folder, note), stop, quiet=True).finished:
        return None
    records = [json.loads(line) for line in lines((folder / "run" / "metrics.jsonl").read_text())]
    losses = [(record["step"], record["loss"]) for record in records if "loss" in record]
    scores = [(record["step"], record["eval_bits_per_byte"]) for record in records if "eval_bits_per_byte" in record]
    speeds = [record["tokens_per_second"] for record in records if "tokens_per_second" in record]
    return {
        "eval_bits_per_byte": scores[-1][1],
        "tokens": settings["steps"] * settings["sequence_length"] * settings["batch_size"],
        "tokens_per_second": float(np.median(speeds)),
        "losses": losses,
        "evaluations": scores,
    }


def rows(done: list[dict[str, Any]]) -> list[dict[str, Any]]:
    best_first = sorted(done, key=lambda record: record["result"]["eval_bits_per_byte"])
    return [
        {
            "mixer": record["settings"]["label"],
            "bits per byte": f"{record['result']['eval_bits_per_byte']:.3f}",
            "parameters": f"{record['settings']['parameters']:,}",
            "feed-forward width": record["settings"]["mlp_dim"],
            "tokens": f"{record['result']['tokens']:,}",
            "tokens a second": f"{record['result']['tokens_per_second']:,.0f}",
        }
        for record in best_first
    ]


def figure(done: list[dict[str, Any]]):
    picture = new_figure(14, 5)
    curves, points = picture.subplots(1, 2, width_ratios=(3, 2))
    scores = {record["settings"]["label"]: record["result"]["eval_bits_per_byte"] for record in done}
    best = sorted(done, key=lambda record: record["result"]["eval_bits_per_byte"])
    styles = line_styles([record["settings"]["label"] for record in done])
    for place, record in enumerate(best):
        label, (steps, losses) = record["settings"]["label"], np.array(record["result"]["losses"]).T
        curves.plot(steps, losses / np.log(2), label=label, **styles[label])
        points.plot(scores[label], place, "o", color=styles[label]["color"], markersize=8)
        points.text(
            1.02, place, f"{scores[label]:.3f}", transform=points.get_yaxis_transform(), va="center", fontsize=9
        )
    curves.set(xlabel="training step", ylabel="training loss (bits per byte)")
    curves.set_ylim(top=min(curves.get_ylim()[1], 5.5))
    plain(curves, "In training")
    name_rows(points, [record["settings"]["label"] for record in best])
    points.set_xlabel("evaluation (bits per byte), lower is better")
    plain(points, "After the last step")
    figure_legend(picture, curves)
    settings, tokens = done[0]["settings"], done[0]["result"]["tokens"]
    first, last = best[0]["settings"]["label"], best[-1]["settings"]["label"]
    between = [
        f"{name} {scores[name]:.3f}"
        for name in ("DeltaFormer", "softmax attention")
        if name in scores.keys() - {first, last}
    ]
    explain(
        picture,
        f"With equal parameters, mixers reach {scores[first]:.3f} ({first}) to {scores[last]:.3f} ({last}) bits per "
        "byte" + (f"; {listed(between)}" if between else ""),
        f"{settings['num_layers']} layers of width {settings['d_model']}, about {settings['parameters']:,} parameters, "
        f"{tokens:,} tokens of the Python standard library. No paper has this table.\n"
        "One learning rate for all and one seed: the order of mixers that are close is not settled by it.",
    )
    return picture


EXPERIMENT = Experiment(
    cells=cells,
    run=run,
    rows=rows,
    figure=figure,
    cost="about two and a half minutes a mixer on two cores; --quick: a minute and a half, six of them",
)
