"""Byte models of the standard library's text that experiments compare: as many parameters, one schedule, one device.

Settings of a cell, as plain JSON: mixers (the repeating pattern), d_model, num_layers, num_heads, head_dim, mlp_dim,
sequence_length, batch_size, steps, learning_rate, seed, eval_batches and, where they are not the usual ones, rope_base
and `fields`, others of ModelConfig.
"""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import jax
import numpy as np
from etils import epath

from deltaformer_jax.config import (
    Config,
    DataConfig,
    Mixer,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    RunConfig,
)
from deltaformer_jax.reproduce import unfinished
from deltaformer_jax.reproduce.stages import mixer_of


def as_json(mixer: str | Mixer) -> Any:
    """An entry of a pattern of mixers as plain JSON."""
    return mixer if isinstance(mixer, str) else [mixer.name, dict(mixer.overrides)]


def byte_model(sizes: dict[str, Any], pattern: tuple, mlp_dim: int, **fields: Any) -> ModelConfig:
    """The model of a pattern of mixers. sizes: d_model, num_layers, num_heads and head_dim."""
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
        **fields,
    )


def parameters(model: ModelConfig) -> int:
    from deltaformer_jax.model import num_parameters
    from deltaformer_jax.model_parts import model_parts

    return num_parameters(model_parts(model).params)


def matching_width(sizes: dict[str, Any], pattern: tuple, target: int) -> int:
    """The feed-forward width, a multiple of 4, with the number of parameters nearest to `target`."""
    two = [parameters(byte_model(sizes, pattern, width)) for width in (16, 32)]
    each = (two[1] - two[0]) / 16  # the count is linear in the width
    return max(4, 4 * round((16 + (target - two[0]) / each) / 4))


def matched(sizes: dict[str, Any], pattern: tuple, target: int, seed: int = 0) -> dict[str, Any]:
    """The settings that every cell has: `sizes`, the pattern, and the feed-forward width for `target` parameters."""
    width = matching_width(sizes, pattern, target)
    return {
        "mixers": list(map(as_json, pattern)),
        **sizes,
        "mlp_dim": width,
        "parameters": parameters(byte_model(sizes, pattern, width)),
        "learning_rate": 4e-3,
        "seed": seed,
    }


def prepared(
    settings: dict[str, Any],
    folder: epath.Path,
    note,
    objective: ObjectiveConfig | None = None,
    path: str = "",
    checkpoints: int = 1,
) -> Any:
    """The training run of a cell in folder/run, new or as it was left (`training.setup.Prepared`).

    path: of the corpus, by default the standard library's text. checkpoints: how many are kept of the four.
    """
    from deltaformer_jax.training.setup import prepare

    unfinished.claim(folder)
    steps = settings["steps"]
    pattern, fields = tuple(map(mixer_of, settings["mixers"])), settings.get("fields", {})
    model = byte_model(settings, pattern, settings["mlp_dim"], **fields)
    if "rope_base" in settings:
        model.rope_base = settings["rope_base"]
    config = Config(
        model=dataclasses.replace(model, vocab_size=0),
        data=DataConfig(path=path, sequence_length=settings["sequence_length"], batch_size=settings["batch_size"]),
        objective=objective or ObjectiveConfig(),
        optimizer=OptimizerConfig(
            learning_rate=settings["learning_rate"],
            warmup_steps=max(1, steps // 12),
            decay_steps=steps,
            skip_deviations=settings.get("skip_deviations", OptimizerConfig.skip_deviations),
        ),
        run=RunConfig(
            steps=steps,
            seed=settings["seed"],
            log_every=max(1, steps // 50),
            eval_every=max(1, steps // 4),
            eval_batches=settings["eval_batches"],
            checkpoint_every=max(1, steps // 4),
            keep_checkpoints=checkpoints,
            sample_prompt="",
        ),
    )
    # Only one device is used, since the models and the batches are small.
    return prepare(config, folder / "run", note, jax.devices()[:1])


def trained(run: Any, folder: epath.Path, stop) -> dict[str, Any] | None:
    """Train a `prepared` cell: its bits a byte on the evaluation split and its losses, or None if it was interrupted.

    With experts also expert_load, the largest number of tokens of an expert over the mean, the median over the second
    half of the steps.
    """
    from deltaformer_jax.config.lines import lines
    from deltaformer_jax.training.loop import train

    if not train(*run, stop, quiet=True).finished:
        return None
    records = [json.loads(line) for line in lines((folder / "run" / "metrics.jsonl").read_text())]
    loads = [record["expert_load"] for record in records if "expert_load" in record]
    return {
        "bits": [record["eval_bits_per_byte"] for record in records if "eval_bits_per_byte" in record][-1],
        "losses": [(record["step"], record["loss"]) for record in records if "loss" in record],
        **({"expert_load": float(np.median(loads[len(loads) // 2 :]))} if loads else {}),
    }


def mean_and_error(differences: np.ndarray) -> str:
    """The mean of paired differences ± its standard error std/√n; of one seed the difference alone, of none "-"."""
    if not len(differences):
        return "-"
    if len(differences) == 1:
        return f"{differences[0]:+.4f}"
    return f"{differences.mean():+.4f} ± {differences.std(ddof=1) / math.sqrt(len(differences)):.4f}"
