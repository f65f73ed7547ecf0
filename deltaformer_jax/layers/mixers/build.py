"""Build a mixer from an entry of `model.mixers`: find its class, collect its constructor's arguments, check them."""

from __future__ import annotations

import dataclasses
import inspect

from flax import nnx

from deltaformer_jax.config.fields import check_field, rule_of
from deltaformer_jax.config.imports import import_object, is_import
from deltaformer_jax.config.mixer import Mixer, entry
from deltaformer_jax.config.sections import ModelConfig
from deltaformer_jax.host.spelling import did_you_mean
from deltaformer_jax.layers.mixers import MIXERS
from deltaformer_jax.layers.mixers.protocol import ADVICE, check_class
from deltaformer_jax.layers.mixers.visible import where_it_matters

FIELDS = {field.name: field for field in dataclasses.fields(ModelConfig)}

# Constructor arguments that the model sets itself; an entry of `model.mixers` cannot override them.
_THE_MODELS = ("d_model", "rngs", "dtype", "output_scale")


# Fields of the block around a mixer, which an entry of `model.mixers` may override too.
_THE_BLOCKS = (
    *("norm_placement", "feed_forward", "feed_forward_similarity", "mlp_dim", "num_experts", "experts_per_token"),
    *("shared_experts", "expert_dim", "router", "renormalise_experts", "expert_pool", "ffn_shift_rank"),
)


def block_setting(config: ModelConfig, mixer: str | Mixer, name: str):
    """The value of a field of the block around `mixer`: the entry's own, or the config's."""
    own = entry(mixer)
    return dict(own.overrides).get(name, getattr(config, name)) if own.name in MIXERS else getattr(config, name)


def mixer_class(mixer: str | Mixer) -> type:
    """The class of an entry of `model.mixers`. Raises ValueError if the entry names no mixer class."""
    mixer = entry(mixer)
    if mixer.name in MIXERS:
        return MIXERS[mixer.name]
    found = mixer.given
    if found is None:
        if not is_import(mixer.name):
            raise ValueError(
                f"model.mixers: {mixer.name!r} is not one of {', '.join(map(repr, MIXERS))}, nor "
                f'a class of your own as "package.module:Class"{did_you_mean(mixer.name, MIXERS)}'
            )
        found = import_object(mixer.name, "model.mixers")
    check_class(found, mixer.name)
    return found


def constructor_names(mixer: str | Mixer) -> list[str]:
    """The names of the mixer's constructor arguments, without those that the model sets itself."""
    return [name for name in _parameters(mixer_class(mixer)) if name not in _THE_MODELS]


def _parameters(mixer: type) -> dict[str, inspect.Parameter]:
    """The named parameters of a class's constructor. If it takes **kwargs, those of the inherited constructor too."""
    named: dict[str, inspect.Parameter] = {}
    for owner in mixer.__mro__:
        if "__init__" not in vars(owner) or owner in (nnx.Module, object):
            continue
        parameters = inspect.signature(owner.__init__).parameters.values()
        kinds = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        named = {p.name: p for p in parameters if p.kind in kinds and p.name != "self"} | named
        if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
            break
    return named


def mixer_fields(mixer: str | Mixer) -> list[str]:
    """The fields of ModelConfig that the mixer's constructor takes."""
    return [name for name in constructor_names(mixer) if name in FIELDS]


def resolved_fields(config: ModelConfig, mixer: str | Mixer) -> dict[str, object]:
    """What the constructor of one of our mixers gets for each field it takes: the entry's value, the config's, or its
    own default."""
    parameters, own = _parameters(mixer_class(mixer)), dict(entry(mixer).overrides)
    values = {field: own.get(field, getattr(config, field)) for field in mixer_fields(mixer)}
    given = {}
    for field, value in where_it_matters(values, own).items():
        given |= rule_of(FIELDS[field]).for_mixer(field, value)
    return {field: given.get(field, parameters[field].default) for field in values}


def build_mixer(config: ModelConfig, mixer: str | Mixer, *, output_scale: float, rngs: nnx.Rngs) -> nnx.Module:
    """Construct the mixer of an entry of `model.mixers` from the config's fields and the entry's overrides.

    An override replaces the field of the same name. Raises ValueError, beginning with "model.", for a missing or wrong
    argument.
    """
    made, name, overrides = mixer_class(mixer), entry(mixer).name, dict(entry(mixer).overrides)
    ours = name in MIXERS
    values = {field: getattr(config, field) for field in mixer_fields(mixer)}
    if ours:
        values |= {field: value for field, value in overrides.items() if field not in _THE_BLOCKS}
        values = where_it_matters(values, overrides)
    arguments = {}
    for field, value in values.items():
        arguments |= rule_of(FIELDS[field]).for_mixer(field, value)
    if not ours:
        arguments |= overrides
    parameters = _parameters(made)
    if "d_model" not in parameters:
        raise ValueError(f"model.mixers: the constructor of {name} has no argument d_model; {ADVICE}")
    models = {"d_model": config.d_model, "rngs": rngs, "dtype": config.compute_dtype, "output_scale": output_scale}
    arguments |= {argument: value for argument, value in models.items() if argument in parameters}
    for argument, parameter in parameters.items():
        if argument not in arguments and parameter.default is inspect.Parameter.empty:
            raise ValueError(f"model.mixers: {name} needs {argument}: give Mixer({name!r}, {argument}=...)")
    if not ours:
        return made(**arguments)
    try:
        return made(**arguments)
    except ValueError as error:  # its message begins with the argument's name, which is also the field's name
        raise ValueError(f"model.{error} (of {mixer!r} in model.mixers)") from None


def check_mixers(config: ModelConfig) -> None:
    """Raise ValueError, naming the field, for an override its mixer does not take and a changed field no mixer uses."""
    for mixer in map(entry, config.mixers):
        known = constructor_names(mixer) + list(_THE_BLOCKS if mixer.name in MIXERS else ())
        for name, value in mixer.overrides:
            if name not in known:
                options = f"is not one of {', '.join(map(repr, known))}" if known else "is not taken: it has no options"
                raise ValueError(
                    f"model.mixers: an override of {mixer.name}: {name!r} {options}{did_you_mean(name, known)}"
                )
            if mixer.name in MIXERS:
                check_field(f"model.mixers: {mixer.name}, {name}", FIELDS[name], value, strict=False)
    for name in unused_fields(config):
        if rule_of(FIELDS[name]).must_be_used:
            value = getattr(config, name)
            raise ValueError(f"model.{name} = {value!r}: no mixer in model.mixers = {config.mixers} takes this field")


def unused_fields(config: ModelConfig) -> list[str]:
    """The mixers' fields that have another value than their default, although no mixer of the model takes them."""
    taken = {name for mixer in config.mixers for name in mixer_fields(mixer)}
    theirs = (
        {name for mixer in MIXERS for name in mixer_fields(mixer)} - taken - {"norm_epsilon", "norm_gain"}
    )  # blocks use them too
    if config.num_kv_heads == config.num_heads:
        theirs -= {"num_kv_heads"}  # says what holds of every mixer
    return [name for name, field in FIELDS.items() if name in theirs and getattr(config, name) != field.default]
