"""The settings of a run: their dataclasses, checks, files and command-line flags."""

from deltaformer_jax.config.mixer import Mixer, on_any_device
from deltaformer_jax.config.sections import (
    Config,
    DataConfig,
    MeshConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    RunConfig,
)

__all__ = [
    "Config",
    "DataConfig",
    "MeshConfig",
    "Mixer",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "RunConfig",
    "on_any_device",
]
