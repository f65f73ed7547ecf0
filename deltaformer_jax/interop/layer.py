"""`load_layer`: one layer's mixer of a model that is not ours as a whole."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from deltaformer_jax.config import ModelConfig
from deltaformer_jax.host.spelling import did_you_mean
from deltaformer_jax.interop.files import Tensors, read_json
from deltaformer_jax.interop.kinds import misfits
from deltaformer_jax.interop.mapping import keys_of
from deltaformer_jax.interop.own import MODEL_TYPE
from deltaformer_jax.interop.sources import SOURCES
from deltaformer_jax.interop.sources.single_layers import LAYERS, Layer
from deltaformer_jax.interop.tables import shapes, to_ours
from deltaformer_jax.layers.mixers.build import build_mixer
from deltaformer_jax.model_parts import flat, merge, model_parts, nested

# What holds a mixer's tensors in a layer.
_MODULES = ("self_attn.", "linear_attn.", "attention.")


def load_layer(
    folder: str | os.PathLike, layer: int, *, compute_dtype: str = "float32"
) -> tuple[nnx.Module, ModelConfig]:
    """(the mixer of layer `layer`, counted from 0; a config of one such layer) from a folder of the hub's format.

        mixer, config = load_layer("Qwen3-Next-80B-A3B", 0)
        y, _ = mixer(x)                                          # x [B, T, d_model] -> y [B, T, d_model]

    For models of which only some layers have an equivalent here: the gated delta rule and the gated attention of
    qwen3_next, and the Kimi Delta Attention of kimi_linear, glm5_next and bailing_hybrid. Their feed-forward layers,
    norms and embeddings are not read. `load_pretrained` reads models that are ours as a whole.

    compute_dtype: as for `load_pretrained`. Tensors of other layers are not read: memory grows by one mixer.

    Raises ValueError or OSError, in one line: for a model type or a kind of layer that is not known, a layer that there
    is not, and tensors that are unknown, missing or of another shape, all of them.
    """
    folder = Path(folder).expanduser()
    values = read_json(folder / "config.json")
    if isinstance(values.get("text_config"), dict):
        values = values["text_config"]
    source = _layer_of(folder, values, layer)
    config = ModelConfig(
        vocab_size=1, d_model=values["hidden_size"], num_layers=1, mixers=(source.mixer,), compute_dtype=compute_dtype
    )
    parts = model_parts(config, lambda config, *, rngs: build_mixer(config, source.mixer, output_scale=1.0, rngs=rngs))
    try:
        tensors = source.prepare(_tensors(folder, layer))
    except KeyError as error:
        raise ValueError(f"{folder}: layer {layer}: missing {error.args[0]}") from None
    except ValueError as error:
        raise ValueError(f"{folder}: layer {layer}: {error}; its shapes are not those of config.json") from None
    return merge(parts, _params(folder, layer, dict(flat(parts.params)), source, tensors)), config


def _layer_of(folder: Path, values: dict[str, Any], layer: int) -> Layer:
    kind = values.get("model_type")
    if kind not in LAYERS:
        whole = kind in (*SOURCES, MODEL_TYPE)
        hint = "; load_pretrained reads it" if whole else did_you_mean(str(kind), LAYERS)
        raise ValueError(f"{folder / 'config.json'}: model_type = {kind!r} is not one of {', '.join(LAYERS)}{hint}")
    needed = [f"{name}: missing" for name in ("hidden_size", "num_hidden_layers") if values.get(name) is None]
    if wrong := misfits(values) + needed:
        raise ValueError(f"{folder / 'config.json'}: {'; '.join(wrong)}")
    count, kinds = values["num_hidden_layers"], values.get("layer_types")
    if kinds is not None and len(kinds) != count:
        raise ValueError(f"{folder / 'config.json'}: layer_types names {len(kinds)} layers of {count}; name each")
    if not 0 <= layer < count:
        raise ValueError(f"layer={layer}: {folder} has layers 0 to {count - 1}")
    try:
        return LAYERS[kind](values, layer)
    except KeyError as error:
        raise ValueError(f"{folder / 'config.json'}: {error.args[0]}: missing") from None
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None


def _tensors(folder: Path, layer: int) -> dict[str, np.ndarray]:
    """The arrays of the layer's mixer, by their names in the layer."""
    files = Tensors(folder)
    place = re.compile(rf"(?:model\.)?(?:language_model\.)?(?:model\.)?layers\.{layer}\.(.*)")
    named = {found[1]: name for name in files if (found := place.fullmatch(name))}
    return {short: np.asarray(files[name], np.float32) for short, name in named.items() if short.startswith(_MODULES)}


def _params(folder: Path, layer: int, ours: dict, source: Layer, tensors: dict[str, np.ndarray]) -> dict[str, Any]:
    """The mixer's parameters, nested dicts. Raises ValueError with all tensors that do not fit."""
    params, problems = {}, []
    for row in source.rows:
        paths = [keys_of(name.removeprefix("mixer.")) for name in row.parameters]
        if not all(name.startswith("mixer.") for name in row.parameters) or not all(path in ours for path in paths):
            continue
        sizes = [ours[path].shape for path in paths]
        arrays = []
        for name, shape in zip(row.tensors, shapes(row, sizes), strict=True):
            array = tensors.pop(name, None)
            if array is None:
                problems.append(f"missing {name}")
            elif array.size != np.prod(shape) or (array.ndim == len(shape) > 1 and array.shape != shape):
                problems.append(f"{name}: shape {list(array.shape)}, not {list(shape)}")
            else:
                arrays.append(array.reshape(shape))
        if len(arrays) == len(row.tensors):
            parts = to_ours(row, arrays, sizes)
            params |= {path: jnp.asarray(part) for path, part in zip(paths, parts, strict=True)}
    problems += [f"unknown {name}" for name in tensors]
    if problems:
        raise ValueError(f"{folder}: layer {layer}: {'; '.join(problems)}")
    return nested(params)
