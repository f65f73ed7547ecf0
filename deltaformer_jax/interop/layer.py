"""`load_layer` and `save_layer`: one layer's mixer of a model that is not ours as a whole."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from deltaformer_jax.config import ModelConfig
from deltaformer_jax.host.spelling import did_you_mean
from deltaformer_jax.interop.files import BUFFER, DTYPES, INDEX, NAMES, ONE, Tensors, read_json
from deltaformer_jax.interop.kinds import misfits
from deltaformer_jax.interop.mapping import keys_of
from deltaformer_jax.interop.own import MODEL_TYPE, name_of
from deltaformer_jax.interop.sources import SOURCES
from deltaformer_jax.interop.sources.single_layers import LAYERS, Layer
from deltaformer_jax.interop.tables import Row, shapes, to_ours, to_theirs
from deltaformer_jax.layers.adapters import merged
from deltaformer_jax.layers.mixers.build import build_mixer
from deltaformer_jax.model_parts import ModelParts, flat, merge, model_parts, nested, params_of

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
    source, config, parts = _parts(folder, layer, compute_dtype)
    files = Tensors(folder)
    arrays = {short: np.asarray(files[name], np.float32) for short, name in _names(files, layer).items()}
    try:
        tensors = source.prepare(arrays)
    except KeyError as error:
        raise ValueError(f"{folder}: layer {layer}: missing {error.args[0]}") from None
    except ValueError as error:
        raise ValueError(f"{folder}: layer {layer}: {error}; its shapes are not those of config.json") from None
    return merge(parts, _params(folder, layer, dict(flat(parts.params)), source, tensors)), config


def save_layer(
    mixer: nnx.Module, folder: str | os.PathLike, layer: int, *, like: str | os.PathLike, dtype: str | None = None
) -> None:
    """Write a mixer as layer `layer` of a folder of the hub's format: the inverse of `load_layer`.

        save_layer(mixer, "OUT", 0, like="Qwen3-Next-80B-A3B")

    like: the folder whose config.json the layer belongs to, which is copied. Where it has the layer's tensors, those
    written have their names, shapes and dtypes: a layer that is loaded and saved comes back bit for bit. dtype:
    "float32", "bfloat16" or "float16", of all tensors; None: as in `like`, or float32.

    Each layer becomes a file of its own, which model.safetensors.index.json names beside those of earlier calls. So
    the folder holds the mixers that were saved and nothing else, and `load_layer` reads it. A gate of bailing_hybrid
    whose first product was trained is written as the product of its two.

    Raises ValueError or OSError, in one line, before anything is written: as `load_layer` for the config; for a mixer
    that is not one of this layer, with all its parameters that differ; for a folder that has the layer already or
    another model's config.json; and for numbers that float16 cannot hold.
    """
    folder, like = Path(folder).expanduser(), Path(like).expanduser()
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} must be one of {', '.join(DTYPES)}, or None")
    source, _, parts = _parts(like, layer, "float32")
    text = (like / "config.json").read_bytes()
    index = read_json(folder / INDEX) if (folder / INDEX).exists() else {"metadata": {}, "weight_map": {}}
    file = f"layer-{layer:05d}.safetensors"
    if (folder / file).exists() or (folder / ONE).exists():
        raise FileExistsError(f"{folder}: holds layer {layer} already; give another folder")
    if (folder / "config.json").exists() and (folder / "config.json").read_bytes() != text:
        raise FileExistsError(f"{folder}: holds the config.json of another model than {like}; give another folder")
    tensors = source.restore(_theirs(layer, dict(flat(params_of(merged(mixer)))), dict(flat(parts.params)), source))
    files = Tensors(like) if any((like / name).exists() for name in (ONE, INDEX)) else None
    named = {} if files is None else _names(files, layer)
    written = {}
    for short, array in tensors.items():
        name = named.get(short, f"model.layers.{layer}.{short}")
        found = files.dtype(name) if short in named else "F32"
        kind = DTYPES[dtype or NAMES.get(found, "float32")]
        shape = files.shape(name) if short in named else source.shapes.get(short, array.shape)
        if kind == np.float16 and (most := float(np.abs(array).max())) > float(np.finfo(kind).max):
            raise ValueError(f"dtype='float16' cannot hold {most:.3g} of {name}; use bfloat16")
        written[name] = np.ascontiguousarray(array.reshape(shape).astype(kind))
    folder.mkdir(parents=True, exist_ok=True)
    save_file(written, folder / file, {"format": "pt"})
    index["weight_map"] |= dict.fromkeys(written, file)
    size = index["metadata"].get("total_size", 0) + sum(array.nbytes for array in written.values())
    index["metadata"]["total_size"] = size
    (folder / "config.json").write_bytes(text)
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _parts(folder: Path, layer: int, compute_dtype: str) -> tuple[Layer, ModelConfig, ModelParts]:
    """(what the layer is, the config of a model of one such layer, its mixer's parts)."""
    values = read_json(folder / "config.json")
    if isinstance(values.get("text_config"), dict):
        values = values["text_config"]
    # null is an absent field; but a bound that is null is none.
    values = {name: value for name, value in values.items() if value is not None or name == "linear_lower_bound"}
    source = _layer_of(folder, values, layer)
    config = ModelConfig(
        vocab_size=1, d_model=values["hidden_size"], num_layers=1, mixers=(source.mixer,), compute_dtype=compute_dtype
    )
    build = lambda config, *, rngs: build_mixer(config, source.mixer, output_scale=1.0, rngs=rngs)
    try:
        return source, config, model_parts(config, build)
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'}: layer {layer}: {error}") from None


def _layer_of(folder: Path, values: dict[str, Any], layer: int) -> Layer:
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in LAYERS:
        whole = kind in [*SOURCES, MODEL_TYPE]
        hint = "; load_pretrained reads it" if whole else did_you_mean(str(kind), LAYERS)
        raise ValueError(f"{folder / 'config.json'}: model_type = {kind!r} is not one of {', '.join(LAYERS)}{hint}")
    needed = [f"{name}: missing" for name in ("hidden_size", "num_hidden_layers") if values.get(name) is None]
    wrong = misfits(values) + needed
    for name in () if wrong else ("linear_attn_config", "rope_parameters"):
        wrong += misfits(values.get(name, {}), f"{name}.")
    if wrong:
        raise ValueError(f"{folder / 'config.json'}: {'; '.join(wrong)}")
    count, kinds = values["num_hidden_layers"], values.get("layer_types")
    if kinds is not None and len(kinds) != count:
        raise ValueError(f"{folder / 'config.json'}: layer_types names {len(kinds)} layers of {count}; name each")
    if not isinstance(layer, int) or isinstance(layer, bool) or not 0 <= layer < count:
        raise ValueError(f"layer={layer!r}: {folder} has layers 0 to {count - 1}")
    try:
        return LAYERS[kind](values, layer)
    except KeyError as error:
        raise ValueError(f"{folder / 'config.json'}: {error.args[0]}: missing") from None
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None


def _names(files: Tensors, layer: int) -> dict[str, str]:
    """The names of the tensors of the layer's mixer within the layer -> those in the files."""
    place = re.compile(rf"(?:model\.)?(?:language_model\.)?(?:model\.)?layers\.{layer}\.(.*)")
    named = {found[1]: name for name in files if (found := place.fullmatch(name))}
    return {short: n for short, n in named.items() if short.startswith(_MODULES) and not short.endswith(BUFFER)}


def _rows(source: Layer, ours: dict) -> Iterator[tuple[Row, list[tuple]]]:
    """The rows of the mixer's table that it has the parameters of, with their paths."""
    for row in source.rows:
        paths = [keys_of(name.removeprefix("mixer.")) for name in row.parameters]
        if all(name.startswith("mixer.") for name in row.parameters) and all(path in ours for path in paths):
            yield row, paths


def _theirs(layer: int, given: dict, ours: dict, source: Layer) -> dict[str, np.ndarray]:
    """The tensors by the names of the table. Raises ValueError if the mixer is not one of this layer."""
    shape = lambda leaves, path: list(leaves[path].shape) if path in leaves else "absent"
    problems = [
        f"{name_of(path)} is {shape(given, path)} in the mixer and {shape(ours, path)} by config.json"
        for path in sorted({*given, *ours}, key=name_of)
        if shape(given, path) != shape(ours, path)
    ]
    if problems:
        raise ValueError(f"the mixer is not one of layer {layer}: {'; '.join(problems)}")
    tensors = {}
    for row, paths in _rows(source, ours):
        parts = to_theirs(row, [np.asarray(given[path], np.float32) for path in paths])
        tensors |= dict(zip(row.tensors, parts, strict=True))
    return tensors


def _params(folder: Path, layer: int, ours: dict, source: Layer, tensors: dict[str, np.ndarray]) -> dict[str, Any]:
    """The mixer's parameters, nested dicts. Raises ValueError with all tensors that do not fit."""
    params, problems = {}, []
    for row, paths in _rows(source, ours):
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
