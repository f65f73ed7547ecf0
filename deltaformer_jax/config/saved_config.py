"""A config file for `--config` whose argument is a run's folder: the settings that run was started with."""

from etils import epath

from deltaformer_jax.config import Config
from deltaformer_jax.config.saved import Saved


def get_config(workdir: str) -> Config:
    return Saved.read(epath.Path(workdir)).config
