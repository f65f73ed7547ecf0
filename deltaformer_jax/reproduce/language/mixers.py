"""Every mixer as a language model of the standard library's text: as many parameters and tokens, one seed and schedule.

Each model's feed-forward width is chosen, to within 2 features, so that it has as many parameters as DeltaFormer's
model. The score is bits per byte on the evaluation split. This table is not from a paper. It shows that every mixer
trains, and compares small models of Python code.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import jax
import numpy as np
from etils import epath

from deltaformer_jax.config import Config, DataConfig, Mixer, ModelConfig, OptimizerConfig, RunConfig
from deltaformer_jax.config.lines import lines
from deltaformer_jax.plot.style import explain, line_styles, plain
from deltaformer_jax.reproduce import unfinished
from deltaformer_jax.reproduce.experiment import Experiment
from deltaformer_jax.reproduce.pictures import figure_legend, listed, name_rows, new_figure

# Label -> the repeating pattern of mixers.
PATTERNS: dict[str, tuple[str | Mixer, ...]] = {
    "DeltaFormer": ("delta_former",),
    "DeltaFormer, gated": (Mixer("delta_former", output_gate="on", conv_size=4),),
    "softmax attention": ("softmax_attention",),
    "forgetting attention": (Mixer("softmax_attention", forget_gate=True),),
    "linear attention": ("linear_attention",),
    "retention": ("retention",),
    "gated linear attention": ("gated_linear_attention",),
    "DeltaNet": ("delta_net",),
    "Gated DeltaNet": ("gated_delta_net",),
    "Kimi Delta Attention": ("kimi_delta_attention",),
    "3 Gated DeltaNet + 1 softmax": ("gated_delta_net",) * 3 + ("softmax_attention",),
}

FULL = dict(d_model=128, num_layers=4, num_heads=4, head_dim=32, sequence_length=256, batch_size=8, steps=500)
QUICK = dict(d_model=64, num_layers=4, num_heads=2, head_dim=32, sequence_length=128, batch_size=8, steps=40)
# Left out of the quick form, most of whose time is compilation.
NOT_QUICK = (
    "DeltaFormer, gated",
    "forgetting attention",
    "retention",
    "gated linear attention",
    "Kimi Delta Attention",
)


def cells(quick: bool) -> list[dict[str, Any]]:
    sizes = QUICK if quick else FULL
    target = _parameters(_model(sizes, PATTERNS["DeltaFormer"], mlp_dim=0))
    found = []
    for label, pattern in PATTERNS.items():
        if quick and label in NOT_QUICK:
            continue
        width = _matching_width(sizes, pattern, target)
        found.append(
            {
                "label": label,
                "mixers": [_plain(mixer) for mixer in pattern],
                **sizes,
                "mlp_dim": width,
                "parameters": _parameters(_model(sizes, pattern, width)),
                "learning_rate": 4e-3,
                "seed": 0,
                "eval_batches": 4 if quick else 40,
            }
        )
    return found


def _plain(mixer: str | Mixer) -> Any:
    return mixer if isinstance(mixer, str) else [mixer.name, dict(mixer.overrides)]


def _mixer(plain: Any) -> str | Mixer:
    return plain if isinstance(plain, str) else Mixer(plain[0], **plain[1])


def _model(sizes: dict[str, Any], pattern: tuple, mlp_dim: int) -> ModelConfig:
    return ModelConfig(
        vocab_size=257,
        d_model=sizes["d_model"],
        num_layers=sizes["num_layers"],
        num_heads=sizes["num_heads"],
        num_kv_heads=sizes["num_heads"],
        head_dim=sizes["head_dim"],
        mlp_dim=mlp_dim,
        mixers=pattern,
        chunk_size=64,
    )


def _parameters(model: ModelConfig) -> int:
    from deltaformer_jax.model import num_parameters
    from deltaformer_jax.model_parts import model_parts

    return num_parameters(model_parts(model).params)


def _matching_width(sizes: dict[str, Any], pattern: tuple, target: int) -> int:
    """The feed-forward width, a multiple of 4, with the number of parameters nearest to `target`."""
    two = [_parameters(_model(sizes, pattern, width)) for width in (16, 32)]
    each = (two[1] - two[0]) / 16  # the count is linear in the width
    return max(4, 4 * round((16 + (target - two[0]) / each) / 4))


def run(settings: dict[str, Any], folder: epath.Path, note, stop) -> dict[str, Any] | None:
    from deltaformer_jax.training.loop import train
    from deltaformer_jax.training.setup import prepare

    unfinished.claim(folder)
    folder = folder / "run"
    steps = settings["steps"]
    config = Config(
        model=_model(settings, tuple(_mixer(mixer) for mixer in settings["mixers"]), settings["mlp_dim"]),
        data=DataConfig(sequence_length=settings["sequence_length"], batch_size=settings["batch_size"]),
        optimizer=OptimizerConfig(
            learning_rate=settings["learning_rate"], warmup_steps=max(1, steps // 12), decay_steps=steps
        ),
        run=RunConfig(
            steps=steps,
            seed=settings["seed"],
            log_every=max(1, steps // 50),
            eval_every=max(1, steps // 4),
            eval_batches=settings["eval_batches"],
            checkpoint_every=max(1, steps // 4),
            keep_checkpoints=1,
            sample_prompt="",
        ),
    )
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=0))
    # Only one device is used, since the models and the batches are small.
    if not train(*prepare(config, folder, note, jax.devices()[:1]), stop, quiet=True).finished:
        return None
    records = [json.loads(line) for line in lines((folder / "metrics.jsonl").read_text())]
    losses = [(record["step"], record["loss"]) for record in records if "loss" in record]
    scores = [(record["step"], record["eval_bits_per_byte"]) for record in records if "eval_bits_per_byte" in record]
    speeds = [record["tokens_per_second"] for record in records if "tokens_per_second" in record]
    return {
        "eval_bits_per_byte": scores[-1][1],
        "tokens": steps * settings["sequence_length"] * settings["batch_size"],
        "tokens_per_second": float(np.median(speeds)),
        "losses": losses,
        "evaluations": scores,
    }


def rows(done: list[dict[str, Any]]) -> list[dict[str, Any]]:
    best_first = sorted(done, key=lambda record: record["result"]["eval_bits_per_byte"])
    return [
        {
            "mixer": record["settings"]["label"],
            "bits per byte": f"{record['result']['eval_bits_per_byte']:.3f}",
            "parameters": f"{record['settings']['parameters']:,}",
            "feed-forward width": record["settings"]["mlp_dim"],
            "tokens": f"{record['result']['tokens']:,}",
            "tokens a second": f"{record['result']['tokens_per_second']:,.0f}",
        }
        for record in best_first
    ]


def figure(done: list[dict[str, Any]]):
    picture = new_figure(14, 5)
    curves, points = picture.subplots(1, 2, width_ratios=(3, 2))
    scores = {record["settings"]["label"]: record["result"]["eval_bits_per_byte"] for record in done}
    best = sorted(done, key=lambda record: record["result"]["eval_bits_per_byte"])
    styles = line_styles([record["settings"]["label"] for record in done])
    for place, record in enumerate(best):
        label, (steps, losses) = record["settings"]["label"], np.array(record["result"]["losses"]).T
        curves.plot(steps, losses / np.log(2), label=label, **styles[label])
        points.plot(scores[label], place, "o", color=styles[label]["color"], markersize=8)
        points.text(
            1.02, place, f"{scores[label]:.3f}", transform=points.get_yaxis_transform(), va="center", fontsize=9
        )
    curves.set(xlabel="training step", ylabel="training loss (bits per byte)")
    curves.set_ylim(top=min(curves.get_ylim()[1], 5.5))
    plain(curves, "In training")
    name_rows(points, [record["settings"]["label"] for record in best])
    points.set_xlabel("evaluation (bits per byte), lower is better")
    plain(points, "After the last step")
    figure_legend(picture, curves)
    settings, tokens = done[0]["settings"], done[0]["result"]["tokens"]
    first, last = best[0]["settings"]["label"], best[-1]["settings"]["label"]
    between = [
        f"{name} {scores[name]:.3f}"
        for name in ("DeltaFormer", "softmax attention")
        if name in scores.keys() - {first, last}
    ]
    explain(
        picture,
        f"With equal parameters, mixers reach {scores[first]:.3f} ({first}) to {scores[last]:.3f} ({last}) bits per "
        "byte" + (f"; {listed(between)}" if between else ""),
        f"{settings['num_layers']} layers of width {settings['d_model']}, about {settings['parameters']:,} parameters, "
        f"{tokens:,} tokens of the Python standard library. No paper has this table.\n"
        "One learning rate for all and one seed: the order of mixers that are close is not settled by it.",
    )
    return picture


EXPERIMENT = Experiment(
    cells=cells,
    run=run,
    rows=rows,
    figure=figure,
    cost="about two and a half minutes a mixer on two cores; --quick: a minute and a half, six of them",
)
