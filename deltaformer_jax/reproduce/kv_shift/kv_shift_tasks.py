"""Figures 3 and 9: 3-grams, where KV shifting should neither help nor harm, and hops, where it should help.

3-grams: 200 pairs of words, the same in all rows, each decide the next word. Hops: the token after the last earlier
occurrence of this one, k times in a row; k is drawn for each row, and each k is tested by itself.
The paper's models for 3-grams have 0.8K to 50M parameters; for hops it has five layers and up to 16 hops, trained far
longer. DeltaFormer is not in the paper.
Source: Xu et al., "KV Shifting Attention Enhances Language Modeling", arXiv 2411.19574, Figures 3 and 9, appendix H.
"""

from __future__ import annotations

from typing import Any

from deltaformer_jax.plot.style import MARKERS, explain, line_styles, plain
from deltaformer_jax.reproduce import train_task
from deltaformer_jax.reproduce.experiment import Experiment
from deltaformer_jax.reproduce.pictures import accuracy_curves, figure_legend, listed, new_figure, values_of

SHIFTED = ", KV shifting"
# Family -> the fields that differ.
MODELS = {
    "softmax": {"mixers": ["softmax_attention"]},
    f"softmax{SHIFTED}": {"mixers": ["softmax_attention"], "kv_shift": True},
    "DeltaFormer": {"mixers": ["delta_former"]},
    f"DeltaFormer{SHIFTED}": {"mixers": ["delta_former"], "kv_shift": True},
}
TITLES = {"3-grams": "3-grams", "hops": "Hops, k drawn for each row"}
FULL = {
    "3-grams": dict(width=32, heads=1, layers=1, length=60, steps=300, rate=5e-3, contexts=200),
    "hops": dict(width=64, heads=4, layers=2, length=48, steps=600, rate=3e-3, most=4),
    "models": tuple(MODELS),
    "eval_rows": 512,
}
QUICK = {
    "3-grams": dict(width=32, heads=1, layers=1, length=30, steps=100, rate=1e-2, contexts=50),
    "hops": dict(width=32, heads=2, layers=2, length=32, steps=100, rate=5e-3, most=2),
    "models": tuple(MODELS)[:2],
    "eval_rows": 256,
}


def cells(quick: bool, sizes: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    sizes = sizes or (QUICK if quick else FULL)
    return [_cell(kind, sizes[kind], family, sizes["eval_rows"]) for kind in TITLES for family in sizes["models"]]


def _cell(kind: str, size: dict[str, Any], family: str, rows_asked: int) -> dict[str, Any]:
    hops = lambda least, most: f"task:hop_k,hops={most},least={least}"
    tests = {}
    if kind == "hops":
        tests = {f"{k} hops": [hops(k, k), size["length"], rows_asked] for k in range(1, size["most"] + 1)}
    settings = train_task.settings_of(
        f"{kind}, {family}",
        f"task:ngram,contexts={size['contexts']}" if kind == "3-grams" else hops(1, size["most"]),
        [size["length"]],
        model={
            "d_model": size["width"],
            "num_layers": size["layers"],
            "num_heads": size["heads"],
            "num_kv_heads": size["heads"],
            "head_dim": size["width"] // size["heads"],
            "tie_embeddings": False,
            "chunk_size": 64,
            **MODELS[family],
        },
        learning_rate=size["rate"],
        steps=size["steps"],
        eval_every=25,
        eval_rows=rows_asked,
        tests=tests,
    )
    return {**settings, "family": family, "kind": kind}


def rows(done: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "task": record["settings"]["kind"],
            "model": record["settings"]["family"],
            "last": f"{record['result']['accuracy']:.4f}",
            "of steps": record["result"]["steps"],
            "0.995 at step": record["result"]["solved_at"][-1] or "–",
            "by hops": ", ".join(f"{accuracy:.3f}" for accuracy in record["result"]["tests"].values()) or "–",
            "seconds": f"{record['seconds']:.0f}",
        }
        for record in done
    ]


def figure(done: list[dict[str, Any]]):
    kinds, styles = values_of(done, "kind"), line_styles(list(MODELS), ["softmax"])
    hops = [record for record in done if record["settings"]["kind"] == "hops"]
    picture = new_figure(5.2 + 4.6 * (len(kinds) + bool(hops)), 5)
    panels = picture.subplots(1, len(kinds) + bool(hops), squeeze=False)[0]
    for panel, kind in zip(panels, kinds):
        here = [record for record in done if record["settings"]["kind"] == kind]
        target = here[0]["settings"]["target"]
        accuracy_curves(panel, here, styles, values_of(here, "family"), {f"solved: {target:g}": target})
        plain(panel, TITLES[kind])
    for record in hops:
        family, tests = record["settings"]["family"], record["result"]["tests"]
        numbers = [int(name.split()[0]) for name in tests]
        mark = dict(marker=MARKERS[list(MODELS).index(family)], label=family)
        panels[-1].plot(numbers, list(tests.values()), **mark, **styles[family])
    if hops:
        panels[-1].set(xlabel="hops k", ylabel="accuracy after training", ylim=(None, 1.03))
        panels[-1].set_xticks(range(1, len(hops[0]["settings"]["tests"]) + 1))
        plain(panels[-1], "By the number of hops")
    figure_legend(picture, *panels[: len(kinds)])
    explain(
        picture,
        _finding(done),
        "The paper's claims (arXiv 2411.19574): KV shifting neither helps nor harms learning 3-grams (Figure 3), and "
        "with it a model follows more hops (Figure 9).\n"
        "3-grams: pairs of words decide the next word, the same in all rows. Hops: the token after the last earlier "
        "occurrence of this one, k times in a row. DeltaFormer is not in the paper.",
    )
    return picture


def _finding(done: list[dict[str, Any]]) -> str:
    parts = []
    for kind in values_of(done, "kind"):
        here = [record for record in done if record["settings"]["kind"] == kind]
        score = lambda record: record["result"]["accuracy"]
        named = lambda record: record["settings"]["family"].replace(SHIFTED, " with KV shifting")
        parts.append(f"{kind}: {listed([f'{named(record)} {score(record):.3f}' for record in here])}")
    return f"Last accuracy in {'; in '.join(parts)}"


EXPERIMENT = Experiment(
    cells=cells,
    run=train_task.run,
    rows=rows,
    figure=figure,
    cost=f"half a minute to four minutes a run on two busy cores, {len(cells(False))} runs; --quick: a minute",
)
