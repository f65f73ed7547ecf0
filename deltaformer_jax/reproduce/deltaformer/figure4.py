"""Figure 4: tracking 5 elements through 256 swaps, trained by a curriculum of lengths 32, 64, 128, 256, and directly.

The curriculum doubles the length when two evaluations in a row reach an accuracy of 0.99. The model is a DeltaFormer of
one layer with κ₁ = round, with and without a rotary embedding. It is then tested at 512 and 1024 swaps, without further
training. Source: Xu et al., DeltaFormer (NeurIPS 2025), section 4.1.
"""

from __future__ import annotations

from typing import Any

from deltaformer_jax.reproduce import train_task
from deltaformer_jax.reproduce.experiment import Experiment
from deltaformer_jax.reproduce.pictures import colours_of, new_figure

FULL = dict(
    elements=5,
    lengths=(32, 64, 128, 256),
    longer=(512, 1024),
    width=128,
    heads=4,
    steps=2000,
    direct_steps=1000,
    rows=64,
)
QUICK = dict(
    elements=5,
    lengths=(32, 64),
    longer=(128,),
    width=64,
    heads=4,
    steps=500,
    direct_steps=500,
    rows=64,
)


def cells(quick: bool, sizes: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    sizes = sizes or (QUICK if quick else FULL)
    task, width, heads = f"task:swap,elements={sizes['elements']}", sizes["width"], sizes["heads"]
    found = []
    for rope in (False, True):
        for curriculum in (True, False):
            family = f"{'curriculum' if curriculum else 'direct'}, {'RoPE' if rope else 'no RoPE'}"
            lengths = list(sizes["lengths"]) if curriculum else [sizes["lengths"][-1]]
            tests = {str(length): [task, length, sizes["rows"]] for length in (sizes["lengths"][-1], *sizes["longer"])}
            settings = train_task.settings_of(
                family,
                task,
                lengths,
                model={
                    "mixers": ["delta_former"],
                    "d_model": width,
                    "num_layers": 1,
                    "num_heads": heads,
                    "num_kv_heads": heads,
                    "head_dim": width // heads,
                    "tie_embeddings": False,
                    "rope_base": 10_000.0 if rope else 0.0,
                    "write_similarity": "round",
                    "write_key_norm": "off",
                    "chunk_size": 64,
                },
                learning_rate=1e-3,
                schedule="constant",
                steps=sizes["steps"] if curriculum else sizes["direct_steps"],
                batch_size=32,
                eval_every=20,
                eval_rows=64,
                target=0.99,
                patience=2,
                tests=tests,
            )
            found.append({**settings, "family": family})
    return found


def rows(done: list[dict[str, Any]]) -> list[dict[str, Any]]:
    lines = []
    for record in done:
        result, lengths = record["result"], record["settings"]["lengths"]
        solved = [f"{length}: {step or '–'}" for length, step in zip(lengths, result["solved_at"])]
        lines.append(
            {
                "training": record["settings"]["family"],
                "0.99 at step": ", ".join(solved),
                "steps": result["steps"],
                "tokens": f"{result['tokens']:,}",
                **{f"at {length}": f"{accuracy:.4f}" for length, accuracy in result["tests"].items()},
                "seconds": f"{record['seconds']:.0f}",
            }
        )
    return lines


def figure(done: list[dict[str, Any]]):
    picture = new_figure(12, 4.6)
    curves, lengths = picture.subplots(1, 2, width_ratios=(3, 2))
    colours = colours_of(done, "family")
    for record in done:
        family, batch = record["settings"]["family"], record["settings"]["batch_size"]
        tokens, last = [], (0, 0)
        for step, length, *_ in record["result"]["curve"]:
            last = (step, last[1] + (step - last[0]) * length * batch)
            tokens.append(last[1])
        scores = [point[2] for point in record["result"]["curve"]]
        curves.plot(tokens, scores, color=colours[family], label=family, linewidth=1.2)
        tests = record["result"]["tests"]
        lengths.plot([int(name) for name in tests], list(tests.values()), "o-", color=colours[family], label=family)
    for panel in (curves, lengths):
        panel.axhline(0.99, color="grey", linewidth=0.8, linestyle=":")
        panel.set(ylim=(0, 1.03), ylabel="accuracy on separately drawn examples")
        panel.legend(fontsize=8)
    curves.set(xlabel="tokens trained on", title="at the length being trained")
    lengths.set(xlabel="length (swaps)", xscale="log", title="after training")
    longest = done[0]["settings"]["lengths"][-1]
    picture.suptitle(f"which element is first? {longest} swaps, 1-layer DeltaFormer, κ₁ = round")
    return picture


EXPERIMENT = Experiment(
    cells=cells,
    run=train_task.run,
    rows=rows,
    figure=figure,
    cost=f"three to eleven minutes a run on one core, {len(cells(False))} runs; --quick: one to three minutes in all",
)
