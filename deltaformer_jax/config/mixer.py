"""One entry of `model.mixers` that says more than a name."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True, init=False)
class Mixer:
    """A mixer with settings of its own, or a mixer of yours.

    `Mixer("softmax_attention", window=128, num_heads=8)` is softmax attention with those fields of `ModelConfig`
    replaced in that layer. `Mixer(MyMixer, width=3)` is a class of yours, called with `width=3`
    (`deltaformer_jax.layers.mixers.protocol` says what a mixer is). `name` is a mixer's name or "package.module:Class",
    as which a class stands in config.json; a bare name in `model.mixers` stands for a mixer without overrides.
    """

    name: str
    overrides: tuple[tuple[str, Any], ...]
    # The class itself, which may be one that no import finds again, as in a notebook.
    given: type | None = dataclasses.field(compare=False, repr=False)

    def __init__(self, name: str | type, **overrides: Any):
        given = name if isinstance(name, type) else None
        object.__setattr__(self, "name", name if given is None else f"{name.__module__}:{name.__qualname__}")
        object.__setattr__(self, "overrides", tuple(sorted((key, _plain(value)) for key, value in overrides.items())))
        object.__setattr__(self, "given", given)


def _plain(value: Any) -> Any:
    """Lists as tuples, which are hashable and what config.json's lists are read as."""
    return tuple(map(_plain, value)) if isinstance(value, list) else value


def entry(mixer: str | Mixer) -> Mixer:
    """An entry of `model.mixers` as a Mixer."""
    return mixer if isinstance(mixer, Mixer) else Mixer(mixer)
