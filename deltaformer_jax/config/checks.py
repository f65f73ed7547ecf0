"""Checks of a config: each field against its own rule, and fields against each other."""

from __future__ import annotations

import dataclasses
from typing import Any

from deltaformer_jax.config.fields import check_field, rule_of
from deltaformer_jax.config.imports import NOT_IMPORTABLE, import_object
from deltaformer_jax.config.mixer import entry
from deltaformer_jax.config.rope_scaling import parse
from deltaformer_jax.config.sections import Config, ModelConfig, OptimizerConfig
from deltaformer_jax.config.sections.optimizer import READ_BY


def check(config: Config) -> None:
    """Raise ValueError, naming the field and the fix, for a value that is wrong in every run.

    Values that are wrong only for certain mixers, data or devices are checked where those are set up.
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
    _check_rope_scaling(config.model)
    check_visible(config.model)
    _check_objective(config)
    optimizer, batch = config.optimizer, config.data.batch_size
    if optimizer.schedule != "constant" and optimizer.warmup_steps >= optimizer.decay_steps:
        raise ValueError(
            f"optimizer.warmup_steps = {optimizer.warmup_steps}: must be below optimizer.decay_steps = "
            f"{optimizer.decay_steps}, the length of the schedule, warm-up included"
        )
    _check_read(optimizer)
    if optimizer.lora_rank and not config.run.init_from:
        raise ValueError(
            f"optimizer.lora_rank = {optimizer.lora_rank}: LoRA adapts a trained model; name its folder in "
            "run.init_from"
        )
    if batch % optimizer.accumulation_steps:
        raise ValueError(
            f"optimizer.accumulation_steps = {optimizer.accumulation_steps} doesn't divide data.batch_size = {batch}"
        )


def _check_objective(config: Config) -> None:
    objective = config.objective
    if objective.name == "elastic":
        objective.left_out(config.model.num_layers)
    if objective.name in ("mixed", "longred"):
        objective.shares()
        if config.data.path.startswith("task:"):
            raise ValueError(f"objective.name = {objective.name!r}: is for text, not for data.path = a task")
    if objective.name == "longred":
        objective.compared(config.model.num_layers)
        if not objective.teacher_workdir:
            raise ValueError(
                "objective.teacher_workdir = '': objective.name = \"longred\" compares with the run before its context "
                "was extended; give its folder"
            )
        if not config.run.init_from:
            raise ValueError(
                "run.init_from = '': objective.name = \"longred\" goes on from a trained model; give its folder, as in "
                f"run.init_from={objective.teacher_workdir}"
            )


def _check_read(optimizer: OptimizerConfig) -> None:
    """Raise ValueError for a field that was set though optimizer.name does not read it."""
    for field in dataclasses.fields(optimizer):
        value, readers = getattr(optimizer, field.name), READ_BY.get(field.name, (optimizer.name,))
        if optimizer.name not in readers and value != field.default:
            raise ValueError(
                f"optimizer.{field.name} = {value!r}: optimizer.name = {optimizer.name!r} does not use it "
                f"({', '.join(readers)} would); leave it at {field.default!r}"
            )


def check_model(config: ModelConfig) -> None:
    """Check the model section alone, for a LanguageModel made without a program. `vocab_size` must be above 0."""
    check_section("model", config, strict=False)
    check_pattern(config)
    if config.vocab_size < 1:
        raise ValueError(f"model.vocab_size = {config.vocab_size}: must be at least 1")
    if config.separators and not config.separator_tokens:
        raise ValueError(
            f"model.separators = {config.separators!r}: programs look them up in the tokenizer; without one give their "
            "ids, model.separator_tokens"
        )
    check_visible(config)
    for ids in (
        config.separator_tokens,
        *(dict(entry(one).overrides).get("separator_tokens") for one in config.mixers),
    ):
        if ids and max(ids) >= config.vocab_size:
            raise ValueError(
                f"model.separator_tokens = {ids!r}: {max(ids)} is not below model.vocab_size = {config.vocab_size}"
            )


def check_section(name: str, section: Any, strict: bool = True) -> None:
    """Check each field of a section by its own rule. `strict`: see `check_field`."""
    for field in dataclasses.fields(section):
        check_field(f"{name}.{field.name}", field, getattr(section, field.name), strict)


def check_pattern(config: ModelConfig) -> None:
    if config.num_layers % len(config.mixers):
        raise ValueError(
            f"model.num_layers = {config.num_layers}: must be a multiple of the length of model.mixers,"
            f" {len(config.mixers)}"
        )


def check_visible(config: ModelConfig) -> None:
    """Raise ValueError for tokens that are to be seen behind a window where no layer has one."""
    if config.window or any(dict(entry(mixer).overrides).get("window") for mixer in config.mixers):
        return
    given = {name: getattr(config, name) for name in ("initial_tokens", "separators", "separator_tokens")}
    for name, value in given.items():
        if value:
            raise ValueError(
                f"model.{name} = {value!r}: without a window every token sees all before it; give model.window too"
            )


def _check_rope_scaling(config: ModelConfig) -> None:
    """Raise ValueError for a scaling of the rotary embedding that does not exist, also in an entry of the pattern."""
    for text in (config.rope_scaling, *(dict(entry(mixer).overrides).get("rope_scaling") for mixer in config.mixers)):
        try:
            parse("none" if text is None else str(text))
        except ValueError as error:
            raise ValueError(f"model.rope_scaling = {text!r}: {error}") from None


def _check_found_again(config: ModelConfig) -> None:
    """Raise ValueError for a mixer that could not be rebuilt from config.json: its class can't be imported by name, or
    an override is not plain data."""
    for mixer in map(entry, config.mixers):
        module, _, name = mixer.name.partition(":")
        if module in NOT_IMPORTABLE or "<locals>" in name:
            raise ValueError(
                f"model.mixers: {mixer.name!r} was defined in a function, a notebook or a config file, from which it "
                "can't be imported; put it in a module on Python's path"
            )
        if mixer.given is not None and import_object(mixer.name, "model.mixers") is not mixer.given:
            raise ValueError(
                f"model.mixers: importing {mixer.name!r} gives another class than the one in the config; give each "
                "class a name of its own in its module"
            )
        for name, value in mixer.overrides:
            if not _is_plain(value):
                raise ValueError(
                    f"model.mixers: {mixer.name}, {name} = {value!r}: config.json can hold only numbers, strings, "
                    "booleans, None and lists of these"
                )


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return value is None or type(value) in (str, int, float, bool)


def check_argument(name: str, value: Any) -> None:
    """Raise ValueError, naming the argument, for a value that ModelConfig's field of the same name may not have.

    The constructors of mixers call this, since users may construct a mixer without a ModelConfig.
    """
    rule = next(rule_of(field) for field in dataclasses.fields(ModelConfig) if field.name == name)
    if isinstance(rule.choices, tuple) and rule.choices and value not in rule.choices:
        raise ValueError(f"{name}={value!r} must be one of {', '.join(map(repr, rule.choices))}")
    if reason := rule.broken_by(value):
        raise ValueError(f"{name}={value!r} {reason}")
