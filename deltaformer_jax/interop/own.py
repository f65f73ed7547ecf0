"""Our own model type, for models that no other project has: config.json holds our ModelConfig, tensors our names."""

from __future__ import annotations

from typing import Any

from deltaformer_jax.config import Config, Mixer, ModelConfig
from deltaformer_jax.config.imports import is_import
from deltaformer_jax.config.mixer import entry
from deltaformer_jax.config.saved import from_json, to_json

MODEL_TYPE = "deltaformer_jax"


def say(config: ModelConfig) -> dict[str, Any]:
    """config.json, but for its model_type. Raises ValueError for a mixer or similarity of the user's own."""
    _refuse_imports(config)
    return {"model": to_json(Config(model=config))["model"]}


def read(values: dict[str, Any]) -> ModelConfig:
    """The config from config.json. Raises ValueError for fields that ModelConfig does not have."""
    try:
        config = from_json({"model": values["model"]}).model
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"config.json: not a {MODEL_TYPE}'s ({error})") from None
    _refuse_imports(config)
    return config


def name_of(path: tuple[Any, ...]) -> str:
    """The tensor's name of a parameter."""
    return ".".join(map(str, path))


def _refuse_imports(config: ModelConfig) -> None:
    # A folder of weights must not decide which code is run.
    values: list[Any] = [*vars(config).values()]
    for mixer in config.mixers:
        one: Mixer = entry(mixer)
        values += [one.name, *(value for _, value in one.overrides)]
    found = [value for value in values if is_import(value) or not isinstance(value, str | int | float | tuple | None)]
    if found:
        raise ValueError(f"{found[0]!r}: a class of one's own has no place in a folder of weights")
