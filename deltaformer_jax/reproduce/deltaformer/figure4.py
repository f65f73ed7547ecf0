"""Figure 4: tracking 5 elements through 256 swaps, trained by a curriculum of lengths 32, 64, 128, 256, and directly.

The curriculum doubles the length when two evaluations in a row reach an accuracy of 0.99. The model is a DeltaFormer of
one layer with κ₁ = round, with and without a rotary embedding. It is then tested at 512 and 1024 swaps, without further
training. Source: Xu et al., DeltaFormer (NeurIPS 2025), section 4.1.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from deltaformer_jax.plot.style import explain, line_styles, plain, reference
from deltaformer_jax.reproduce import train_task
from deltaformer_jax.reproduce.experiment import Experiment
from deltaformer_jax.reproduce.pictures import figure_legend, listed, new_figure, values_of

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
    from matplotlib.ticker import EngFormatter, LogLocator

    picture = new_figure(14.5, 5)
    curves, lengths = picture.subplots(1, 2, width_ratios=(1, 1))
    styles = line_styles(values_of(done, "family"))
    for place, record in enumerate(done):
        settings, result = record["settings"], record["result"]
        tokens, last = [], (0, 0)
        for step, length, *_ in result["curve"]:
            last = (step, last[1] + (step - last[0]) * length * settings["batch_size"])
            tokens.append(last[1])
        scores = [point[2] for point in result["curve"]]
        style = styles[settings["family"]]
        curves.plot(tokens, scores, label=settings["family"], **style)
        steps = [point[0] for point in result["curve"]]
        ends = [(tokens[steps.index(step)], n) for step, n in zip(result["solved_at"], settings["lengths"]) if step]
        for end, length in ends:
            at = (end, 1.03 + 0.03 * place)
            curves.text(*at, str(length), color=style["color"], fontsize=8, ha="center", va="bottom")
            curves.plot([end] * 2, [at[1], 1.0], color=style["color"], linewidth=0.7, linestyle=":")
        tests = list(result["tests"].values())
        places = np.arange(len(tests)) + 0.22 * (place - 1.5)
        lengths.bar(places, tests, 0.2, color=style["color"], alpha=0.6)
        for at, accuracy in zip(places, tests):
            lengths.text(at, accuracy + 0.01, f"{accuracy:.3f}", ha="center", fontsize=7)
    settings = done[0]["settings"]
    target, longest = settings["target"], settings["lengths"][-1]
    guessing = 1 / int(settings["task"].split("=")[1])
    for panel in (curves, lengths):
        reference(panel, guessing, f"guessing: {guessing:.2f}")
        panel.set(ylim=(0, 1.2), ylabel="evaluation accuracy", yticks=np.linspace(0, 1, 6))
    reference(curves, target, f"{target:g}")
    curves.set(xlabel="tokens trained on", xscale="log")
    curves.xaxis.set_major_formatter(EngFormatter(sep=" "))
    curves.xaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    curves.xaxis.set_minor_formatter(EngFormatter(sep=" "))
    plain(curves, f"In training, at the length trained on; a number: this length has reached {target:g}")
    lengths.set_xlabel("swaps in a row")
    lengths.set_xticks(range(len(settings["tests"])), [f"{int(length):,}" for length in settings["tests"]])
    plain(lengths, f"After training at up to {longest} swaps", "y")
    figure_legend(picture, curves)
    explain(
        picture,
        _finding(done),
        "The paper's claim (Figure 4): trained at 256 directly, convergence is very slow; a curriculum that doubles "
        "the length whenever the accuracy reaches 0.99 needs less compute. Without RoPE, direct training stays random "
        "and the curriculum reaches 100 %.\n"
        f"One layer of DeltaFormer, κ₁ = round, width {settings['model']['d_model']}; each token swaps two of "
        f"{round(1 / guessing)} positions. A length has reached {target:g} when {settings['patience']} evaluations in "
        "a row do.",
    )
    return picture


def _finding(done: list[dict[str, Any]]) -> str:
    """What each way of training took to solve its last length."""
    target, longest = done[0]["settings"]["target"], done[0]["settings"]["lengths"][-1]
    parts = []
    for way, said in (("curriculum", "by a curriculum"), ("direct", f"at {longest} directly")):
        took = []
        for family, result in ((record["settings"]["family"], record["result"]) for record in done):
            if family.startswith(way):
                least = "" if result["solved_at"][-1] else "more than "
                rope = "without RoPE" if "no RoPE" in family else "with RoPE"
                millions = result["tokens"] / 1e6
                took.append(f"{least}{millions:.{1 if millions >= 1 else 2}f} M {rope}")
        parts += [f"{said} {listed(took)}"] if took else []
    return f"Tokens it takes to reach {target:g} at {longest} swaps: " + "; ".join(parts)


EXPERIMENT = Experiment(
    cells=cells,
    run=train_task.run,
    rows=rows,
    figure=figure,
    cost=f"three to eleven minutes a run on one core, {len(cells(False))} runs; --quick: one to three minutes in all",
)
