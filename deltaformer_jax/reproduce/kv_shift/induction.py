"""Figure 1: induction by one layer with KV shifting, by vanilla attention of several layers, and by DeltaFormer.

Three panels. The first is Figure 1a at a laptop's size with the strict generator, the second Figure 1a with the paper's
generator and its score (the first repetition of a row), the third Figure 1b: accuracy by width. In all of them copying
what followed the word before is right everywhere, so that the ceiling is 1. DeltaFormer is not in the paper.

The paper trains 20M parameters on 4,096 rows of 512 tokens a step; here it is 64 rows of 32 or 64 tokens.
Source: Xu et al., "KV Shifting Attention Enhances Language Modeling", arXiv 2411.19574, Figure 1 and appendix D.
"""

from __future__ import annotations

from typing import Any

from deltaformer_jax.plot.style import MARKERS, explain, line_styles, plain
from deltaformer_jax.reproduce import train_task
from deltaformer_jax.reproduce.experiment import Experiment
from deltaformer_jax.reproduce.pictures import accuracy_curves, figure_legend, listed, new_figure, values_of

# Family -> (number of layers, the fields that differ).
MODELS = {
    "softmax, 1 layer": (1, {}),
    "softmax, 1 layer, KV shifting": (1, {"kv_shift": True}),
    "softmax, 2 layers": (2, {}),
    "softmax, 4 layers": (4, {}),
    "DeltaFormer, 1 layer": (1, {"mixers": ["delta_former"]}),
    "DeltaFormer, 1 layer, KV shifting": (1, {"mixers": ["delta_former"], "kv_shift": True}),
}
SHIFTED, DEEPER = "softmax, 1 layer, KV shifting", "softmax, 2 layers"
# rates: width -> learning rate. by_width: widths of Figure 1b below the first panel's.
FULL = dict(
    strict=dict(vocabulary=64, words=24, length=32, steps=500, models=tuple(MODELS)),
    paper=dict(vocabulary=512, words=0, length=64, steps=400, models=tuple(MODELS)[:3]),
    width=64,
    by_width=(8, 16, 32),
    width_steps=1000,
    rates={8: 1e-2, 16: 1e-2, 32: 5e-3, 64: 5e-3},
    batch_size=64,
    eval_rows=512,
)
QUICK = dict(
    strict=dict(vocabulary=32, words=16, length=24, steps=100, models=tuple(m for m in MODELS if "4" not in m)),
    paper=None,
    width=32,
    by_width=(8,),
    width_steps=150,
    rates={8: 1e-2, 32: 1e-2},
    batch_size=64,
    eval_rows=256,
)
TITLES = {
    "strict": "Every repetition scored, strict generator",
    "paper": "The first repetition scored, the paper's generator",
}


def cells(quick: bool, sizes: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    sizes = sizes or (QUICK if quick else FULL)
    strict = sizes["strict"]
    found = [_cell(sizes, strict, "strict", name, sizes["width"], strict["steps"]) for name in strict["models"]]
    for width in sizes["by_width"]:
        found += [_cell(sizes, strict, "strict", name, width, sizes["width_steps"]) for name in (SHIFTED, DEEPER)]
    if paper := sizes["paper"]:
        found += [_cell(sizes, paper, "paper", name, sizes["width"], paper["steps"]) for name in paper["models"]]
    return found


def _cell(sizes, rows_of, generator, family, width, steps) -> dict[str, Any]:
    layers, fields = MODELS[family]
    heads = max(1, width // 32)
    score = {"strict": "all", "paper": "first"}[generator]
    settings = train_task.settings_of(
        f"{family}, width {width}, {generator}",
        f"task:induction,vocabulary={rows_of['vocabulary']},words={rows_of['words']},generator={generator},score={score}",
        [rows_of["length"]],
        model={
            "mixers": ["softmax_attention"],
            "d_model": width,
            "num_layers": layers,
            "num_heads": heads,
            "num_kv_heads": heads,
            "head_dim": width // heads,
            "tie_embeddings": False,
            "rope_base": 10_000.0,
            "chunk_size": 32,
            **fields,
        },
        learning_rate=sizes["rates"][width],
        steps=steps,
        batch_size=sizes["batch_size"],
        eval_every=25,
        eval_rows=sizes["eval_rows"],
    )
    return {**settings, "family": family, "generator": generator, "width": width, "first_panel": sizes["width"]}


def rows(done: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "model": record["settings"]["family"],
            "generator": record["settings"]["generator"],
            "width": record["settings"]["width"],
            **{f"at step {step}": _at(record, step) for step in (50, 100)},
            "last": f"{record['result']['accuracy']:.4f}",
            "of steps": record["result"]["steps"],
            "0.995 at step": record["result"]["solved_at"][-1] or "–",
            "seconds": f"{record['seconds']:.0f}",
        }
        for record in done
    ]


def _at(record: dict[str, Any], step: int) -> str:
    found = [accuracy for at, _, accuracy, _ in record["result"]["curve"] if at == step]
    return f"{found[0]:.3f}" if found else ""


def figure(done: list[dict[str, Any]]):
    settings = done[0]["settings"]
    wide = [record for record in done if record["settings"]["width"] == record["settings"]["first_panel"]]
    families = [name for name in MODELS if name in values_of(done, "family")]
    styles = line_styles(list(MODELS), [name for name in MODELS if name.startswith("softmax") and name != SHIFTED])
    generators = [name for name in TITLES if name in values_of(wide, "generator")]
    picture = new_figure(5.2 + 5 * (1 + len(generators)), 5)
    *curves, by_width = picture.subplots(1, len(generators) + 1, squeeze=False)[0]
    for panel, generator in zip(curves, generators):
        here = [record for record in wide if record["settings"]["generator"] == generator]
        target = settings["target"]
        accuracy_curves(panel, here, styles, families, {f"solved: {target:g}": target})
        plain(panel, TITLES[generator])
    strict = [record for record in done if record["settings"]["generator"] == "strict"]
    for place, name in enumerate(name for name in families if name in (SHIFTED, DEEPER)):
        here = sorted((r for r in strict if r["settings"]["family"] == name), key=lambda r: r["settings"]["width"])
        if not here:
            continue
        widths, last = zip(*((r["settings"]["width"], r["result"]["accuracy"]) for r in here))
        by_width.plot(widths, last, marker=MARKERS[place], label=name, **styles[name])
    widths = values_of(done, "width")
    by_width.set(xlabel="width of the model", ylabel="last evaluation accuracy", ylim=(-0.03, 1.05), xscale="log")
    by_width.set_xticks(sorted(widths), [str(width) for width in sorted(widths)])
    by_width.minorticks_off()
    by_width.set_xlim(min(widths) / 1.4, max(widths) * 1.4)
    plain(by_width, "By width, strict generator")
    figure_legend(picture)
    explain(
        picture,
        _finding(done),
        "The paper's claim (arXiv 2411.19574, Figure 1): one layer of attention with KV shifting learns induction, "
        "faster than vanilla attention of two layers and also at width 8; vanilla attention of one layer does not, and "
        "four layers are no faster than two.\n"
        "A word seen before asks for the word that followed it. At a solved evaluation training ends. DeltaFormer and "
        "the strict generator, in which copying from any occurrence is right, are not the paper's.",
    )
    return picture


def _finding(done: list[dict[str, Any]]) -> str:
    """Who is solved at the first panel's width, and the accuracy of the others."""
    here = [r for r in done if r["settings"]["width"] == r["settings"]["first_panel"]]
    here = [r for r in here if r["settings"]["generator"] == "strict"] or done
    named = lambda record: record["settings"]["family"].replace(", KV shifting", " with KV shifting")
    solved = [f"{named(r)} (step {r['result']['solved_at'][-1]})" for r in here if r["result"]["solved_at"][-1]]
    others = [f"{named(r)} {r['result']['accuracy']:.2f}" for r in here if not r["result"]["solved_at"][-1]]
    first = f"Induction is learnt by {listed(solved)}" if solved else "No model here learns induction"
    return first + (f"; last accuracy of {listed(others)}" if others else "")


EXPERIMENT = Experiment(
    cells=cells,
    run=train_task.run,
    rows=rows,
    figure=figure,
    cost=f"ten seconds to two minutes a run on two busy cores, {len(cells(False))} runs; --quick: a minute",
)
