"""Baichuan-M1's attention, one part taken away at a time, as its Table 2 does at 1.5 billion parameters.

The full model alternates layers with a window and without one, the latter with few wide heads, shifts keys and values
by one token in every layer (its "convolution"), and has a rotary base of 1e6. Each other model differs in one thing,
and has as many parameters by the width of its feed-forward layers:

* narrow heads: those without a window as narrow as the others;
* 3 of 4 layers with a window, or none;
* no KV shifting;
* a rotary base of 1e4.

Byte models of the standard library's text. Measured: bits a byte, and the nats a byte saved on a passage that comes
back m bytes later (`extension/recall.py`), in the place of the paper's needle in a haystack, which models this small do
not find.

Source: "Baichuan-M1", arXiv 2502.12671, Table 2.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from etils import epath

from deltaformer_jax.config import Mixer
from deltaformer_jax.plot.style import explain, line_styles, plain
from deltaformer_jax.reproduce.experiment import Experiment
from deltaformer_jax.reproduce.language.byte_models import as_json, byte_model, matching_width, parameters, prepared
from deltaformer_jax.reproduce.pictures import figure_legend, new_figure

FULL = dict(d_model=128, num_layers=4, num_heads=4, head_dim=32, sequence_length=512, batch_size=4, steps=400)
QUICK = dict(d_model=32, num_layers=4, num_heads=2, head_dim=16, sequence_length=128, batch_size=4, steps=100)
WHOLE, UNSHIFTED = "full", "no KV shifting"


def patterns(sizes: dict[str, Any]) -> dict[str, tuple[Mixer, ...]]:
    """Name -> the pattern of its layers."""
    heads, width = sizes["num_heads"], sizes["head_dim"]

    def layer(window: bool, wide: bool = True, shift: bool = True, base: float = 1e6) -> Mixer:
        shape = dict(num_heads=heads, num_kv_heads=heads // 2, head_dim=width)
        if window:
            shape["window"] = sizes["sequence_length"] // 8
        elif wide:
            shape = dict(num_heads=heads // 2, num_kv_heads=1, head_dim=2 * width)
        return Mixer("softmax_attention", kv_shift=shift, rope_base=base, **shape)

    both = lambda **changed: (layer(True, **changed), layer(False, **changed))
    return {
        WHOLE: both(),
        "narrow heads without a window": both(wide=False),
        "3 of 4 layers with a window": (layer(True),) * 3 + (layer(False),),
        "no window": (layer(False),),
        UNSHIFTED: both(shift=False),
        "rotary base 1e4": both(base=1e4),
    }


def cells(quick: bool) -> list[dict[str, Any]]:
    sizes = QUICK if quick else FULL
    of = patterns(sizes)
    target = parameters(byte_model(sizes, of[WHOLE], mlp_dim=0))
    found = []
    for name, pattern in of.items():
        if quick and name not in (WHOLE, UNSHIFTED):
            continue
        width = matching_width(sizes, pattern, target)
        found.append(
            {
                "label": name,
                "mixers": [as_json(mixer) for mixer in pattern],
                **sizes,
                "mlp_dim": width,
                "parameters": parameters(byte_model(sizes, pattern, width)),
                "learning_rate": 4e-3,
                "seed": 0,
                "eval_batches": 4 if quick else 64,
                "recall_rows": 8 if quick else 64,
            }
        )
    return found


def run(settings: dict[str, Any], folder: epath.Path, note, stop) -> dict[str, Any] | None:
    from deltaformer_jax.extension.report import recalled
    from deltaformer_jax.training.checkpoints.restore import restore
    from deltaformer_jax.training.loop import train

    run, position, state = prepared(settings, folder, note)
    ending = train(run, position, state, stop, quiet=True)
    if not ending.finished:
        return None
    last = [record for record in run.metrics.records if "eval_bits_per_byte" in record][-1]
    found = recalled(restore(run.workdir), run.corpus, settings["sequence_length"], settings["recall_rows"])
    return {
        "bits": last["eval_bits_per_byte"],
        "recall": found,
        "saved": float(np.mean([one["saved"] for one in found])),
        "tokens": settings["steps"] * settings["sequence_length"] * settings["batch_size"],
    }


def rows(done: list[dict[str, Any]]) -> list[dict[str, Any]]:
    lines = []
    for record in done:
        result = record["result"]
        saved = {f"nats saved at {one['distance']}": f"{one['saved']:.3f}" for one in result["recall"]}
        lines.append(
            {
                "model": record["settings"]["label"],
                "parameters": f"{record['settings']['parameters']:,}",
                "bits a byte": f"{result['bits']:.3f}",
                **saved,
                "mean saved": f"{result['saved']:.3f}",
            }
        )
    return lines


def figure(done: list[dict[str, Any]]):
    picture = new_figure(12, 5)
    recall, bits = picture.subplots(1, 2, width_ratios=(3, 2))
    styles = line_styles([record["settings"]["label"] for record in done])
    for place, record in enumerate(done):
        name, result = record["settings"]["label"], record["result"]
        points = [(one["distance"], one["saved"]) for one in result["recall"]]
        recall.plot(*zip(*points), marker="o", markersize=4, label=name, **styles[name])
        bits.plot([result["bits"]], [place], "o", color=styles[name]["color"])
    recall.set_xscale("log", base=2)
    recall.axvline(done[0]["settings"]["sequence_length"] // 8, color="#555555", linewidth=1, linestyle=":")
    recall.set(xlabel="bytes between a passage and its return (dotted: the window)", ylabel="nats a byte saved")
    bits.set(xlabel="bits a byte", yticks=range(len(done)), yticklabels=[r["settings"]["label"] for r in done])
    bits.invert_yaxis()
    plain(recall, "Recall of a passage")
    plain(bits, "Loss")
    figure_legend(picture, recall)
    settings = done[0]["settings"]
    explain(
        picture,
        _finding(done),
        f"{settings['num_layers']} layers of width {settings['d_model']}, about {settings['parameters']:,} parameters, "
        f"{done[0]['result']['tokens']:,} bytes of Python's standard library in rows of {settings['sequence_length']}, "
        "one seed.\nBaichuan-M1 (arXiv 2502.12671), Table 2, has 1.5 billion parameters and a needle in a haystack.",
    )
    return picture


def _finding(done: list[dict[str, Any]]) -> str:
    saved = {record["settings"]["label"]: record["result"]["saved"] for record in done}
    least = min(saved, key=saved.get)
    rest = f" ({WHOLE} {saved[WHOLE]:.2f})" if WHOLE in saved and least != WHOLE else ""
    return f"Least recall of a passage: {least}, {saved[least]:.2f} nats a byte saved{rest}"


EXPERIMENT = Experiment(
    cells=cells,
    run=run,
    rows=rows,
    figure=figure,
    cost="half an hour on one core, six models; --quick: a minute of processor time, two models",
)
