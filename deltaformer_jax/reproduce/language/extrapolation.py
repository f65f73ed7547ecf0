"""Trained on short texts, read on long ones: bits a byte by how far back a model may see.

Byte models are trained on rows of T = 128 bytes. Then the same texts are cut into rows of L bytes, for L from T up to
16 T, and each byte is predicted from those before it in its row. The targets are the same at every L. So a model that
makes use of a longer context loses less at a larger L, one that ignores it as much, and one whose positions mean
nothing beyond T more. Measured too is the loss by position in the longest rows.

* softmax attention with a rotary embedding, without positions, with ALiBi, Kerple, FIRE and DAPE (around Kerple), and
  with a forgetting gate;
* DeltaFormer with and without a rotary embedding;
* mixers with a memory of fixed size, which know positions by their decay or not at all.

All have as many parameters, by the width of their feed-forward layers.

Source: "DAPE", Zheng et al., NeurIPS 2024, arXiv 2405.14722: models of 125 million parameters, trained at 128 tokens of
Arxiv, from 128 to 8,192 tokens.
"""

from __future__ import annotations

from typing import Any

from etils import epath

from deltaformer_jax.config import Mixer
from deltaformer_jax.plot.style import explain, line_styles, plain, reference
from deltaformer_jax.reproduce.experiment import Experiment
from deltaformer_jax.reproduce.language.byte_models import byte_model, matched, parameters, prepared
from deltaformer_jax.reproduce.pictures import figure_legend, new_figure


def _softmax(**options: Any) -> tuple[Mixer]:
    return (Mixer("softmax_attention", **{"rope_base": 0.0} | options),)


# Label -> the pattern of mixers. FIRE's L starts at a quarter of the training length, as in its paper.
BIASES: dict[str, tuple[str | Mixer, ...]] = {
    "RoPE": _softmax(rope_base=1e4),
    "no position": _softmax(),
    "ALiBi": _softmax(alibi=True),
    "Kerple": _softmax(position_bias="kerple"),
    "FIRE": _softmax(position_bias="fire", fire_length=32),
    "DAPE-Kerple": _softmax(position_bias="kerple", dape_dim=32),
    "forgetting gate": _softmax(forget_gate=True),
}
OTHERS: dict[str, tuple[str | Mixer, ...]] = {
    "DeltaFormer, RoPE": ("delta_former",),
    "DeltaFormer, no position": (Mixer("delta_former", rope_base=0.0),),
    "DeltaNet": ("delta_net",),
    "Gated DeltaNet": ("gated_delta_net",),
    "retention, no RoPE": (Mixer("retention", rope_base=0.0),),
}
PATTERNS = BIASES | OTHERS

FULL = dict(d_model=64, num_layers=3, num_heads=4, head_dim=16, sequence_length=128, batch_size=16, steps=300)
QUICK = dict(d_model=32, num_layers=2, num_heads=2, head_dim=16, sequence_length=64, batch_size=8, steps=40)
IN_QUICK = ("RoPE", "DAPE-Kerple", "DeltaNet")
ROWS = 4  # of the longest in a batch of the evaluation


def cells(quick: bool, sizes: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    sizes = sizes or (QUICK if quick else FULL)
    target = parameters(byte_model(sizes, PATTERNS["RoPE"], mlp_dim=0))
    trained = sizes["sequence_length"]
    found = []
    for label, pattern in PATTERNS.items():
        if quick and label not in IN_QUICK:
            continue
        found.append(
            {
                "label": label,
                **matched(sizes, pattern, target),
                "eval_batches": 4,
                "lengths": [trained * 2**power for power in ((0, 2) if quick else range(5))],
                "long_batches": 2 if quick else 8,
            }
        )
    return found


def run(settings: dict[str, Any], folder: epath.Path, note, stop) -> dict[str, Any] | None:
    from deltaformer_jax.training.checkpoints.restore import restore
    from deltaformer_jax.training.loop import train

    steps = prepared(settings, folder, note)
    if not train(*steps, stop, quiet=True).finished:
        return None
    run, bits, longest = restore(folder / "run"), {}, settings["lengths"][-1]
    for length in settings["lengths"]:
        note(f"{settings['label']}: rows of {length} bytes")
        sums = evaluated(run, steps.run.corpus, length, longest, settings["long_batches"])
        bits[str(length)] = sums.report()["bits_per_byte"]
    reports = [(one["from"], one["to"], one["bits_per_byte"]) for one in sums.by_position()]
    return {"bits": bits, "by_position": [report for report in reports if report[2] is not None]}


def evaluated(run: Any, corpus: Any, length: int, longest: int, batches: int) -> Any:
    """The sums by position of rows of `length` tokens, into which rows of `longest` tokens are cut. The targets are the
    same for every length."""
    from deltaformer_jax.data import batches as rows_of
    from deltaformer_jax.evaluate.by_position import evaluate_by_position

    long = rows_of(corpus, "eval", sequence_length=longest, batch_size=ROWS, seed=0)
    return evaluate_by_position(
        run.program.parts,
        run.program.mesh,
        run.params,
        ({name: x.reshape(-1, length) for name, x in batch.items()} for batch in long),
        sequence_length=length,
        token_bytes=corpus.tokenizer.token_bytes,
        limit=batches,
    )


def rows(done: list[dict[str, Any]]) -> list[dict[str, Any]]:
    lines = []
    for record in done:
        bits = record["result"]["bits"]
        first, last = (bits[length] for length in (min(bits, key=int), max(bits, key=int)))
        lines.append(
            {
                "model": ("softmax attention, " if record["settings"]["label"] in BIASES else "")
                + record["settings"]["label"],
                **{f"bits at {length}": f"{value:.3f}" for length, value in bits.items()},
                "change": f"{last - first:+.3f}",
                "last positions": f"{record['result']['by_position'][-1][2]:.3f}",
                "parameters": f"{record['settings']['parameters']:,}",
            }
        )
    return lines


def figure(done: list[dict[str, Any]]):
    picture = new_figure(15, 5)
    panels = dict(zip(("biases", "others", "positions"), picture.subplots(1, 3)))
    labels = [record["settings"]["label"] for record in done]
    styles = line_styles(labels, [label for label in labels if label == "RoPE"])
    trained, most = done[0]["settings"]["sequence_length"], 0.0
    for record in done:
        label, result = record["settings"]["label"], record["result"]
        look = dict(marker="o", markersize=4, label=label, **styles[label])
        lengths, bits = zip(*((int(length), value) for length, value in result["bits"].items()))
        panels["biases" if label in BIASES else "others"].plot(lengths, bits, **look)
        ends = [(last, value) for _, last, value in result["by_position"] if last >= 16]
        panels["positions"].plot(*zip(*ends), **look)
        most = max(most, *bits)
    least = min(min(record["result"]["bits"].values()) for record in done)
    for name, axes in panels.items():
        axes.set_xscale("log", base=2)
        axes.set(ylabel="bits a byte", xlabel="position, up to" if name == "positions" else "bytes in a row")
        reference(axes, trained, "trained", upright=True)
    for name in ("biases", "others"):  # of the same scale
        panels[name].set_ylim(least - 0.1 * (most - least), most + 0.1 * (most - least))
    plain(panels["biases"], "Softmax attention", room=18)
    plain(panels["others"], "Other mixers", room=18)
    plain(panels["positions"], "By position, in the longest rows", room=18)
    figure_legend(picture, *panels.values())
    settings = done[0]["settings"]
    explain(
        picture,
        _finding(done),
        f"Byte models of {settings['num_layers']} layers of width {settings['d_model']}, {settings['steps']} steps of "
        f"{settings['batch_size']} rows, one seed. The same targets at every length; a row's first bytes have no "
        "context.\nNot the setting of DAPE's paper (arXiv 2405.14722): 125 million parameters, Arxiv, perplexity from "
        "128 to 8,192 tokens: Kerple 8.30 to 12.59, DAPE 8.21 to 4.97.",
    )
    return picture


def _finding(done: list[dict[str, Any]]) -> str:
    """Which model gains most from contexts longer than in training, and which loses most."""
    change = {}
    for record in done:
        bits = list(record["result"]["bits"].values())
        change[record["settings"]["label"]] = bits[-1] - bits[0]
    names = sorted(change, key=change.__getitem__)
    longest, trained = done[0]["settings"]["lengths"][-1], done[0]["settings"]["sequence_length"]
    said = [f"{change[name]:+.2f} ({name})" for name in dict.fromkeys((names[0], names[-1]))]
    gain = sum(value < 0 for value in change.values())
    return (
        f"Trained at {trained} bytes, read with {longest}: {gain} of {len(change)} models predict better; bits a byte "
        f"change by {' to '.join(said)}"
    )


EXPERIMENT = Experiment(
    cells=cells,
    run=run,
    rows=rows,
    figure=figure,
    cost="a minute and a quarter a model on one core, twelve models; --quick: a minute, three of them",
)
