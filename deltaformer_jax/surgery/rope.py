"""Another base or scaling of a trained model's rotary embedding: θ_i = base^(−2i/d), see `config/rope_scaling.py`."""

from __future__ import annotations

import dataclasses
from typing import Any

from deltaformer_jax.config import ModelConfig
from deltaformer_jax.config.mixer import with_given


def rescale_rope(
    config: ModelConfig, params: Any, base: float | None = None, scaling: str | None = None
) -> tuple[ModelConfig, Any]:
    """(config, the same parameters) with `model.rope_base` and `model.rope_scaling` of all layers that have them.

    None leaves a setting as it is. A base of the write's own (`model.write_rope_base`) stays; a scaling holds for it
    too. A model that attends to longer contexts has still to be trained on them. Raises
    ValueError, naming the argument, if neither is given; the config's own checks find values that no layer takes.
    """
    if base is None and scaling is None:
        raise ValueError("base, scaling: give one of them, or both")
    given = {"rope_base": base, "rope_scaling": scaling}
    given = {name: value for name, value in given.items() if value is not None}
    mixers = tuple(with_given(mixer, given) for mixer in config.mixers)
    return dataclasses.replace(config, mixers=mixers, **given), params
