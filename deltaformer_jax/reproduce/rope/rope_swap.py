"""Tracking swaps by the base of the rotary embedding: what DeltaFormer's write does below the bound of the base.

DeltaFormer compares rotated keys twice, when it writes and when it reads. A swap is right if the write deletes what the
latest swap of these positions has left, however far back it stands; below the bound of the base a like key may score
below others there. Runs with different bases go up the same curriculum of lengths as in `figure4`, and so do two whose
read is rotated and whose write is not (`model.write_rope_base = 0`). After training they are tested at longer lengths.
No paper has this experiment; the bound is that of Men et al., "Base of RoPE bounds context length", NeurIPS 2024, arXiv
2405.14591.
"""

from __future__ import annotations

from typing import Any

from deltaformer_jax.plot.style import explain, line_styles, plain, reference
from deltaformer_jax.reproduce import train_task
from deltaformer_jax.reproduce.experiment import Experiment
from deltaformer_jax.reproduce.pictures import figure_legend, new_figure, values_of
from deltaformer_jax.reproduce.rope.rope_retrieval import broken_at

# Family -> (rope_base, write_rope_base: −1 the same, 0 none).
MODELS = {
    "base 1e2": (1e2, -1.0),
    "base 1e3": (1e3, -1.0),
    "base 1e4": (1e4, -1.0),
    "base 1e5": (1e5, -1.0),
    "no rotary embedding": (0.0, -1.0),
    "read 1e2, write not rotated": (1e2, 0.0),
    "read 1e4, write not rotated": (1e4, 0.0),
}
# again: families that have a second run, with another seed; a difference of one run each would say little.
FULL = dict(
    models=tuple(MODELS),
    again=("base 1e2", "no rotary embedding", "read 1e2, write not rotated"),
    elements=5,
    lengths=(32, 64, 128),
    longer=(256, 512),
    width=64,
    heads=2,
    steps=500,
    rows=64,
)
QUICK = dict(
    models=("base 1e2", "read 1e2, write not rotated"),
    again=(),
    elements=4,
    lengths=(16, 32),
    longer=(64,),
    width=64,
    heads=2,
    steps=300,
    rows=64,
)


def cells(quick: bool, sizes: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    sizes = sizes or (QUICK if quick else FULL)
    runs = [(family, 0) for family in sizes["models"]] + [(family, 1) for family in sizes["again"]]
    return [_cell(sizes, family, seed, *MODELS[family]) for family, seed in runs]


def _cell(sizes: dict[str, Any], family: str, seed: int, base: float, write_base: float) -> dict[str, Any]:
    task, width, heads = f"task:swap,elements={sizes['elements']}", sizes["width"], sizes["heads"]
    settings = train_task.settings_of(
        f"{family}, seed {seed}" if seed else family,
        task,
        list(sizes["lengths"]),
        model={
            "mixers": ["delta_former"],
            "d_model": width,
            "num_layers": 1,
            "num_heads": heads,
            "num_kv_heads": heads,
            "head_dim": width // heads,
            "tie_embeddings": False,
            "rope_base": base,
            "write_rope_base": write_base,
            "write_similarity": "round",
            "write_key_norm": "off",
            "chunk_size": 64,
        },
        learning_rate=2e-3,
        schedule="constant",
        seed=seed,
        steps=sizes["steps"],
        batch_size=32,
        eval_every=20,
        eval_rows=64,
        target=0.99,
        patience=2,
        tests={str(n): [task, n, sizes["rows"]] for n in (sizes["lengths"][-1], *sizes["longer"])},
    )
    return {**settings, "family": family, "base": base, "elements": sizes["elements"]}


def rows(done: list[dict[str, Any]]) -> list[dict[str, Any]]:
    lines = []
    for record in done:
        settings, result = record["settings"], record["result"]
        at = broken_at(settings["base"], settings["model"]["head_dim"], max(map(int, settings["tests"])))
        lines.append(
            {
                "rotary embedding": settings["label"],
                "B below 0 from": at or "–",
                "0.99 at step": ", ".join(
                    f"{length}: {step or '–'}" for length, step in zip(settings["lengths"], result["solved_at"])
                ),
                **{f"at {length}": f"{accuracy:.3f}" for length, accuracy in result["tests"].items()},
                "seconds": f"{record['seconds']:.0f}",
            }
        )
    return lines


def figure(done: list[dict[str, Any]]):
    picture = new_figure(14.5, 5)
    curves, lengths = picture.subplots(1, 2)
    families = values_of(done, "family")
    styles = line_styles(list(MODELS), ["no rotary embedding"])
    named = set()
    for record in done:
        settings, result = record["settings"], record["result"]
        label, style = settings["family"], styles[settings["family"]]
        label = None if label in named else label
        named.add(settings["family"])
        steps, _, accuracies, _ = zip(*result["curve"])
        curves.plot(steps, accuracies, label=label, **style)
        tests = result["tests"]
        lengths.plot(range(len(tests)), list(tests.values()), marker="o", label=label, **style)
    settings = done[0]["settings"]
    guessing = 1 / settings["elements"]
    for panel in (curves, lengths):
        reference(panel, guessing, f"guessing: {guessing:.2f}")
        panel.set(ylim=(0, 1.05), ylabel="accuracy")
    reference(curves, settings["target"], f"{settings['target']:g}")
    curves.set(xlabel="training step", xlim=(0, None))
    plain(curves, "In training, at the length trained on")
    lengths.set_xticks(range(len(settings["tests"])), list(settings["tests"]))
    lengths.set_xlabel("swaps in a row")
    plain(lengths, "After training")
    figure_legend(picture, curves)
    explain(
        picture,
        _finding(done),
        f"One layer of DeltaFormer, κ₁ = round, {settings['model']['num_heads']} heads of width "
        f"{settings['model']['head_dim']}; each token swaps two of {settings['elements']} positions. Trained at "
        f"{', '.join(map(str, settings['lengths']))} swaps in turn, each until two evaluations in a row reach "
        f"{settings['target']:g}.\n" + _bound(done, families),
    )
    return picture


def _bound(done: list[dict[str, Any]], families: list[str]) -> str:
    at = {record["settings"]["family"]: record["settings"] for record in done}
    parts = []
    for family in families:
        settings = at[family]
        first = broken_at(settings["base"], settings["model"]["head_dim"], max(map(int, settings["tests"])))
        if first and settings["model"]["write_rope_base"] < 0:
            parts.append(f"{family} from distance {first} on")
    said = f"B is negative with {', '.join(parts)}. " if parts else ""
    return said + "No paper has this experiment."


def _finding(done: list[dict[str, Any]]) -> str:
    """Each run's accuracy at the longest length of the tests."""
    longest = list(done[0]["settings"]["tests"])[-1]
    best = sorted(done, key=lambda record: -record["result"]["tests"][longest])
    scores: dict[str, list[str]] = {}
    for record in best:
        scores.setdefault(record["settings"]["family"], []).append(f"{record['result']['tests'][longest]:.2f}")
    scores = [f"{family} {' and '.join(runs)}" for family, runs in scores.items()]
    return f"Accuracy at {longest} swaps by rotary embedding: {'; '.join(scores)}"


EXPERIMENT = Experiment(
    cells=cells,
    run=train_task.run,
    rows=rows,
    figure=figure,
    cost="about a minute a run on one core, 10 runs; --quick: a minute and a quarter",
)
