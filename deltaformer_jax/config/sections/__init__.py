"""The settings of a run: one dataclass per section. Each field states its type, default and allowed values (fields.py).

A config file is a Python file with a function `get_config()` that returns a `Config`. A flag such as
`--config.model.d_model=256` overrides one field. `train.py --help_config` prints what they say.
"""

import dataclasses

from deltaformer_jax.config.sections.data import DataConfig
from deltaformer_jax.config.sections.mesh import MeshConfig
from deltaformer_jax.config.sections.model import ModelConfig
from deltaformer_jax.config.sections.objective import ObjectiveConfig
from deltaformer_jax.config.sections.optimizer import OptimizerConfig
from deltaformer_jax.config.sections.run import RunConfig

__all__ = [
    "Config",
    "DataConfig",
    "MeshConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "RunConfig",
]


@dataclasses.dataclass
class Config:
    """All settings of a run, by section."""

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    objective: ObjectiveConfig = dataclasses.field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    run: RunConfig = dataclasses.field(default_factory=RunConfig)
