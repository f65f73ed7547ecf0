"""`Mixer`: an entry of `model.mixers` with overrides or with a class of the user's own."""

from __future__ import annotations

import dataclasses
from typing import Any

from deltaformer_jax.config.imports import is_import


@dataclasses.dataclass(frozen=True, init=False)
class Mixer:
    """An entry of `model.mixers`: a mixer with its own values of some fields, or a class of your own.

    `Mixer("softmax_attention", window=128, num_heads=8)` is softmax attention that uses these values instead of the
    `ModelConfig` fields of the same names. `Mixer(MyMixer, width=3)` is your class MyMixer, constructed with `width=3`;
    `deltaformer_jax.layers.mixers.protocol` defines what it must provide. A plain name in `model.mixers` is a mixer
    without overrides.

    `name`: a mixer's name, or "package.module:Class", which is also how config.json stores a class.
    """

    name: str
    overrides: tuple[tuple[str, Any], ...]
    # The class itself if one was given. It may be a class that cannot be imported by name, as in a notebook.
    given: type | None = dataclasses.field(compare=False, repr=False)

    def __init__(self, name: str | type, **overrides: Any):
        given = name if isinstance(name, type) else None
        object.__setattr__(self, "name", name if given is None else f"{name.__module__}:{name.__qualname__}")
        object.__setattr__(self, "overrides", tuple(sorted((key, _plain(value)) for key, value in overrides.items())))
        object.__setattr__(self, "given", given)


def _plain(value: Any) -> Any:
    """`value` with lists turned into tuples, which are hashable. Lists of config.json are read as tuples too."""
    return tuple(map(_plain, value)) if isinstance(value, list) else value


def with_given(mixer: str | Mixer, given: dict[str, Any]) -> str | Mixer:
    """The entry with the values of `given` for those fields that it has values of its own for."""
    if not isinstance(mixer, Mixer):
        return mixer
    own = dict(mixer.overrides)
    return Mixer(mixer.given or mixer.name, **own | {name: value for name, value in given.items() if name in own})


def entry(mixer: str | Mixer) -> Mixer:
    """An entry of `model.mixers` as a Mixer."""
    return mixer if isinstance(mixer, Mixer) else Mixer(mixer)


# The library's mixers without a rotary embedding. A class of the user's own may have one.
NOT_ROTATED = (
    *("linear_attention", "gated_linear_attention", "delta_net", "gated_delta_net", "kimi_delta_attention"),
    *("gated_delta_net_2", "delta_product", "gated_delta_product", "rwkv7"),
)


def with_rotary(model: Any, given: dict[str, Any]) -> Any:
    """The ModelConfig with `rope_base` and `rope_scaling` of `given` in all layers that are rotated, and in no other.

    Raises ValueError, naming what is given, if no layer is.
    """
    may = [mixer for mixer in map(entry, model.mixers) if mixer.name not in NOT_ROTATED]
    if not may:
        names = ", ".join(entry(mixer).name for mixer in model.mixers)
        raise ValueError(f"{', '.join(given)}: no layer of this model has a rotary embedding (its mixers: {names})")
    if not model.rope_base and not any(dict(mixer.overrides).get("rope_base") for mixer in may):
        raise ValueError(f"{', '.join(given)}: no layer of this model has a rotary embedding (model.rope_base = 0)")
    mixers = tuple(_with_rotary(mixer, given, bool(model.rope_base)) for mixer in model.mixers)
    return dataclasses.replace(model, mixers=mixers, **(given if model.rope_base else {}))


def _with_rotary(mixer: str | Mixer, given: dict[str, Any], others: bool) -> str | Mixer:
    """others: whether layers without a base of their own are rotated."""
    one = entry(mixer)
    own = dict(one.overrides)
    if "rope_base" not in own:
        return with_given(mixer, given)
    if own["rope_base"]:
        return with_given(mixer, given) if others else Mixer(one.given or one.name, **own | given)
    # Not rotated, so that it must not take the scaling of the others.
    return Mixer(one.given or one.name, **own | {"rope_scaling": "none"}) if "rope_scaling" in given else mixer


def on_any_device(model: Any) -> Any:
    """The same ModelConfig with the choice of implementation left to the ops.

    The parameters are the same; results differ by rounding. It serves programs that read a run trained on another
    platform, and decoding: a named kernel cannot resume from a cache.
    """

    def free(mixer):
        # A class of one's own may give the argument another meaning.
        if not isinstance(mixer, Mixer) or is_import(mixer.name):
            return mixer
        others = {field: value for field, value in mixer.overrides if field != "implementation"}
        return Mixer(mixer.name, **others)

    return dataclasses.replace(model, implementation="", mixers=tuple(map(free, model.mixers)))
