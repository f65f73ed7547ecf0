"""A mixer from an entry of `model.mixers`: which class it is, what its constructor is given, what it can't be given."""

from __future__ import annotations

import dataclasses
import inspect

from flax import nnx

from deltaformer_jax.config.fields import check_field, nearest, rule_of
from deltaformer_jax.config.imports import import_object, is_import
from deltaformer_jax.config.mixer import Mixer, entry
from deltaformer_jax.config.sections import ModelConfig
from deltaformer_jax.layers.mixers import MIXERS
from deltaformer_jax.layers.mixers.protocol import check_class

FIELDS = {field.name: field for field in dataclasses.fields(ModelConfig)}

# What the model itself gives a mixer's constructor.
_THE_MODELS = ("self", "d_model", "rngs", "dtype", "output_scale")


def mixer_class(mixer: str | Mixer) -> type:
    """The class of an entry of `model.mixers`. Raises ValueError for what is none."""
    mixer = entry(mixer)
    if mixer.name in MIXERS:
        return MIXERS[mixer.name]
    found = mixer.given
    if found is None:
        if not is_import(mixer.name):
            raise ValueError(
                f"model.mixers: {mixer.name!r} is not one of {', '.join(map(repr, MIXERS))}, nor "
                f'"package.module:Class" of yours{nearest(mixer.name, MIXERS)}'
            )
        found = import_object(mixer.name, "model.mixers")
    check_class(found, mixer.name)
    return found


def constructor_names(mixer: str | Mixer) -> list[str]:
    """What the mixer's constructor takes by name, beside what the model itself gives it."""
    return [name for name in _parameters(mixer) if name not in _THE_MODELS]


def _parameters(mixer: str | Mixer) -> dict[str, inspect.Parameter]:
    parameters = inspect.signature(mixer_class(mixer).__init__).parameters
    named = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return {name: parameter for name, parameter in parameters.items() if parameter.kind in named}


def mixer_fields(mixer: str | Mixer) -> list[str]:
    """The fields of ModelConfig that the mixer takes."""
    return [name for name in constructor_names(mixer) if name in FIELDS]


def build_mixer(config: ModelConfig, mixer: str | Mixer, *, output_scale: float, rngs: nnx.Rngs) -> nnx.Module:
    """The mixer that an entry of `model.mixers` names, with the model's settings and the entry's overrides."""
    mixer = entry(mixer)
    overrides = dict(mixer.overrides)
    values = {name: getattr(config, name) for name in mixer_fields(mixer)}
    if mixer.name in MIXERS:
        values |= overrides
    arguments = {}
    for name, value in values.items():
        arguments |= rule_of(FIELDS[name]).for_mixer(name, value)
    if mixer.name not in MIXERS:
        arguments |= overrides
    models = {"output_scale": output_scale, "dtype": config.compute_dtype, "rngs": rngs}
    parameters = _parameters(mixer)
    arguments |= {name: value for name, value in models.items() if name in parameters}
    for name, parameter in parameters.items():
        if name not in (*arguments, "self", "d_model") and parameter.default is inspect.Parameter.empty:
            raise ValueError(f"model.mixers: {mixer.name} needs {name}: give Mixer({mixer.name!r}, {name}=...)")
    try:
        return mixer_class(mixer)(config.d_model, **arguments)
    except ValueError as error:  # it begins with the argument's name, which is the field's
        raise ValueError(f"model.{error} (of {mixer!r} in model.mixers)") from None


def check_mixers(config: ModelConfig) -> None:
    """Raise ValueError, naming the field, for an override or a field that no mixer could use."""
    for mixer in map(entry, config.mixers):
        known = constructor_names(mixer)
        for name, value in mixer.overrides:
            if name not in known:
                raise ValueError(
                    f"model.mixers: an override of {mixer.name}: {name!r} is not one of {', '.join(map(repr, known))}"
                    f"{nearest(name, known)}"
                )
            if mixer.name in MIXERS:
                check_field(f"model.mixers: {mixer.name}, {name}", FIELDS[name], value)
    there = {name for mixer in config.mixers for name in mixer_fields(mixer)}
    for name, field in FIELDS.items():
        value = getattr(config, name)
        if rule_of(field).must_be_used and name not in there and value != field.default:
            raise ValueError(f"model.{name} = {value!r}: no mixer in model.mixers = {config.mixers} has it")
