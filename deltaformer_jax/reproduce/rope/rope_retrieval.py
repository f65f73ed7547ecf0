"""Recall at a distance, and bits per byte, by the base of the rotary embedding: what a base below the bound costs.

One layer of softmax attention with KV shifting, of one head, learns to recall the value of a key that was seen up to
512 tokens before (`tasks.DistantRecall`). Its accuracy is measured by quarter of the distance. Beside it small byte
models with the same bases. The paper's claim: below the bound perplexity stays and retrieval is lost. It shows it with
models of 7B and 2B parameters.
Source: Men et al., "Base of RoPE bounds context length", NeurIPS 2024, arXiv 2405.14591.
"""

from __future__ import annotations

from typing import Any

from etils import epath

from deltaformer_jax.config.remarks.rotary_bound import first_negative, frequencies
from deltaformer_jax.plot.style import explain, line_styles, plain, reference
from deltaformer_jax.reproduce import train_task
from deltaformer_jax.reproduce.experiment import Experiment
from deltaformer_jax.reproduce.language import mixers
from deltaformer_jax.reproduce.pictures import figure_legend, name_rows, new_figure, values_of

BASES = (10.0, 100.0, 1e3, 1e4, 1e5, 0.0)  # 0: no rotary embedding
WORDS = dict(keys=32, values=32, fillers=32)
# stages: (T, pairs, rows a step, steps). All bases get the same rows: a stage ends after its steps, whatever is learnt.
FULL = dict(
    bases=BASES,
    recall=dict(width=64, queries=8, stages=((64, 16, 64), (128, 16, 32), (256, 16, 16), (512, 16, 8)), steps=400),
    stage_steps=50,
    rate=5e-3,
    eval_every=25,
    eval_rows=64,
    test_rows=256,
    bytes=dict(d_model=128, num_layers=2, num_heads=2, head_dim=64, sequence_length=512, batch_size=8, steps=150),
    eval_batches=8,
)
QUICK = dict(
    bases=(10.0, 1e4),
    recall=dict(width=64, queries=8, stages=((64, 16, 32), (128, 16, 16)), steps=200),
    stage_steps=50,
    rate=5e-3,
    eval_every=25,
    eval_rows=64,
    test_rows=128,
    bytes=dict(d_model=64, num_layers=2, num_heads=1, head_dim=64, sequence_length=128, batch_size=8, steps=30),
    eval_batches=4,
)


def name_of(base: float) -> str:
    return f"base {base:.0e}".replace("e+0", "e") if base else "no rotary embedding"


def cells(quick: bool, sizes: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    sizes = sizes or (QUICK if quick else FULL)
    return [_recall(sizes, base) for base in sizes["bases"]] + [_bytes(sizes, base) for base in sizes["bases"]]


def _recall(sizes: dict[str, Any], base: float) -> dict[str, Any]:
    recall = sizes["recall"]
    width, stages = recall["width"], recall["stages"]
    words = ",".join(f"{name}={number}" for name, number in WORDS.items())
    task = lambda pairs: f"task:distant_recall,pairs={pairs},queries={recall['queries']},{words}"
    longest, pairs, _ = stages[-1]
    quarter = longest // 4
    settings = train_task.settings_of(
        f"recall, {name_of(base)}",
        [task(number) for _, number, _ in stages],
        [length for length, *_ in stages],
        model={
            "mixers": ["softmax_attention"],
            "d_model": width,
            "num_layers": 1,
            "num_heads": 1,
            "num_kv_heads": 1,
            "head_dim": width,
            "tie_embeddings": False,
            "rope_base": base,
            "kv_shift": True,
            "chunk_size": 64,
        },
        learning_rate=sizes["rate"],
        steps=recall["steps"],
        batch_size=[rows for *_, rows in stages],
        eval_every=sizes["eval_every"],
        eval_rows=sizes["eval_rows"],
        # Every stage but the last ends after stage_steps, and the last one with the steps, since no accuracy is 2.
        target=[0.0] * (len(stages) - 1) + [2.0],
        patience=sizes["stage_steps"] // sizes["eval_every"],
        tests={
            f"{first + 1} to {first + quarter}": [
                f"{task(pairs)},nearest={first + 1},farthest={first + quarter}",
                longest,
                sizes["test_rows"],
            ]
            for first in range(0, longest, quarter)
        },
    )
    return {**settings, "kind": "recall", "base": base}


def _bytes(sizes: dict[str, Any], base: float) -> dict[str, Any]:
    return {
        "label": f"bytes, {name_of(base)}",
        "kind": "bytes",
        "base": base,
        "mixers": [["softmax_attention", {"rope_base": base}]],
        **sizes["bytes"],
        "mlp_dim": 0,
        "learning_rate": 4e-3,
        "seed": 0,
        "eval_batches": sizes["eval_batches"],
    }


def run(settings: dict[str, Any], folder: epath.Path, note, stop) -> dict[str, Any] | None:
    return (train_task.run if settings["kind"] == "recall" else mixers.run)(settings, folder, note, stop)


def _by_base(done: list[dict[str, Any]]) -> dict[float, dict[str, dict[str, Any]]]:
    """Base -> kind -> record."""
    found: dict[float, dict[str, dict[str, Any]]] = {}
    for record in done:
        settings = record["settings"]
        found.setdefault(settings["base"], {})[settings["kind"]] = record
    return found


def broken_at(base: float, width: int, longest: int) -> int | None:
    """The first distance up to `longest` at which B is negative with this base; None without one or a base."""
    return first_negative(frequencies(base, width), longest) if base else None


def rows(done: list[dict[str, Any]]) -> list[dict[str, Any]]:
    tests = dict.fromkeys(test for record in done for test in record["settings"].get("tests", ()))
    lines = []
    for base, records in _by_base(done).items():
        line = {"rotary embedding": name_of(base), **dict.fromkeys(tests, ""), "bits per byte": "", "seconds": ""}
        if recall := records.get("recall"):
            line |= {test: f"{accuracy:.3f}" for test, accuracy in recall["result"]["tests"].items()}
        if text := records.get("bytes"):
            line["bits per byte"] = f"{text['result']['eval_bits_per_byte']:.3f}"
        line["seconds"] = f"{sum(record['seconds'] for record in records.values()):.0f}"
        lines.append(line)
    return lines


def figure(done: list[dict[str, Any]]):
    picture = new_figure(15, 5)
    by_distance, training, text = picture.subplots(1, 3, width_ratios=(5, 4, 4))
    recalls = [record for record in done if record["settings"]["kind"] == "recall"]
    texts = [record for record in done if record["settings"]["kind"] == "bytes"]
    names = [name_of(base) for base in values_of(done, "base")]
    styles = line_styles(names, [name_of(0.0)])
    for record in recalls:
        name, tests = name_of(record["settings"]["base"]), record["result"]["tests"]
        by_distance.plot(range(len(tests)), list(tests.values()), marker="o", label=name, **styles[name])
        steps, _, accuracies, _ = zip(*record["result"]["curve"])
        training.plot(steps, accuracies, label=name, **styles[name])
    for place, record in enumerate(texts):
        bits = record["result"]["eval_bits_per_byte"]
        text.barh(place, bits, color=styles[name_of(record["settings"]["base"])]["color"], alpha=0.5, height=0.7)
        text.text(bits, place, f" {bits:.3f}", va="center", fontsize=8.5)
    name_rows(text, [name_of(record["settings"]["base"]) for record in texts])
    text.set(xlabel="evaluation (bits per byte), lower is better", xlim=(0, 6))
    plain(text, "Byte models with the same bases", "x")
    for axes in (by_distance, training):
        axes.set(ylim=(-0.03, 1.05), ylabel="accuracy")
        if recalls:
            reference(axes, 1 / WORDS["values"], f"guessing: {1 / WORDS['values']:.2f}")
    if recalls:
        tests = list(recalls[0]["result"]["tests"])
        by_distance.set_xticks(range(len(tests)), tests)
    by_distance.set_xlabel("distance of key and question, in tokens")
    training.set_xlabel("training step")
    plain(by_distance, "Recall by distance, after training")
    plain(training, "Recall in training, of rows that grow longer")
    if recalls:
        figure_legend(picture, by_distance, training)
    explain(
        picture,
        _finding(recalls, texts),
        "The paper's claim (arXiv 2405.14591): with a base below the bound of its context, a model keeps its "
        "perplexity and loses retrieval. It shows it with models of 7B and 2B parameters; these sizes are not the "
        "paper's.\n"
        "One layer of softmax attention with KV shifting, one head of width 64. Rows hold 16 pairs of a key and a "
        "value among filler words, and end with 8 of the keys. " + _bound(recalls),
    )
    return picture


def _bound(recalls: list[dict[str, Any]]) -> str:
    """The first distance at which each base breaks the bound."""
    parts = []
    for record in recalls:
        settings = record["settings"]
        at = broken_at(settings["base"], settings["model"]["head_dim"], settings["lengths"][-1])
        parts += [f"{name_of(settings['base'])} from {at}"] if at else []
    return f"B is negative with {', '.join(parts)}." if parts else ""


def _finding(recalls: list[dict[str, Any]], texts: list[dict[str, Any]]) -> str:
    """The accuracy at the farthest distances by base, and how far the bits per byte are apart."""
    if not recalls:
        return "Which base does recall at a distance need, and which does a byte model need?"
    farthest = list(recalls[0]["result"]["tests"])[-1]
    scores = [f"{name_of(r['settings']['base'])} {r['result']['tests'][farthest]:.2f}" for r in recalls]
    first = f"Recall of a key {farthest} tokens before: {', '.join(scores)}"
    bits = [record["result"]["eval_bits_per_byte"] for record in texts if record["settings"]["base"]]
    if len(bits) < 2:
        return first
    return f"{first}; with these bases bits per byte differ by {max(bits) - min(bits):.3f}"


EXPERIMENT = Experiment(
    cells=cells,
    run=run,
    rows=rows,
    figure=figure,
    cost="one to three minutes a run on one core, 12 runs; --quick: a minute and a quarter",
)
