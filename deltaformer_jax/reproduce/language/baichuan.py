"""Baichuan-M1's attention, one part taken away at a time, as its Table 2 does at 1.5 billion parameters.

The full model alternates layers with a window and without one, the latter with few wide heads, shifts keys and values
by one token in every layer (its "convolution"), and has a rotary base of 1e6. Each other model differs in one thing,
and has as many parameters by the width of its feed-forward layers:

* narrow heads: those without a window as narrow as the others;
* 3 of 4 layers with a window, or none;
* no KV shifting;
* a rotary base of 1e4.

Measured twice: bits a byte of byte models of the standard library's text, and, in the place of the paper's needle in a
haystack, which models this small do not find, smaller models of the same pattern that learn induction: which word
followed an earlier one (`task:induction`), until two evaluations in a row reach 0.995.

Source: "Baichuan-M1", arXiv 2502.12671, Table 2.
"""

from __future__ import annotations

from typing import Any

from etils import epath

from deltaformer_jax.config import Mixer
from deltaformer_jax.plot.style import explain, line_styles, plain
from deltaformer_jax.reproduce import train_task
from deltaformer_jax.reproduce.experiment import Experiment
from deltaformer_jax.reproduce.language.byte_models import as_json, byte_model, matched, parameters, prepared
from deltaformer_jax.reproduce.pictures import figure_legend, name_rows, new_figure

FULL = dict(
    bytes=dict(d_model=128, num_layers=4, num_heads=4, head_dim=32, sequence_length=512, batch_size=4, steps=400),
    eval_batches=64,
    recall=dict(d_model=64, num_layers=4, num_heads=2, head_dim=32),
    words=(64, 24, 32),  # in all, in a row, tokens of a row
    steps=300,
    rows=64,
)
QUICK = dict(
    bytes=dict(d_model=32, num_layers=4, num_heads=2, head_dim=16, sequence_length=128, batch_size=4, steps=50),
    eval_batches=4,
    recall=dict(d_model=32, num_layers=4, num_heads=2, head_dim=16),
    words=(32, 16, 24),
    steps=75,
    rows=32,
)
WHOLE, UNSHIFTED = "full", "no KV shifting"


def patterns(sizes: dict[str, Any], length: int) -> dict[str, tuple[Mixer, ...]]:
    """Name -> the pattern of its layers, whose window is an eighth of `length` tokens."""
    heads, width = sizes["num_heads"], sizes["head_dim"]

    def layer(window: bool, wide: bool = True, shift: bool = True, base: float = 1e6) -> Mixer:
        shape = dict(num_heads=heads, num_kv_heads=heads // 2, head_dim=width)
        if window:
            shape["window"] = length // 8
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


def cells(quick: bool, sizes: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    sizes = sizes or (QUICK if quick else FULL)
    names = [name for name in patterns(sizes["bytes"], 8) if not quick or name in (WHOLE, UNSHIFTED)]
    texts = names[:1] if quick else names
    return [_recall(sizes, name) for name in names] + [_bytes(sizes, name) for name in texts]


def _bytes(sizes: dict[str, Any], name: str) -> dict[str, Any]:
    model = sizes["bytes"]
    of = patterns(model, model["sequence_length"])
    return {
        "label": f"{name}, bytes",
        "name": name,
        "kind": "bytes",
        **matched(model, of[name], parameters(byte_model(model, of[WHOLE], mlp_dim=0))),
        "eval_batches": sizes["eval_batches"],
    }


def _recall(sizes: dict[str, Any], name: str) -> dict[str, Any]:
    recall, (vocabulary, words, length) = sizes["recall"], sizes["words"]
    settings = train_task.settings_of(
        f"{name}, recall",
        f"task:induction,vocabulary={vocabulary},words={words},generator=strict,score=all",
        [length],
        model={
            **recall,
            "num_kv_heads": recall["num_heads"],
            "mixers": [as_json(mixer) for mixer in patterns(recall, length)[name]],
            "tie_embeddings": False,
            "chunk_size": 32,
        },
        learning_rate=5e-3,
        steps=sizes["steps"],
        batch_size=sizes["rows"],
        eval_every=25,
        eval_rows=256,
    )
    return {**settings, "name": name, "kind": "recall"}


def run(settings: dict[str, Any], folder: epath.Path, note, stop) -> dict[str, Any] | None:
    from deltaformer_jax.training.loop import train

    if settings["kind"] == "recall":
        return train_task.run(settings, folder, note, stop)
    run, position, state = prepared(settings, folder, note)
    if not train(run, position, state, stop, quiet=True).finished:
        return None
    last = [record for record in run.metrics.records if "eval_bits_per_byte" in record][-1]
    return {
        "bits": last["eval_bits_per_byte"],
        "tokens": settings["steps"] * settings["sequence_length"] * settings["batch_size"],
    }


def _by_name(done: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Name -> kind -> record."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for record in done:
        found.setdefault(record["settings"]["name"], {})[record["settings"]["kind"]] = record
    return found


def rows(done: list[dict[str, Any]]) -> list[dict[str, Any]]:
    lines = []
    for name, records in _by_name(done).items():
        line = {"model": name, "bits a byte": "", "recall": "", "at step 100": "", "steps": ""}
        if text := records.get("bytes"):
            line["bits a byte"] = f"{text['result']['bits']:.3f}"
        if recall := records.get("recall"):
            accuracy, steps = recall["result"]["accuracy"], recall["result"]["steps"]
            line |= {"recall": f"{accuracy:.3f}", "steps": f"{steps}{'' if accuracy >= 0.995 else ', not solved'}"}
            line["at step 100"] = f"{_at(recall, 100):.3f}"
        lines.append(line)
    return lines


def _at(recall: dict[str, Any], step: int) -> float:
    """The accuracy of the last evaluation up to `step`."""
    return [accuracy for at, _, accuracy, _ in recall["result"]["curve"] if at <= step][-1]


def figure(done: list[dict[str, Any]]):
    picture = new_figure(13, 5)
    recall, bits = picture.subplots(1, 2, width_ratios=(3, 2))
    found = _by_name(done)
    styles = line_styles(list(found), [UNSHIFTED] if UNSHIFTED in found else [])
    for place, (name, records) in enumerate(found.items()):
        if "recall" in records:
            steps, _, accuracies, _ = zip(*records["recall"]["result"]["curve"])
            recall.plot(steps, accuracies, label=name, **styles[name])
        if "bytes" in records:
            value = records["bytes"]["result"]["bits"]
            bits.barh(place, value, color=styles[name]["color"], alpha=0.5, height=0.7)
            bits.text(value, place, f" {value:.3f}", va="center", fontsize=8.5)
    recall.set(xlabel="training step", ylabel="accuracy", ylim=(-0.03, 1.05))
    name_rows(bits, list(found))
    bits.set(xlabel="evaluation (bits a byte), lower is better", xlim=(0, 1.25 * bits.get_xlim()[1]))
    plain(recall, "Induction: the word after an earlier one")
    plain(bits, "Byte models", "x")
    figure_legend(picture, recall)
    explain(
        picture,
        _finding(found),
        "Models of four layers, as many parameters each for the byte models; one seed. All recall models get the same "
        "rows.\nBaichuan-M1 (arXiv 2502.12671), Table 2, has 1.5 billion parameters and a needle in a haystack.",
    )
    return picture


def _finding(found: dict[str, dict[str, dict[str, Any]]]) -> str:
    steps = {name: of["recall"]["result"]["steps"] for name, of in found.items() if "recall" in of}
    if not steps:
        return "Baichuan-M1's attention without one of its parts"
    most = max(steps, key=steps.get)
    rest = f"; {WHOLE} {steps[WHOLE]}" if WHOLE in steps and most != WHOLE else ""
    return f"Latest to learn recall: {most}, after {steps[most]} steps{rest}"


EXPERIMENT = Experiment(
    cells=cells,
    run=run,
    rows=rows,
    figure=figure,
    cost="an hour on one busy core, twelve models; --quick: a minute of processor time, three models",
)
