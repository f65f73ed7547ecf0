"""The model that "longred" compares with, as its run's folder describes it. No parameter is read."""

from __future__ import annotations

import dataclasses
from typing import Any

from deltaformer_jax.config import Config, ModelConfig
from deltaformer_jax.config.mixer import entry
from deltaformer_jax.training.objectives.rows import teacher_run

# What teacher and student may have different: the rotary embedding, and how the same function is computed.
_MAY_DIFFER = {
    "rope_base",
    "write_rope_base",
    "rope_scaling",
    "vocab_size",
    "compute_dtype",
    "implementation",
    "chunk_size",
    "remat",
    "unroll_layers",
}


def teacher_model(config: Config) -> ModelConfig:
    """The teacher's model. Raises ValueError, naming the field, unless it is the student's but for `_MAY_DIFFER`."""
    theirs = teacher_run(config).config.model
    check_same_architecture(theirs, config.model, f"objective.teacher_workdir = {config.objective.teacher_workdir!r}")
    ours = config.model
    return dataclasses.replace(
        theirs,
        vocab_size=theirs.vocab_size or ours.vocab_size,
        separator_tokens=theirs.separator_tokens or ours.separator_tokens,
    )


def check_same_architecture(theirs: ModelConfig, ours: ModelConfig, where: str) -> None:
    """Raise ValueError that begins with `where` and lists every difference beside those of `_MAY_DIFFER`."""
    differing = [
        f"model.{field.name}: {getattr(theirs, field.name)!r} there, {getattr(ours, field.name)!r} here"
        for field in dataclasses.fields(ours)
        if field.name not in _MAY_DIFFER and _compared(theirs, field.name) != _compared(ours, field.name)
    ]
    if differing:
        raise ValueError(
            f"{where}: not the same architecture: {'; '.join(differing)}. Only the rotary embedding may differ"
        )


def _compared(model: ModelConfig, field: str) -> Any:
    value = getattr(model, field)
    if field == "separator_tokens" and model.separators:
        return ()  # of the same characters, which are compared
    if field != "mixers":
        return value
    entries = [entry(mixer) for mixer in value]
    return [(one.name, {k: v for k, v in one.overrides if k not in _MAY_DIFFER}) for one in entries]
