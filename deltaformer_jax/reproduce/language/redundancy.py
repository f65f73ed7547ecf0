"""How redundant are layers? Block Influence and loss after removal, for softmax attention and the delta family.

Byte models of the standard library's text, as many parameters each, are trained as usual, and once more with elastic
depth (`training/objectives/elastic.py`). Then layers are switched off without further training:

* Block Influence BI_l = 1 − E[cos(x_l, x_{l+1})] of each layer, x_l the residual stream that enters it, and relative
  magnitude (`surgery/influence.py`);
* bits of a token (a byte) without each layer alone;
* bits with n = 1, 2, ... layers removed, in the order of five rankings and, of an elastic model, the trained order.

Source: Men et al., "ShortGPT", arXiv 2403.03853, for Transformers. Delta-rule layers and elastic training are not the
paper's.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from etils import epath

from deltaformer_jax.config import ObjectiveConfig
from deltaformer_jax.plot.style import COLOURS, explain, line_styles, plain
from deltaformer_jax.reproduce.experiment import Experiment
from deltaformer_jax.reproduce.language.byte_models import byte_model, matched, parameters, prepared
from deltaformer_jax.reproduce.pictures import figure_legend, new_figure
from deltaformer_jax.surgery.rankings import RANKINGS

PATTERNS: dict[str, tuple[str, ...]] = {
    "softmax attention": ("softmax_attention",),
    "DeltaFormer": ("delta_former",),
    "DeltaNet": ("delta_net",),
    "Gated DeltaNet": ("gated_delta_net",),
    "3 Gated DeltaNet + 1 softmax": ("gated_delta_net",) * 3 + ("softmax_attention",),
}
FULL = dict(d_model=64, num_layers=8, num_heads=2, head_dim=32, sequence_length=128, batch_size=16, steps=800)
QUICK = dict(d_model=32, num_layers=4, num_heads=1, head_dim=32, sequence_length=64, batch_size=8, steps=40)
# The order in which elastic training leaves out layers, from the middle on: every second one is left at the end.
DROP, DEPTHS = {8: "6,2,4,1", 4: "2,1"}, {8: "6,4", 4: "3,2"}
TRAINED = "trained order"
NAMES = {
    "bi": "Block Influence",
    "relative_magnitude": "relative magnitude",
    "loss": "loss without it",
    "reverse": "the last first",
    "sequential": "the first first",
    TRAINED: "as in elastic training",
}


def cells(quick: bool) -> list[dict[str, Any]]:
    sizes = QUICK if quick else FULL
    target = parameters(byte_model(sizes, PATTERNS["DeltaFormer"], mlp_dim=0))
    families = [family for family in PATTERNS if not quick or family in ("softmax attention", "DeltaFormer")]
    found = []
    for family in families:
        common = {
            "family": family,
            **matched(sizes, PATTERNS[family], target),
            "eval_batches": 4,
            "measured_batches": 2 if quick else 16,
        }
        found.append({"label": family, "elastic": False, **common})
        if not quick or family == "softmax attention":
            found.append({"label": f"{family}, elastic", "elastic": True, **common})
    return found


def run(settings: dict[str, Any], folder: epath.Path, note, stop) -> dict[str, Any] | None:
    from deltaformer_jax.data import batches
    from deltaformer_jax.model_parts import merge
    from deltaformer_jax.surgery import losses, measure, ranking
    from deltaformer_jax.training.loop import train

    layers = settings["num_layers"]
    objective = ObjectiveConfig("elastic", DEPTHS[layers], drop=DROP[layers]) if settings["elastic"] else None
    run, position, state = prepared(settings, folder, note, objective)
    ending = train(run, position, state, stop, quiet=True)
    if not ending.finished:
        return None
    model = merge(run.program.parts, ending.state.params)
    length, rows = settings["sequence_length"], settings["batch_size"]
    evaluation = batches(run.corpus, "eval", sequence_length=length, batch_size=rows, seed=0)
    taken = list(itertools.islice(evaluation, settings["measured_batches"]))
    values = measure(model, taken)
    orders = {name: ranking(values, name, layers) for name in RANKINGS}
    if settings["elastic"]:
        orders[TRAINED] = [int(layer) for layer in DROP[layers].split(",")]
    counts = {name: min(len(order) + 1, layers) for name, order in orders.items()}  # at least one layer is left
    removed = [orders[name][:n] for name, count in counts.items() for n in range(count)]
    switches = np.ones((len(removed), layers), bool)
    for row, numbers in zip(switches, removed):
        row[numbers] = False
    distinct, places = np.unique(switches, axis=0, return_inverse=True)
    nats = iter((losses(model, taken, distinct) / np.log(2))[places.reshape(-1)].tolist())
    return {
        "bi": values["bi"].tolist(),
        "relative_magnitude": values["relative_magnitude"].tolist(),
        "bits_without": (values["loss"] / np.log(2)).tolist(),
        "orders": orders,
        # bits[name][n]: with the first n layers of that order removed.
        "bits": {name: list(itertools.islice(nats, count)) for name, count in counts.items()},
        "rank_correlation": rank_correlation(values["bi"], values["loss"]),
        "tokens": settings["steps"] * length * rows,
    }


def rank_correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's: the correlation of the ranks of two lists without equal entries."""
    ranks = [np.argsort(np.argsort(values)) for values in (x, y)]
    return float(np.corrcoef(*ranks)[0, 1])


def rows(done: list[dict[str, Any]]) -> list[dict[str, Any]]:
    lines = []
    for record in done:
        result, layers = record["result"], record["settings"]["num_layers"]
        bits, quarter, half = result["bits"], layers // 4, layers // 2
        line = {
            "model": record["settings"]["label"],
            "bits, all layers": f"{bits['bi'][0]:.3f}",
            "BI of the middle layers": _span(result["bi"][1:-1]),
            "bits added by one of them": _span(np.array(result["bits_without"][1:-1]) - bits["bi"][0]),
            "BI and loss, rank correlation": f"{result['rank_correlation']:.2f}",
        }
        for name in ("bi", "loss", "reverse", "sequential"):
            line[f"{quarter}, {half} of {layers} removed by {NAMES[name]}"] = (
                f"{bits[name][quarter]:.3f}, {bits[name][half]:.3f}"
            )
        lines.append(line)
    return lines


def _span(values) -> str:
    return f"{min(values):.3f} to {max(values):.3f}"


def figure(done: list[dict[str, Any]]):
    families = list(dict.fromkeys(record["settings"]["family"] for record in done))
    styles = line_styles(families)
    picture = new_figure(15, 11)
    above, below = picture.subfigures(2, 1, height_ratios=(6, 10))
    influence, single, kept = above.subplots(1, 3)
    for record in done:
        settings, result = record["settings"], record["result"]
        layers, elastic = settings["num_layers"], settings["elastic"]
        style = styles[settings["family"]] | {"linestyle": "--" if elastic else "-", "marker": "o", "markersize": 4}
        if not elastic:
            influence.plot(range(layers), result["bi"], **style)
            single.plot(range(layers), np.array(result["bits_without"]) - result["bits"]["bi"][0], **style)
        order = result["bits"][TRAINED if elastic else "bi"]
        kept.plot(layers - np.arange(len(order)), order, label=settings["label"], **style)
    influence.set(xlabel="layer", ylabel="Block Influence", yscale="log")
    single.set(xlabel="layer", ylabel="bits a byte added without it")
    single.set_yscale("symlog", linthresh=0.01)
    _over_layers_kept(kept, done)
    kept.set_ylabel("bits a byte")
    for axes in (influence, single):
        axes.set_xticks(range(done[0]["settings"]["num_layers"]))
    plain(influence, "How much each layer changes the stream")
    plain(single, "Each layer removed alone")
    plain(kept, "Removed by BI; elastic: as trained")
    figure_legend(above, kept)
    panels = below.subplots(2, len(families), sharey=True, squeeze=False)
    for elastic, row in enumerate(panels):
        _draw_rankings(row, done, families, bool(elastic))
    figure_legend(below, *panels.flat)
    settings = done[0]["settings"]
    explain(
        picture,
        _finding(done),
        f"{settings['num_layers']} layers of width {settings['d_model']}, about {settings['parameters']:,} parameters, "
        f"{done[0]['result']['tokens']:,} tokens of the Python standard library, one seed. Layers are switched off "
        "after training.\nBlock Influence and the rankings: ShortGPT (arXiv 2403.03853), which has Transformers, Mamba "
        "and RWKV. Delta-rule layers and elastic training are this library's question.",
    )
    return picture


def _draw_rankings(panels, done: list[dict[str, Any]], families: list[str], elastic: bool) -> None:
    """A panel for each family: the bits of its model against the layers kept, by each ranking."""
    for axes, family in zip(panels, families):
        found = [r for r in done if r["settings"]["family"] == family and r["settings"]["elastic"] == elastic]
        for record in found:
            bits, layers = record["result"]["bits"], record["settings"]["num_layers"]
            for colour, (name, values) in zip(COLOURS, bits.items()):
                axes.plot(layers - np.arange(len(values)), values, "s-", markersize=3, color=colour, label=NAMES[name])
        _over_layers_kept(axes, done)
        plain(axes, ("the same, elastic" if elastic else family) + ("" if found else " (not run)"))
    panels[0].set_ylabel("bits a byte")


def _over_layers_kept(axes, done: list[dict[str, Any]]) -> None:
    layers = done[0]["settings"]["num_layers"]
    bits = [record["result"]["bits"] for record in done]
    top = max(of["bi"][layers // 2] for of in bits)
    low = min(value for of in bits for values in of.values() for value in values)
    room = 0.1 * (top - low)
    axes.set(xlabel="layers kept", xlim=(layers + 0.3, 0.7), ylim=(low - room, top + room))
    axes.set_xticks(range(1, layers + 1))


def _finding(done: list[dict[str, Any]]) -> str:
    usual = {record["settings"]["family"]: record for record in done if not record["settings"]["elastic"]}
    added = {
        family: record["result"]["bits"]["bi"][record["settings"]["num_layers"] // 4]
        - record["result"]["bits"]["bi"][0]
        for family, record in usual.items()
    }
    if not added:
        return "How many bits a byte does a model lose without some of its layers?"
    least, most = min(added, key=added.get), max(added, key=added.get)
    text = f"Bits a byte added by removing a quarter of the layers by Block Influence: {least} {added[least]:.2f}"
    return text + (f" to {most} {added[most]:.2f}" if most != least else "")


EXPERIMENT = Experiment(
    cells=cells,
    run=run,
    rows=rows,
    figure=figure,
    cost="two hours on two busy cores, ten models; --quick: a minute of processor time, three models",
)
