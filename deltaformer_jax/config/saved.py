"""A run's settings: written to DIR/config.json, and compared with the given ones when the run is resumed."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from etils import epath

from deltaformer_jax.config.checks import check
from deltaformer_jax.config.imports import hashes, is_import, refuse_inside
from deltaformer_jax.config.mixer import Mixer, entry
from deltaformer_jax.config.sections import Config

# Where the data and the teacher lie; what lies there is compared with what the run began with.
PLACES = ("data.path", "objective.teacher_workdir", "objective.short_data", "objective.s2l_data")
# Fields that may change when a run is resumed: intervals and length, devices, kernels, and PLACES.
FREE = ("run.", "mesh.", *PLACES, "model.implementation")

# Fields that may differ between the processes of a run.
LOCAL = ("data.path", "run.compilation_cache")


def flatten(config: Config) -> dict[str, Any]:
    """{"section.field": value} in the order in which the dataclasses define the fields."""
    return {
        f"{section.name}.{field.name}": getattr(getattr(config, section.name), field.name)
        for section in dataclasses.fields(config)
        for field in dataclasses.fields(getattr(config, section.name))
    }


def everywhere_the_same(config: Config) -> dict[str, Any]:
    """{"section.field": value as text}: the settings that all processes of a run must have in common.

    Not data.path: the data themselves are compared, wherever they lie. With hashes of the modules of the user's own.
    """
    values = {name: repr(value) for name, value in flatten(config).items() if name not in LOCAL}
    return values | hashes(_imports(config))


def to_json(config: Config) -> dict[str, Any]:
    """The config as data for json.dumps; a Mixer becomes {"name": ..., "overrides": {...}}."""

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
    """The Config from `data`, the inverse of to_json. Raises ValueError for fields that Config doesn't have."""

    def rich(value):
        if isinstance(value, dict):
            return Mixer(value["name"], **{key: rich(part) for key, part in value["overrides"].items()})
        return tuple(rich(part) for part in value) if isinstance(value, list) else value

    sections = {}
    for section in dataclasses.fields(Config):
        known = {field.name for field in dataclasses.fields(section.default_factory)}
        given = data.get(section.name, {})
        if unknown := sorted(given.keys() - known):
            raise ValueError(
                f"unknown field {section.name}.{unknown[0]}: perhaps another version of this package wrote it"
            )
        sections[section.name] = section.default_factory(**{key: rich(value) for key, value in given.items()})
    return Config(**sections)


class Saved:
    """The content of DIR/config.json: `config`, and the hashes of the tokenizer and of the corpus."""

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
        """Read DIR/config.json. Raises FileNotFoundError or ValueError, naming the folder or the file."""
        path = workdir / cls.FILE
        if not workdir.exists():
            raise FileNotFoundError(f"--workdir {workdir}: no such folder")
        if not path.exists():
            raise FileNotFoundError(f"--workdir {workdir}: not the folder of a run (it has no {cls.FILE})")
        try:
            data = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path}: not a run's config ({error})") from None
        if isinstance(data, dict) and isinstance(data.get("model_type"), str):
            raise ValueError(
                f"--workdir {workdir}: holds a {data['model_type']}'s weights, not a run; make a run of them with "
                f"python -m deltaformer_jax.convert {workdir} --workdir DIR"
            )
        try:
            saved = cls(from_json(data), data["tokenizer_hash"], data["corpus_hash"])
            for text in _imports(saved.config):
                refuse_inside(text, Path(workdir), "model")
            check(saved.config)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: not a run's config ({error})") from None
        return saved


def _imports(config: Config) -> list[str]:
    """Every string "package.module:NAME" in the model section, overrides of mixers included."""
    mixers = [entry(mixer) for mixer in config.model.mixers]
    values = [value for mixer in mixers for _, value in mixer.overrides]
    values += [getattr(config.model, field.name) for field in dataclasses.fields(config.model)]
    return [text for text in (*(mixer.name for mixer in mixers), *values) if is_import(text)]


def check_resumable(saved: Config, asked: Config, workdir: epath.Path) -> None:
    """Raise ValueError if a field differs that may not change; the message lists each such field with both values."""
    old, new = flatten(saved), flatten(asked)
    differing = [name for name in new if old[name] != new[name] and not name.startswith(FREE)]
    if differing:
        listing = "; ".join(f"{name}: {old[name]!r} in the run, {new[name]!r} asked for" for name in differing)
        raise ValueError(
            f"--workdir {workdir} holds a run with other settings: {listing}. "
            "Only run.*, mesh.*, model.implementation and where the same data and teacher lie may change; take another "
            "--workdir, or resume without --config"
        )
