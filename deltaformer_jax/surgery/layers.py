"""Remove layers from a model: x_{l+1} = x_l in the place of each, with no operation left."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from deltaformer_jax.config import ModelConfig
from deltaformer_jax.config.fields import rule_of
from deltaformer_jax.layers.mixers.build import FIELDS, unused_fields


def remove_layers(config: ModelConfig, params: Any, layers: Sequence[int]) -> tuple[ModelConfig, Any]:
    """(config, parameters) without the layers of these numbers, counted from 0 at the embedding.

    Args: params, nested dicts as `model_parts.ModelParts.params`, of arrays. They are not changed; the kept layers are
    copied.

    The pattern of mixers stays if the kept layers still follow it, as they always do if it has one entry. Otherwise it
    is the shortest that they follow, at the longest a list of all of them. Such a model has no loop over layers, and
    takes longer to compile. A setting that only the mixers of removed layers take goes back to its default, since a
    model is refused whose mixers do not take what it sets.

    The parameters that a new model would get depend on its number of layers; these are the trained ones. Raises
    ValueError, naming layers, for numbers that the model does not have, for one given twice, and if none would be left.
    """
    removed = sorted(layers)
    for number in removed:
        if isinstance(number, bool) or number not in range(config.num_layers):
            raise ValueError(f"layers: {number!r} is not one of the model's 0 to {config.num_layers - 1}")
    if len(set(removed)) < len(removed):
        raise ValueError(f"layers={list(layers)}: a layer can be removed once; give each number once")
    kept = [number for number in range(config.num_layers) if number not in removed]
    if not kept:
        raise ValueError(f"layers={list(layers)}: none would be left; give at most {config.num_layers - 1} of them")
    if not removed:
        return config, params
    width = len(config.mixers)
    order = [config.mixers[number % width] for number in kept]
    pattern = _pattern(order, config.mixers)
    blocks = {}
    for first in range(pattern):
        chosen = [_layer(params, number, width) for number in kept[first::pattern]]
        blocks[first] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *chosen)
    config = dataclasses.replace(config, num_layers=len(kept), mixers=tuple(order[:pattern]))
    defaults = {name: FIELDS[name].default for name in unused_fields(config) if rule_of(FIELDS[name]).must_be_used}
    config = dataclasses.replace(config, **defaults)
    return config, {**params, "blocks": blocks}


def _layer(params: Any, number: int, width: int) -> Any:
    """The parameters of one layer, which is in a period of `width` layers."""
    return jax.tree.map(lambda stack: stack[number // width], params["blocks"][number % width])


def _pattern(order: list, given: tuple) -> int:
    """The length of the pattern that these mixers repeat: that of `given` if it is one, otherwise the least."""
    repeated = lambda pattern: order == list(pattern) * (len(order) // len(pattern))
    if repeated(given):
        return len(given)
    return next(length for length in range(1, len(order) + 1) if repeated(order[:length]))
