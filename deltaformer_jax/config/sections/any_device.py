"""The same model for any device."""

import dataclasses

from deltaformer_jax.config.imports import is_import
from deltaformer_jax.config.mixer import Mixer
from deltaformer_jax.config.sections.model import ModelConfig


def on_any_device(model: ModelConfig) -> ModelConfig:
    """The same model with the choice of implementation left to the ops.

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
