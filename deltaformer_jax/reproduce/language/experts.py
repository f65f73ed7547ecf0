"""DeltaFormer against a Transformer, dense and with experts, as language models of code and of prose.

The paper (DeltaFormer, NeurIPS 2025, Tables 3 and 4) has two models of 14 billion parameters with experts, trained on
500 billion tokens: DeltaFormer's loss is lower on code (1.283 for 1.312) and hardly lower on text (1.810 for 1.815). It
gives no deviations. Here the models are small, and each is trained with several seeds: the difference of two models is
the mean over seeds of d_s = bits(DeltaFormer, s) − bits(Transformer, s), with the standard error std(d)/√n. Both models
of a seed see the same rows in the same order.

All models have the same widths. DeltaFormer has its gates besides. Models with experts have E experts of which a token
uses k, as wide together as the dense layer, so that a token costs as much and the model has more parameters.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from etils import epath

from deltaformer_jax.plot.style import explain, line_styles, plain
from deltaformer_jax.reproduce.experiment import Experiment
from deltaformer_jax.reproduce.language.byte_models import byte_model, mean_and_error, parameters, prepared, trained
from deltaformer_jax.reproduce.language.prose import prose_corpus
from deltaformer_jax.reproduce.pictures import figure_legend, new_figure

MIXERS = {"DeltaFormer": "delta_former", "Transformer": "softmax_attention"}
FEED_FORWARDS = {"dense": {}, "experts": {"feed_forward": "moe", "num_experts": 8, "experts_per_token": 2}}
CORPORA = ("code", "prose")
PAPER = {"code": 1.28326 - 1.31231, "prose": 1.81032 - 1.81472}  # nats
FULL = dict(
    d_model=128,
    num_layers=4,
    num_heads=4,
    head_dim=32,
    mlp_dim=344,
    sequence_length=256,
    batch_size=8,
    steps=300,
    eval_batches=40,
    seeds=(0, 1, 2),
)
QUICK = FULL | dict(d_model=64, num_layers=2, num_heads=2, mlp_dim=176, steps=30, eval_batches=4, seeds=(0,))


def cells(quick: bool, sizes: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    sizes = dict(sizes or (QUICK if quick else FULL))
    seeds = sizes.pop("seeds")
    return [
        {
            "label": f"{name}, {layer}, {corpus}, seed {seed}",
            "model": name,
            "layer": layer,
            "corpus": corpus,
            "mixers": [MIXERS[name]],
            "fields": FEED_FORWARDS[layer],
            **sizes,
            "learning_rate": 4e-3,
            # With the guard one of the 24 runs ends: its gradient jumps in the warm-up. Gradients are clipped anyway.
            "skip_deviations": 0.0,
            "seed": seed,
            "parameters": parameters(byte_model(sizes, (MIXERS[name],), sizes["mlp_dim"], **FEED_FORWARDS[layer])),
        }
        for seed in seeds
        for corpus in CORPORA
        for layer in FEED_FORWARDS
        for name in MIXERS
        if not quick or corpus == "prose"
    ]


def run(settings: dict[str, Any], folder: epath.Path, note, stop) -> dict[str, Any] | None:
    path = prose_corpus() if settings["corpus"] == "prose" else ""
    return trained(prepared(settings, folder, note, path=path), folder, stop)


def _bits(done: list[dict[str, Any]]) -> dict[tuple[str, str, str, int], float]:
    names = ("model", "layer", "corpus", "seed")
    return {tuple(r["settings"][name] for name in names): r["result"]["bits"] for r in done}


def paired(done: list[dict[str, Any]], layer: str, corpus: str) -> np.ndarray:
    """bits(DeltaFormer) − bits(Transformer) of each seed that both were trained with."""
    bits = _bits(done)
    both = [
        (bits.get(("DeltaFormer", layer, corpus, seed)), bits.get(("Transformer", layer, corpus, seed)))
        for seed in sorted({record["settings"]["seed"] for record in done})
    ]
    return np.array([one - other for one, other in both if one is not None and other is not None])


def rows(done: list[dict[str, Any]]) -> list[dict[str, Any]]:
    bits, lines = _bits(done), []
    for corpus in CORPORA:
        for layer in FEED_FORWARDS:
            of = {name: [v for k, v in bits.items() if k[:3] == (name, layer, corpus)] for name in MIXERS}
            if any(of.values()):
                lines.append(
                    {
                        "text": corpus,
                        "feed-forward layers": layer,
                        **{name: f"{np.mean(found):.4f}" if found else "-" for name, found in of.items()},
                        "difference": mean_and_error(paired(done, layer, corpus)),
                        "seeds": len(paired(done, layer, corpus)),
                    }
                )
    return lines


def figure(done: list[dict[str, Any]]):
    picture = new_figure(14, 5)
    panels = picture.subplots(1, 2)
    for corpus, axes in zip(CORPORA, panels):
        here = [record for record in done if record["settings"]["corpus"] == corpus]
        styles = line_styles([f"{name}, {layer}" for layer in FEED_FORWARDS for name in MIXERS])
        for place, layer in enumerate(FEED_FORWARDS):
            for shift, name in zip((-0.12, 0.12), MIXERS):
                found = [
                    r["result"]["bits"]
                    for r in here
                    if (r["settings"]["model"], r["settings"]["layer"]) == (name, layer)
                ]
                look = styles[f"{name}, {layer}"]["color"]
                axes.plot([place + shift] * len(found), found, "o", color=look, label=f"{name}, {layer}")
        axes.set(xticks=range(len(FEED_FORWARDS)), xticklabels=list(FEED_FORWARDS), xlim=(-0.5, 1.5))
        axes.set_ylabel("bits a byte, evaluation split")
        plain(axes, f"{corpus}: each point is a seed")
    figure_legend(picture, *panels)
    gains = [
        f"{corpus} {mean_and_error(paired(done, 'experts', corpus))}"
        for corpus in CORPORA
        if len(paired(done, "experts", corpus))
    ]
    explain(
        picture,
        "DeltaFormer − Transformer with experts, bits a byte: " + (", ".join(gains) or "no seed has both yet"),
        "The mean over seeds of the paired difference, ± its standard error. The paper (DeltaFormer, NeurIPS 2025, "
        f"Tables 3 and 4, 14 billion parameters): {PAPER['code']:+.4f} nats on code, {PAPER['prose']:+.4f} on text.",
    )
    return picture


EXPERIMENT = Experiment(
    cells=cells,
    run=run,
    rows=rows,
    figure=figure,
    cost="half an hour on two idle cores, 24 models; --quick: a minute, four models of prose",
)
