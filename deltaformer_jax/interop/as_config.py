"""A config file for `--config`: its argument is a folder with weights, and get_config returns a config that starts a
run from them, with their model and data."""

from pathlib import Path

from etils import epath

from deltaformer_jax.config import Config, DataConfig
from deltaformer_jax.config.saved import Saved
from deltaformer_jax.interop.files import is_pretrained
from deltaformer_jax.interop.load import read_config


def get_config(folder: str) -> Config:
    if not is_pretrained(epath.Path(folder)):
        saved = Saved.read(epath.Path(folder)).config
        return Config(model=saved.model, data=saved.data)
    tokenizer = Path(folder) / "tokenizer.json"
    data = DataConfig(tokenizer=str(tokenizer)) if tokenizer.exists() else DataConfig()
    return Config(model=read_config(Path(folder))[1], data=data)
