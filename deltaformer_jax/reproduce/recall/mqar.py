"""Multi-query associative recall (MQAR) at the four usual sizes, with 256 and 8,192 words, ten mixers in two layers.

For each number of words a mixer has one run. It begins with rows of 16 tokens and proceeds to a longer size when the
one before is learnt; at the end all four sizes are tested. The source has 8,192 words and one run per size; FULL says
why this differs.

Source: Arora et al., "Zoology: measuring and improving recall in efficient language models", 2023.
"""

from __future__ import annotations

from typing import Any

from deltaformer_jax.plot.style import explain
from deltaformer_jax.reproduce import train_task
from deltaformer_jax.reproduce.experiment import Experiment
from deltaformer_jax.reproduce.pictures import new_figure, values_of
from deltaformer_jax.tasks import read_spec

# Label -> the fields that differ from the defaults. Attention without convolutions or KV shifting needs two layers to
# combine a key with the value after it. The delta-rule mixers have short convolutions by default; gated linear
# attention gets them here, since the source gives them to every mixer.
MIXERS = {
    "DeltaFormer": {"mixers": ["delta_former"]},
    "DeltaFormer, KV shifting": {"mixers": ["delta_former"], "kv_shift": True},
    "softmax attention": {"mixers": ["softmax_attention"]},
    "forgetting attention": {"mixers": ["softmax_attention"], "forget_gate": True},
    "linear attention": {"mixers": ["linear_attention"]},
    "retention": {"mixers": ["retention"]},
    "gated linear attention": {"mixers": ["gated_linear_attention"], "conv_size": 4},
    "DeltaNet": {"mixers": ["delta_net"]},
    "Gated DeltaNet": {"mixers": ["gated_delta_net"]},
    "Kimi Delta Attention": {"mixers": ["kimi_delta_attention"]},
}
# Learning rates: the better of 3e-3 and 1e-2 after 240 steps of the first stage (rows of 16 tokens); for Gated DeltaNet
# 5e-3, which was better than both. docs/results/mqar.md has the accuracies.
RATES = {
    "DeltaFormer": 3e-3,
    "DeltaFormer, KV shifting": 1e-2,
    "softmax attention": 3e-3,
    "forgetting attention": 3e-3,
    "linear attention": 3e-3,
    "retention": 3e-3,
    "gated linear attention": 1e-2,
    "DeltaNet": 1e-2,
    "Gated DeltaNet": 5e-3,
    "Kimi Delta Attention": 3e-3,
}
# Final number of words -> the stages of the run, each (words, T, pairs, rows per step, rows per evaluation, the
# accuracy at which the next stage begins). Why there are stages:
# * Rows of 64 tokens alone teach little, since only 4 of the 64 tokens are asked for. Mixers with an output gate learnt
#   nothing from them in 800 steps.
# * With 8,192 words each word is too rare at the beginning. Attention had not learnt to find a key's neighbour after
#   500 steps; with 256 words it has after 225 steps, and does not forget it afterwards.
# * The source trains 64 epochs of 100,000 rows, hours per run on a CPU. Here training stops when a stage is learnt.
FULL = dict(
    stages={
        256: (
            (256, 16, 4, 128, 256, 0.9),
            (256, 64, 4, 64, 128, 0.95),
            (256, 128, 8, 32, 64, 0.95),
            (256, 256, 16, 16, 32, 0.95),
            (256, 512, 64, 8, 16, 0.99),
        ),
        8192: (
            (256, 16, 4, 128, 256, 0.9),
            (1024, 16, 4, 128, 256, 0.9),
            (8192, 16, 4, 128, 256, 0.9),
            (8192, 64, 4, 64, 128, 0.95),
            (8192, 128, 8, 32, 64, 0.95),
            (8192, 256, 16, 16, 32, 0.95),
            (8192, 512, 64, 8, 16, 0.99),
        ),
    },
    sizes=((64, 4), (128, 8), (256, 16), (512, 64)),
    test_rows=256,
    width=64,
    heads=1,
    steps=1000,
    plateau=(12, 0.01),
    mixers=tuple(MIXERS),
)
QUICK = dict(
    stages={32: ((32, 16, 4, 128, 128, 0.99),)},
    sizes=((16, 4),),
    test_rows=128,
    width=32,
    heads=1,
    steps=300,
    plateau=None,
    mixers=("DeltaFormer, KV shifting", "softmax attention", "linear attention", "DeltaNet"),
)


def cells(quick: bool, sizes: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    sizes = sizes or (QUICK if quick else FULL)
    width, heads, found = sizes["width"], sizes["heads"], []
    task = lambda words, pairs: f"task:mqar,vocabulary={words},pairs={pairs}"
    for vocabulary, stages in sizes["stages"].items():
        words, lengths, pairs, rows_a_step, rows_asked, targets = (list(column) for column in zip(*stages))
        for name in sizes["mixers"]:
            settings = train_task.settings_of(
                f"{name}, {vocabulary} words",
                list(map(task, words, pairs)),
                lengths,
                model={
                    "d_model": width,
                    "num_layers": 2,
                    "num_heads": heads,
                    "num_kv_heads": heads,
                    "head_dim": width // heads,
                    "tie_embeddings": False,
                    "chunk_size": min(64, max(lengths)),
                    **MIXERS[name],
                },
                learning_rate=RATES[name],
                steps=sizes["steps"],
                batch_size=rows_a_step,
                eval_rows=rows_asked,
                eval_every=25,
                target=targets,
                patience=1,
                plateau=sizes["plateau"],
                tests={
                    f"T = {length}, {number} pairs": [task(vocabulary, number), length, sizes["test_rows"]]
                    for length, number in sizes["sizes"]
                },
            )
            found.append({**settings, "family": name, "vocabulary": vocabulary})
    return found


def rows(done: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "mixer": record["settings"]["family"],
            "words": f"{record['settings']['vocabulary']:,}",
            **{size: f"{accuracy:.4f}" for size, accuracy in record["result"]["tests"].items()},
            "rate": f"{record['settings']['optimizer']['learning_rate']:g}",
            "left at step": ", ".join(
                f"{length} ({read_spec(task)[1]['vocabulary']:,}): {step or '–'}"
                for task, length, step in zip(
                    record["settings"]["task"], record["settings"]["lengths"], record["result"]["solved_at"]
                )
            ),
            "steps": record["result"]["steps"],
            "parameters": f"{record['result']['parameters']:,}",
            "seconds": f"{record['seconds']:.0f}",
        }
        for record in done
    ]


def figure(done: list[dict[str, Any]]):
    """A table of accuracies for each vocabulary, with a shade and a number for each mixer and size."""
    vocabularies, sizes = values_of(done, "vocabulary"), list(done[0]["settings"]["tests"])
    families = values_of(done, "family")
    picture = new_figure(
        4.6 + 2 * len(vocabularies) + 1.05 * len(sizes) * len(vocabularies), 2.2 + 0.32 * len(families)
    )
    panels = picture.subplots(1, len(vocabularies), squeeze=False)[0]
    for panel, vocabulary in zip(panels, vocabularies):
        here = [record for record in done if record["settings"]["vocabulary"] == vocabulary]
        here = sorted(here, key=lambda record: -sum(record["result"]["tests"].values()))
        scores = [[record["result"]["tests"][size] for size in sizes] for record in here]
        panel.imshow(scores, cmap="cividis", vmin=0, vmax=1, aspect="auto")
        for row, record in enumerate(here):
            for column, score in enumerate(scores[row]):
                colour = "black" if score > 0.5 else "white"
                panel.text(column, row, f"{score:.3f}", ha="center", va="center", fontsize=9, color=colour)
            panel.text(len(sizes) - 0.4, row, _how_far(record), va="center", fontsize=8.5)
        panel.set_yticks(range(len(here)), [record["settings"]["family"] for record in here], fontsize=9)
        panel.set_xticks(range(len(sizes)), [size.replace(", ", "\n") for size in sizes], fontsize=9)
        panel.tick_params(length=0)
        panel.set_title(f"{vocabulary:,} words", loc="left", fontsize=10)
    settings = done[0]["settings"]
    explain(
        picture,
        _finding(done),
        f"Accuracy after training of {settings['model']['num_layers']} layers of width "
        f"{settings['model']['d_model']}. Rows of T tokens hold the pairs; the values of some keys are asked for.\n"
        f"Training goes from short rows to long ones; beside each row: how far it came in at most "
        f"{settings['steps']:,} steps. No paper of DeltaFormer has this table.",
    )
    return picture


def _how_far(record: dict[str, Any]) -> str:
    """The step at which the last length was learnt, or the length that was not."""
    settings, solved = record["settings"], record["result"]["solved_at"]
    if solved[-1]:
        return f"all in {solved[-1]:,} steps"
    stage = solved.index(None)
    words = read_spec(settings["task"][stage])[1]["vocabulary"]
    return f"ended at T = {settings['lengths'][stage]}" + (
        f" ({words:,} words)" if words != settings["vocabulary"] else ""
    )


def _finding(done: list[dict[str, Any]]) -> str:
    """Who learns every size in the fewest steps, for each number of words."""
    parts = []
    for vocabulary in values_of(done, "vocabulary"):
        here = [record for record in done if record["settings"]["vocabulary"] == vocabulary]
        solved = [record for record in here if record["result"]["solved_at"][-1]]
        words = f"with {vocabulary:,} words"
        if not solved:
            parts.append(f"{words} no mixer here learns every size")
            continue
        first = min(solved, key=lambda record: record["result"]["solved_at"][-1])
        name, step = first["settings"]["family"].replace(", ", " with "), first["result"]["solved_at"][-1]
        parts.append(
            f"{words} {len(solved)} of {len(here)} mixers learn every size, {name} first ({step:,} steps)"
            if len(solved) > 1
            else f"{words} only {name} of {len(here)} mixers learns every size ({step:,} steps)"
        )
    return "Associative recall: " + "; ".join(parts)


EXPERIMENT = Experiment(
    cells=cells,
    run=train_task.run,
    rows=rows,
    figure=figure,
    cost=f"one to eleven minutes a run on one core, {len(cells(False))} runs; --quick: a minute and a half in all",
)
