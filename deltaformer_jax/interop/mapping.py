"""The correspondence of one model: for each row of its source's table, the tensors of a file and our parameters.

A parameter of ours is stacked over the periods of the pattern; layer n is entry n mod p of the pattern, period n div p.
"""

from __future__ import annotations

from typing import NamedTuple

from deltaformer_jax.config import ModelConfig
from deltaformer_jax.config.mixer import entry
from deltaformer_jax.interop.sources import Source
from deltaformer_jax.interop.tables import Row, shapes
from deltaformer_jax.model import LanguageModel
from deltaformer_jax.model_parts import ModelParts, Path, flat, model_parts


class Place(NamedTuple):
    """One row of one layer. tensors: its names in the file, each with the others that are accepted."""

    row: Row
    period: int
    parameters: list[Path]
    shapes: list[tuple[int, ...]]  # of the parameters, without the axis over the periods
    tensors: list[tuple[str, ...]]
    theirs: list[tuple[int, ...]]


class Correspondence(NamedTuple):
    parts: ModelParts
    places: list[Place]
    table: tuple[Path, str]
    norm: tuple[Path, str]
    head: tuple[Path, str] | None


def mapping(config: ModelConfig, source: Source) -> Correspondence:
    """The correspondence of a model of `config` with the files of `source`.

    Raises ValueError if a parameter of ours has no row, or a mixer no table.
    """
    parts = model_parts(config, LanguageModel)
    ours = dict(flat(parts.params))
    places, covered = [], set()
    for n in range(config.num_layers):
        mixer = entry(config.mixers[n % len(config.mixers)]).name
        if mixer not in source.rows:
            raise ValueError(f"{source.model_type} has no layer like {mixer}")
        block = ("blocks", n % len(config.mixers))
        for row in source.rows[mixer]:
            paths = [(*block, *keys_of(name)) for name in row.parameters]
            if not all(path in ours for path in paths):
                continue
            covered.update(paths)
            sizes = [ours[path].shape[1:] for path in paths]
            names = [tuple(f"model.layers.{n}.{name}" for name in names.split("|")) for names in row.tensors]
            places.append(Place(row, n // len(config.mixers), paths, sizes, names, shapes(row, sizes)))
    outside = {"table": ("embedding", "table"), "norm": ("final_norm", "scale"), "head": ("embedding", "head")}
    covered.update(outside.values())
    left = [".".join(map(str, path)) for path in ours if path not in covered]
    if left:
        raise ValueError(f"{source.model_type} has no tensor for {', '.join(left)}")
    named = {key: (path, source.outside[key]) if path in ours else None for key, path in outside.items()}
    return Correspondence(parts, places, **named)


def keys_of(name: str) -> Path:
    """A path as nnx has it: the parts of a list are numbers."""
    return tuple(int(part) if part.isdigit() else part for part in name.split("."))
