"""A run's settings: checked before any work, kept in DIR/config.json, compared when the run goes on."""

import dataclasses
import json
from typing import Any

from etils import epath

from deltaformer_jax.config import Config, Mixer

# What a resumed run may change: what is done when, on which devices and by which kernels, and where the data lies.
FREE = ("run.", "mesh.", "data.path", "model.implementation")

_AT_LEAST = {
    "model.vocab_size": 0,
    "model.d_model": 1,
    "model.num_layers": 1,
    "model.num_heads": 1,
    "model.num_kv_heads": 1,
    "model.head_dim": 1,
    "model.mlp_dim": 0,
    "model.window": 0,
    "model.chunk_size": 0,
    "model.num_value_heads": 0,
    "model.value_dim": 0,
    "model.conv_size": -1,
    "data.sequence_length": 1,
    "data.batch_size": 1,
    "optimizer.learning_rate": 0,
    "optimizer.warmup_steps": 0,
    "optimizer.decay_steps": 1,
    "optimizer.wsd_decay_fraction": 0,
    "optimizer.final_learning_rate": 0,
    "optimizer.b1": 0,
    "optimizer.b2": 0,
    "optimizer.epsilon": 0,
    "optimizer.weight_decay": 0,
    "optimizer.clip_norm": 0,
    "optimizer.accumulation_steps": 1,
    "optimizer.skip_deviations": 0,
    "optimizer.rollback_after": 1,
    "run.steps": 1,
    "run.seed": 0,
    "run.log_every": 0,
    "run.eval_every": 0,
    "run.eval_batches": 0,
    "run.checkpoint_every": 0,
    "run.keep_checkpoints": 1,
    "run.sample_tokens": 0,
    "run.statistics_every": 0,
    "run.profile_steps": 0,
}
_BELOW = {"optimizer.b1": 1, "optimizer.b2": 1, "run.seed": 2**32}
_AT_MOST = {"optimizer.wsd_decay_fraction": 1, "optimizer.final_learning_rate": 1}
_SCHEDULES = ("cosine", "wsd", "constant")


def flatten(config: Config) -> dict[str, Any]:
    """{"section.field": value} in the order of the dataclasses."""
    return {
        f"{section.name}.{field.name}": getattr(getattr(config, section.name), field.name)
        for section in dataclasses.fields(config)
        for field in dataclasses.fields(getattr(config, section.name))
    }


def check(config: Config) -> None:
    """Raise ValueError, naming the field and the fix, for a type or size that can't be right in any run.

    What depends on the model's parts, the corpus or the devices is checked where those are made.
    """
    if not isinstance(config, Config):
        raise ValueError(f"get_config() returned a {type(config).__name__}, not a deltaformer_jax.config.Config")
    for section in dataclasses.fields(config):
        value = getattr(config, section.name)
        if type(value) is not section.default_factory:
            raise ValueError(f"{section.name} is a {type(value).__name__}, not a {section.default_factory.__name__}")
        for field in dataclasses.fields(value):
            _check_type(f"{section.name}.{field.name}", field.type, getattr(value, field.name))
    fields = flatten(config)
    for name, least in _AT_LEAST.items():
        if not fields[name] >= least:  # so that NaN is refused
            raise ValueError(f"{name} = {fields[name]}: must be at least {least}")
    for name, bound in _BELOW.items():
        if not fields[name] < bound:
            raise ValueError(f"{name} = {fields[name]}: must be below {bound}")
    for name, most in _AT_MOST.items():
        if not fields[name] <= most:
            raise ValueError(f"{name} = {fields[name]}: must be at most {most}")
    optimizer, batch = config.optimizer, config.data.batch_size
    if optimizer.schedule not in _SCHEDULES:
        raise ValueError(f"optimizer.schedule = {optimizer.schedule!r}: must be one of {', '.join(_SCHEDULES)}")
    if optimizer.schedule != "constant" and optimizer.warmup_steps >= optimizer.decay_steps:
        raise ValueError(
            f"optimizer.warmup_steps = {optimizer.warmup_steps}: must be below optimizer.decay_steps = "
            f"{optimizer.decay_steps}, the schedule's whole length"
        )
    if batch % optimizer.accumulation_steps:
        raise ValueError(
            f"optimizer.accumulation_steps = {optimizer.accumulation_steps} doesn't divide data.batch_size = {batch}"
        )


def _check_type(name: str, expected: type, value: Any) -> None:
    if expected is tuple:
        if not isinstance(value, tuple) or not value or not all(isinstance(part, str | Mixer) for part in value):
            raise ValueError(f"{name} = {value!r}: must be a tuple of names or Mixer(name, ...), at least one")
    elif expected is float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{name} = {value!r}: must be a number")
    elif type(value) is not expected:
        raise ValueError(f"{name} = {value!r}: must be of type {expected.__name__}, not {type(value).__name__}")


def to_json(config: Config) -> dict[str, Any]:
    """Plain data; a Mixer becomes {"name": ..., "overrides": {...}}."""

    def plain(value):
        if isinstance(value, Mixer):
            return {"name": value.name, "overrides": dict(value.overrides)}
        return [plain(part) for part in value] if isinstance(value, tuple) else value

    return {
        section.name: {
            field.name: plain(getattr(getattr(config, section.name), field.name))
            for field in dataclasses.fields(getattr(config, section.name))
        }
        for section in dataclasses.fields(config)
    }


def from_json(data: dict[str, Any]) -> Config:
    """The Config that to_json made `data` of. Raises ValueError for fields that Config doesn't have."""

    def rich(value):
        if isinstance(value, dict):
            return Mixer(value["name"], **{key: rich(part) for key, part in value["overrides"].items()})
        return tuple(rich(part) for part in value) if isinstance(value, list) else value

    sections = {}
    for section in dataclasses.fields(Config):
        known = {field.name for field in dataclasses.fields(section.default_factory)}
        given = data.get(section.name, {})
        if unknown := sorted(given.keys() - known):
            raise ValueError(f"unknown field {section.name}.{unknown[0]}: written by another version of this package?")
        sections[section.name] = section.default_factory(**{key: rich(value) for key, value in given.items()})
    return Config(**sections)


class Saved:
    """What DIR/config.json holds: `config`, and the hashes of the tokenizer and of the corpus."""

    FILE = "config.json"

    def __init__(self, config: Config, tokenizer_hash: str, corpus_hash: str):
        self.config, self.tokenizer_hash, self.corpus_hash = config, tokenizer_hash, corpus_hash

    def as_json(self) -> dict[str, Any]:
        return {**to_json(self.config), "tokenizer_hash": self.tokenizer_hash, "corpus_hash": self.corpus_hash}

    def write(self, workdir: epath.Path) -> None:
        draft = workdir / f"{self.FILE}.tmp"
        draft.write_text(json.dumps(self.as_json(), indent=2) + "\n")
        draft.replace(workdir / self.FILE)

    @classmethod
    def read(cls, workdir: epath.Path) -> "Saved":
        """Raises FileNotFoundError or ValueError, naming the folder or file."""
        path = workdir / cls.FILE
        if not workdir.exists():
            raise FileNotFoundError(f"--workdir {workdir}: no such folder")
        if not path.exists():
            raise FileNotFoundError(f"--workdir {workdir}: not the folder of a run (it has no {cls.FILE})")
        try:
            data = json.loads(path.read_text())
            saved = cls(from_json(data), data["tokenizer_hash"], data["corpus_hash"])
            check(saved.config)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: not a run's config ({error})") from None
        return saved


def check_resumable(saved: Config, asked: Config, workdir: epath.Path) -> None:
    """Raise ValueError that lists every field that may not change and does, with both values."""
    old, new = flatten(saved), flatten(asked)
    differing = [name for name in new if old[name] != new[name] and not name.startswith(FREE)]
    if differing:
        listing = "; ".join(f"{name}: {old[name]!r} in the run, {new[name]!r} asked for" for name in differing)
        raise ValueError(
            f"--workdir {workdir} holds a run with other settings: {listing}. "
            "Only run.*, mesh.*, data.path and model.implementation may change; take another --workdir, or go on "
            "without --config"
        )
