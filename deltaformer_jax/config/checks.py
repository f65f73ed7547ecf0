"""Every field of a config against what its definition says of it, and the fields against each other."""

from __future__ import annotations

import dataclasses
from typing import Any

from deltaformer_jax.config.fields import check_field, rule_of
from deltaformer_jax.config.imports import NOT_IMPORTABLE, import_object
from deltaformer_jax.config.mixer import entry
from deltaformer_jax.config.sections import Config, ModelConfig


def check(config: Config) -> None:
    """Raise ValueError, naming the field and the fix, for a value that can't be right in any run.

    What depends on the mixers, the corpus or the devices is checked where those are made.
    """
    if not isinstance(config, Config):
        raise ValueError(f"get_config() returned a {type(config).__name__}, not a deltaformer_jax.config.Config")
    for section in dataclasses.fields(config):
        value = getattr(config, section.name)
        if type(value) is not section.default_factory:
            raise ValueError(f"{section.name} is a {type(value).__name__}, not a {section.default_factory.__name__}")
        check_section(section.name, value)
    check_pattern(config.model)
    _check_found_again(config.model)
    optimizer, batch = config.optimizer, config.data.batch_size
    if optimizer.schedule != "constant" and optimizer.warmup_steps >= optimizer.decay_steps:
        raise ValueError(
            f"optimizer.warmup_steps = {optimizer.warmup_steps}: must be below optimizer.decay_steps = "
            f"{optimizer.decay_steps}, the schedule's whole length"
        )
    if batch % optimizer.accumulation_steps:
        raise ValueError(
            f"optimizer.accumulation_steps = {optimizer.accumulation_steps} doesn't divide data.batch_size = {batch}"
        )


def check_model(config: ModelConfig) -> None:
    """`check` of the model's section alone, for a model that no program makes; its vocabulary must be known."""
    check_section("model", config, strict=False)
    check_pattern(config)
    if config.vocab_size < 1:
        raise ValueError(f"model.vocab_size = {config.vocab_size}: must be at least 1")


def check_section(name: str, section: Any, strict: bool = True) -> None:
    """`strict`: the types are those that config.json can hold."""
    for field in dataclasses.fields(section):
        check_field(f"{name}.{field.name}", field, getattr(section, field.name), strict)


def check_pattern(config: ModelConfig) -> None:
    if config.num_layers % len(config.mixers):
        raise ValueError(
            f"model.num_layers = {config.num_layers}: must be a multiple of the length of model.mixers,"
            f" {len(config.mixers)}"
        )


def _check_found_again(config: ModelConfig) -> None:
    """Raise ValueError for a mixer that config.json could not name, or with overrides that it could not hold."""
    for mixer in map(entry, config.mixers):
        module, _, name = mixer.name.partition(":")
        if module in NOT_IMPORTABLE or "<locals>" in name:
            raise ValueError(
                f"model.mixers: {mixer.name!r} was defined in a function, a notebook or a config file, where no import "
                "finds it again; put it in a module on Python's path"
            )
        if mixer.given is not None and import_object(mixer.name, "model.mixers") is not mixer.given:
            raise ValueError(f"model.mixers: {mixer.name!r} names another class than the one given")
        for name, value in mixer.overrides:
            if not _is_plain(value):
                raise ValueError(
                    f"model.mixers: {mixer.name}, {name} = {value!r}: config.json holds numbers, texts, booleans, None "
                    "and lists of them"
                )


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return value is None or type(value) in (str, int, float, bool)


def check_argument(name: str, value: Any) -> None:
    """Raise ValueError, naming the argument, for a value that ModelConfig's field of that name could not have: for the
    constructors of mixers, which others than the model may call."""
    rule = next(rule_of(field) for field in dataclasses.fields(ModelConfig) if field.name == name)
    if isinstance(rule.choices, tuple) and rule.choices and value not in rule.choices:
        raise ValueError(f"{name}={value!r} must be one of {', '.join(map(repr, rule.choices))}")
    if reason := rule.broken_by(value):
        raise ValueError(f"{name}={value!r} {reason}")
