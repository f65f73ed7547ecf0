"""Another base or scaling of a trained model's rotary embedding: θ_i = base^(−2i/d), see `config/rope_scaling.py`."""

from __future__ import annotations

from typing import Any

from deltaformer_jax.config import ModelConfig
from deltaformer_jax.config.mixer import with_rotary


def rescale_rope(
    config: ModelConfig, params: Any, base: float | None = None, scaling: str | None = None
) -> tuple[ModelConfig, Any]:
    """(config, the same parameters) with another `rope_base` and `rope_scaling` of all layers that are rotated.

    None leaves a setting as it is. A layer without a rotary embedding stays without one. A base of the write's own
    (`model.write_rope_base`) stays; a scaling holds for it too. A model that attends to longer contexts has still to be
    trained on them.

    Raises ValueError, naming the argument, if neither is given, if no layer is rotated, and for a base of 1 or less,
    0 among them: it would leave nothing rotated. The config's own checks find other values that no layer takes.
    """
    if base is None and scaling is None:
        raise ValueError("base, scaling: give one of them, or both")
    if base is not None and not base > 1:
        raise ValueError(f"base={base:g}: must be greater than 1")
    given = {"rope_base": base, "rope_scaling": scaling}
    return with_rotary(config, {name: value for name, value in given.items() if value is not None}), params
