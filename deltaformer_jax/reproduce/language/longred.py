"""Extending a context by four, three ways: long texts alone, long and short texts, and LongReD.

A byte model of the standard library's text is trained on rows of T tokens. Its rotary base then becomes the least clean
one for 4 T tokens (arXiv 2405.14591), and it is trained on, with about as many tokens of long rows a step:

* plain: the mean nats of long rows;
* mixed: of long rows and of rows of T/4 tokens;
* longred: the mean nats of long rows, and the distances from the model before (`training/objectives/restoration.py`).

Measured on the same texts before and after: nats of rows of T tokens, nats of long rows beyond T, the nats saved on a
passage that comes back after m tokens, and by how much each layer's stream and attention have moved.

Source: Dong et al., "LongReD", arXiv 2502.07365, for Llama-3-8B and Mistral-7B. DeltaFormer is not the paper's.
"""

from __future__ import annotations

from typing import Any

from etils import epath

from deltaformer_jax.plot.style import COLOURS, explain, plain, reference
from deltaformer_jax.reproduce.experiment import Experiment
from deltaformer_jax.reproduce.language.byte_models import byte_model, matched, parameters, prepared
from deltaformer_jax.reproduce.pictures import figure_legend, new_figure

FAMILIES = {"softmax attention": "softmax_attention", "DeltaFormer": "delta_former"}
METHODS = ("plain", "mixed", "longred")
FULL = dict(d_model=128, num_layers=4, num_heads=4, head_dim=32, sequence_length=256, batch_size=8, steps=1200)
QUICK = dict(d_model=32, num_layers=2, num_heads=1, head_dim=32, sequence_length=64, batch_size=8, steps=30)
# The least bases of two digits for T and 4 T tokens at a width of 32.
BASES = {256: (2200.0, 59_000.0), 64: (320.0, 2200.0)}


def cells(quick: bool) -> list[dict[str, Any]]:
    sizes = QUICK if quick else FULL
    target = parameters(byte_model(sizes, ("delta_former",), mlp_dim=0))
    found = []
    for family, mixer in FAMILIES.items():
        if quick and mixer != "delta_former":
            continue
        found.append(
            {
                "label": family,
                **matched(sizes, (mixer,), target),
                "rope_base": BASES[sizes["sequence_length"]][0],
                "eval_batches": 4,
                "to": 4 * sizes["sequence_length"],
                "methods": list(METHODS[::2] if quick else METHODS),
                "extension_steps": 6 if quick else 200,
                "measured_tokens": 4096 if quick else 65536,
            }
        )
    return found


def run(settings: dict[str, Any], folder: epath.Path, note, stop) -> dict[str, Any] | None:
    import dataclasses

    import jax

    from deltaformer_jax.extension.plan import extended
    from deltaformer_jax.extension.report import compared
    from deltaformer_jax.training.checkpoints.restore import restore
    from deltaformer_jax.training.loop import train
    from deltaformer_jax.training.setup import prepare

    teacher = folder / "run"
    if not train(*prepared(settings, folder, note), stop, quiet=True).finished:
        return None
    before, found = restore(teacher), {}
    for method in settings["methods"]:
        config = extended(before.config, str(teacher), settings["to"], method, settings["extension_steps"])
        config.objective.short_length = settings["sequence_length"] // 4
        config.model.vocab_size = 0
        config.run = dataclasses.replace(config.run, log_every=max(1, config.run.steps // 50))
        note(f"{settings['label']}: {method}")
        steps = prepare(config, folder / method, note, jax.devices()[:1])
        if not train(*steps, stop, quiet=True).finished:
            return None
        after = restore(folder / method)
        found[method] = compared(before, after, steps.run.corpus, tokens=settings["measured_tokens"])
    return {"before": found[settings["methods"][0]]["before"], "methods": {name: found[name] for name in found}}


def _lines(record: dict[str, Any]) -> list[tuple[str, dict[str, Any], list[float] | None]]:
    """(name, measures, similarities) of the model before and of each extension."""
    result = record["result"]
    extended = [(name, found["after"], found["drift"]["similarity"]) for name, found in result["methods"].items()]
    return [("before", result["before"], None), *extended]


def rows(done: list[dict[str, Any]]) -> list[dict[str, Any]]:
    from deltaformer_jax.extension.report import beyond

    lines = []
    for record in done:
        short, long = record["settings"]["sequence_length"], record["settings"]["to"]
        for name, measures, similarity in _lines(record):
            recall = measures["recall"]
            lines.append(
                {
                    "model": record["settings"]["label"],
                    "trained": name,
                    "rotary base": f"{measures['rope_base']:g}",
                    f"nats, texts of {short}": f"{measures['short']['loss']:.4f}",
                    f"nats, positions {short + 1} to {long}": f"{beyond(measures['long']['by_position'], short):.4f}",
                    f"nats saved at {recall[0]['distance']}": f"{recall[0]['saved']:.3f}",
                    f"nats saved at {recall[-1]['distance']}": f"{recall[-1]['saved']:.3f}",
                    "least similarity of a layer": "1" if similarity is None else f"{min(similarity):.4f}",
                }
            )
    return lines


def figure(done: list[dict[str, Any]]):
    picture = new_figure(15, 4.6 * len(done))
    panels = picture.subplots(len(done), 3, squeeze=False)
    for record, (loss, recall, drift) in zip(done, panels):
        short = record["settings"]["sequence_length"]
        for (name, measures, similarity), colour in zip(_lines(record), ("#000000", *COLOURS)):
            style = dict(color=colour, marker="o", markersize=4, label=name)
            reports = measures["long"]["by_position"]
            loss.plot([one["to"] for one in reports], [one["loss"] for one in reports], **style)
            points = measures["recall"]
            recall.plot([one["distance"] for one in points], [one["saved"] for one in points], **style)
            if similarity is not None:
                drift.plot(range(len(similarity)), [1 - value for value in similarity], **style)
        for axes in (loss, recall):
            axes.set_xscale("log", base=2)
            reference(axes, short, "old context", upright=True)
        loss.set(xlabel="position", ylabel="nats a byte")
        recall.set(xlabel="bytes between a passage and its return", ylabel="nats a byte saved")
        drift.set(xlabel="layer", ylabel="1 − cosine with the model before", ylim=(0, None))
        drift.set_xticks(range(record["settings"]["num_layers"]))
        plain(loss, f"{record['settings']['label']}: loss by position")
        plain(recall, "Recall of a passage")
        plain(drift, f"Drift on texts of {short}")
    figure_legend(picture, *panels.flat)
    settings = done[0]["settings"]
    explain(
        picture,
        _finding(done),
        f"{settings['num_layers']} layers of width {settings['d_model']}, about {settings['parameters']:,} parameters, "
        f"trained for {settings['steps']:,} steps on rows of {settings['sequence_length']} bytes of Python's standard "
        f"library, then for {settings['extension_steps']} on rows of {settings['to']:,}; one seed.\nLongReD (arXiv "
        "2502.07365) has models of 7 and 8 billion parameters; DeltaFormer is this library's question.",
    )
    return picture


def _finding(done: list[dict[str, Any]]) -> str:
    record = done[-1]
    short = record["settings"]["sequence_length"]
    nats = {name: measures["short"]["loss"] for name, measures, _ in _lines(record)}
    added = ", ".join(f"{name} {value - nats['before']:+.3f}" for name, value in nats.items() if name != "before")
    return f"{record['settings']['label']}, nats a byte on texts of {short} after extension: {added}"


EXPERIMENT = Experiment(
    cells=cells,
    run=run,
    rows=rows,
    figure=figure,
    cost="an hour on two busy cores, two models extended three ways; --quick: a minute of processor time, one model",
)
