"""A config file for `--config`: its argument is a run's folder, and get_config returns that run's settings."""

from etils import epath

from deltaformer_jax.config import Config
from deltaformer_jax.config.saved import Saved


def get_config(workdir: str) -> Config:
    return Saved.read(epath.Path(workdir)).config
