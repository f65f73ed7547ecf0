"""Attention that sees a window and, behind it, a document's first tokens and separators (SepLLM).

    visible(i, t):  i ≤ t  and  (t − i < n  or  i < a  or  byte i is one of newline . ; :)

Byte models of the standard library's text, trained from scratch with each of

* full: every token before it;
* window: n bytes;
* window + initial: and the first a bytes, as in StreamingLLM;
* SepLLM: and the separators;
* SepLLM H, SepLLM H and T: and full attention in the first layer, or in the first and the last (the paper's H/T).

DeltaFormer's write is masked like its read. Measured: bits a byte, also by how many bytes the model has seen, and the
share of the cache's entries that a token sees, the mean over tokens and layers. The others can be dropped. The number
of parameters is the same in all models of a mixer. The full model is also measured behind the masks of others that it
was not trained with.

Source: Chen et al., SepLLM, arXiv 2412.12094, Table 3: Pythia-160M, trained from scratch. DeltaFormer is not the
paper's.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from etils import epath

from deltaformer_jax.config import Mixer
from deltaformer_jax.plot.style import explain, line_styles, plain, reference
from deltaformer_jax.reproduce.experiment import Experiment
from deltaformer_jax.reproduce.language.byte_models import as_json, byte_model, parameters, prepared
from deltaformer_jax.reproduce.pictures import figure_legend, new_figure

MIXERS = {"Transformer": "softmax_attention", "DeltaFormer": "delta_former"}
SEPARATORS = "\n.;:"
FULL_NAME, STREAMING, SEPLLM = "full", "window + initial", "SepLLM"
# Pythia-160M: perplexity on LAMBADA, and the visible part of the attention map in percent. Windows of 64 tokens.
PAPER = {
    FULL_NAME: (34.83, 100.0),
    STREAMING: (44.03, 6.4),
    SEPLLM: (40.08, 17.2),
    "SepLLM H": (36.54, 24.1),
    "SepLLM H and T": (33.41, 31.0),
}
FULL = dict(
    d_model=64,
    num_layers=4,
    num_heads=2,
    head_dim=32,
    mlp_dim=172,
    sequence_length=512,
    batch_size=2,
    steps=400,
    eval_batches=8,
    measured_batches=96,
    window=32,
    initial=3,
)
QUICK = FULL | dict(
    d_model=32,
    num_heads=1,
    mlp_dim=88,
    num_layers=2,
    sequence_length=128,
    window=8,
    steps=24,
    eval_batches=2,
    measured_batches=8,
)


def models(window: int, initial: int) -> dict[str, tuple[dict[str, Any], tuple[str, ...]]]:
    """Name -> (fields of the model, which of its layers see everything)."""
    near, first = {"window": window}, {"initial_tokens": initial}
    chosen = near | first | {"separators": SEPARATORS}
    return {
        FULL_NAME: ({}, ()),
        "window": (near, ()),
        STREAMING: (near | first, ()),
        SEPLLM: (chosen, ()),
        "SepLLM H": (chosen, ("first",)),
        "SepLLM H and T": (chosen, ("first", "last")),
    }


def pattern(mixer: str, layers: int, whole: tuple[str, ...]) -> tuple[str | Mixer, ...]:
    """The layers of a model: one, if all are alike, else each."""
    if not whole:
        return (mixer,)
    found: list[str | Mixer] = [mixer] * layers
    for place in whole:
        found[0 if place == "first" else -1] = Mixer(mixer, window=0)
    return tuple(found)


def cells(quick: bool, sizes: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    sizes = sizes or (QUICK if quick else FULL)
    shape = {name: value for name, value in sizes.items() if name not in ("window", "initial")}
    of, found = models(sizes["window"], sizes["initial"]), []
    for family, mixer in MIXERS.items():
        masks = {name: fields for name, (fields, whole) in of.items() if fields and not whole}
        count = parameters(byte_model(shape, (mixer,), shape["mlp_dim"]))
        for name, (fields, whole) in of.items():
            if quick and name not in (FULL_NAME, SEPLLM):
                continue
            found.append(
                {
                    "label": f"{family}, {name}",
                    "family": family,
                    "name": name,
                    "mixers": [as_json(one) for one in pattern(mixer, shape["num_layers"], whole)],
                    "fields": fields,
                    **shape,
                    "learning_rate": 4e-3,
                    "seed": 0,
                    "parameters": count,
                    **({} if fields else {"masks": masks}),
                }
            )
    return found


def run(settings: dict[str, Any], folder: epath.Path, note, stop) -> dict[str, Any] | None:
    import dataclasses
    import itertools

    from deltaformer_jax.data import batches
    from deltaformer_jax.evaluate.by_position import evaluate_by_position
    from deltaformer_jax.model_parts import model_parts
    from deltaformer_jax.training.checkpoints.vocabulary import with_vocabulary
    from deltaformer_jax.training.loop import train

    trained, position, state = prepared(settings, folder, note)
    ending = train(trained, position, state, stop, quiet=True)
    if not ending.finished:
        return None
    corpus, length = trained.corpus, settings["sequence_length"]
    batch = dict(sequence_length=length, batch_size=settings["batch_size"])
    rows = list(itertools.islice(batches(corpus, "eval", **batch, seed=0), settings["measured_batches"]))

    def measured(parts):
        return evaluate_by_position(
            parts,
            trained.program.mesh,
            ending.state.params,
            rows,
            sequence_length=length,
            token_bytes=corpus.tokenizer.token_bytes,
        )

    sums, model, masked = measured(trained.program.parts), trained.config.model, {}
    for name, fields in settings.get("masks", {}).items():
        other = dataclasses.replace(trained.config, model=dataclasses.replace(model, **fields))
        parts = model_parts(with_vocabulary(other, corpus.tokenizer).model)
        masked[name] = measured(parts).report()["bits_per_byte"]
    windows = [model.window if isinstance(one, str) else 0 for one in settings["mixers"]]
    seen = [visible_share(rows, window, model.initial_tokens, model.separator_tokens) for window in windows]
    return {
        "bits": sums.report()["bits_per_byte"],
        "by_position": [[one["to"], one["bits_per_byte"]] for one in sums.by_position() if one["bytes"]],
        "share": float(np.mean(seen)),
        "masked": masked,
        "tokens": settings["steps"] * length * settings["batch_size"],
    }


def visible_share(rows: list[dict[str, np.ndarray]], window: int, initial: int, separators: tuple[int, ...]) -> float:
    """The tokens that each token sees, itself included, summed over all tokens and divided by those at or before it in
    its document."""
    from deltaformer_jax.evaluate.by_position import positions

    seen = causal = 0
    for row in rows:
        places, real = positions(row["segment_ids"]), row["segment_ids"] > 0
        causal += int((places + 1)[real].sum())
        ago = places.shape[1] - np.arange(places.shape[1])[None]  # tokens from each on, to the end of the row
        after = _until_the_end(row["segment_ids"], ago)
        lasts = (places < initial) | np.isin(row["tokens"], separators)
        each = after if not window else np.where(lasts, after, np.minimum(after, window))
        seen += int(each[real].sum())
    return seen / causal


def _until_the_end(segment_ids: np.ndarray, ago: np.ndarray) -> np.ndarray:
    """int [B, T]: how many tokens of its own document each token has at or after it."""
    ends = np.ones(segment_ids.shape, bool)
    ends[:, :-1] = segment_ids[:, 1:] != segment_ids[:, :-1]
    last = np.where(ends, ago, 0)
    return ago - np.maximum.accumulate(last[:, ::-1], axis=1)[:, ::-1] + 1


def rows(done: list[dict[str, Any]]) -> list[dict[str, Any]]:
    lines = []
    masked = {r["settings"]["family"]: r["result"]["masked"] for r in done if r["result"].get("masked")}
    for record in done:
        settings, result = record["settings"], record["result"]
        paper = PAPER.get(settings["name"]) if settings["family"] == "Transformer" else None
        lines.append(
            {
                "model": settings["family"],
                "sees": settings["name"],
                "bits a byte": f"{result['bits']:.3f}",
                f"from {settings['sequence_length'] // 2 + 1} on": f"{result['by_position'][-1][1]:.3f}",
                "full model behind this mask": _three(masked.get(settings["family"], {}).get(settings["name"])),
                "cache": f"{100 * result['share']:.1f} %",
                "paper: perplexity, cache": f"{paper[0]}, {paper[1]:g} %" if paper else "",
            }
        )
    return lines


def _three(bits: float | None) -> str:
    return "" if bits is None else f"{bits:.3f}"


def figure(done: list[dict[str, Any]]):
    picture = new_figure(15, 5)
    *by_position, cost = picture.subplots(1, 3)
    names = list(dict.fromkeys(record["settings"]["name"] for record in done))
    styles = line_styles(names, [FULL_NAME])
    masked = {r["settings"]["family"]: r["result"]["masked"] for r in done if r["result"].get("masked")}
    for record in done:
        settings, result = record["settings"], record["result"]
        style = styles[settings["name"]]
        panel = by_position[list(MIXERS).index(settings["family"])]
        places, bits = zip(*result["by_position"])
        panel.plot(places, bits, label=settings["name"], **style)
        marker = "o" if settings["family"] == "Transformer" else "s"
        cost.plot(100 * result["share"], result["bits"], marker, color=style["color"], markersize=8)
        behind = masked.get(settings["family"], {}).get(settings["name"])
        if behind is not None:
            cost.plot(100 * result["share"], behind, marker, color=style["color"], alpha=0.4, markersize=8)
    for panel, family in zip(by_position, MIXERS):
        panel.set_xscale("log", base=2)
        panel.set(xlabel="bytes of the document seen, up to", ylabel="bits a byte")
        if windows := [r["settings"]["fields"]["window"] for r in done if r["settings"]["fields"]]:
            reference(panel, windows[0], "window", upright=True)
        plain(panel, family)
    cost.set(xlabel="entries of the cache seen (%)", ylabel="bits a byte", xlim=(0, 105))
    plain(cost, "Transformer ●, DeltaFormer ■; pale: only masked")
    figure_legend(picture, *by_position)
    settings = done[0]["settings"]
    explain(
        picture,
        _finding(done),
        f"{settings['num_layers']} layers of width {settings['d_model']}, {settings['steps']} steps of "
        f"{settings['sequence_length'] * settings['batch_size']:,} bytes of Python's standard library, one seed; "
        "lower is better. Pale: the full model, measured behind another's mask.\nSepLLM (arXiv 2412.12094) has "
        "Pythia-160M, 64 tokens, and perplexities of LAMBADA; DeltaFormer is this library's question.",
    )
    return picture


def _finding(done: list[dict[str, Any]]) -> str:
    found = {(r["settings"]["family"], r["settings"]["name"]): r["result"] for r in done}
    parts = []
    for family in MIXERS:
        if (family, FULL_NAME) in found and (family, SEPLLM) in found:
            full, sep = found[family, FULL_NAME], found[family, SEPLLM]
            parts.append(f"{family} {sep['bits'] - full['bits']:+.3f} with {100 * sep['share']:.0f} % of the cache")
    return "SepLLM − full attention, bits a byte: " + (", ".join(parts) or "not both are done yet")


EXPERIMENT = Experiment(
    cells=cells,
    run=run,
    rows=rows,
    figure=figure,
    cost="twenty minutes of processor time, twelve models; --quick: a minute of processor time, four models",
)
