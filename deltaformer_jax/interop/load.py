"""`load_pretrained`: a folder of the Hugging Face hub's format as a model of ours."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from deltaformer_jax.config import ModelConfig
from deltaformer_jax.host.spelling import did_you_mean
from deltaformer_jax.interop import own
from deltaformer_jax.interop.fields import Fields, of_text
from deltaformer_jax.interop.files import BUFFER, FLOATS, Tensors, read_json, refuse_run, usual_name
from deltaformer_jax.interop.mapping import Correspondence, mapping
from deltaformer_jax.interop.sources import SOURCES, Source
from deltaformer_jax.interop.sources.single_layers import LAYERS
from deltaformer_jax.interop.tables import to_ours
from deltaformer_jax.model import LanguageModel
from deltaformer_jax.model_parts import ModelParts, flat, merge, model_parts, nested

# What a multimodal file holds besides the text model.
_SKIPPED = ("model.visual.", "mtp.")
_TIED = "lm_head.weight"  # what a tied model's file may hold beside the table


def load_pretrained(folder: str | os.PathLike, *, compute_dtype: str = "float32") -> tuple[LanguageModel, ModelConfig]:
    """(the model, its config) from a folder with config.json and safetensors.

        model, config = load_pretrained("Qwen3-0.6B")

    The model types are those of `interop.sources`: fla's deltaformer, delta_net, gated_deltanet, kda, gla, retnet,
    transformer and forgetting_transformer; transformers' llama, qwen3, qwen3_5 (text) and olmo_hybrid; and our own,
    deltaformer_jax.

    compute_dtype: "float32" or "bfloat16", of activations and products. Parameters are float32, whatever the file's
    dtype is: bfloat16, float16 and float32 fit into it without loss. Tensors are read one by one from the mapped file,
    so that memory grows by the parameters and one tensor.

    Raises ValueError or OSError, in one line: for a model type that is not known; for fields of config.json without an
    equivalent, all of them; for tensors that are unknown, missing or of another shape, all of them; for pickles.
    """
    folder = Path(folder).expanduser()
    source, config = read_config(folder)
    config = dataclasses.replace(config, compute_dtype=compute_dtype)
    files = Tensors(folder)
    if source is None:
        parts = model_parts(config)
        return merge(parts, _read_own(folder, files, parts)), config
    names = _names(folder, files, source)
    try:
        found = mapping(config, source.for_shapes({name: files.shape(given) for name, given in names.items()}))
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from None
    return merge(found.parts, read_params(folder, files, names, found)), config


def read_config(folder: Path) -> tuple[Source | None, ModelConfig]:
    """The source and our config of the folder's config.json. None: the folder is of our own model type."""
    values = read_json(folder / "config.json")
    refuse_run(folder, values)
    kind = values.get("model_type")
    if kind == own.MODEL_TYPE:
        try:
            return None, own.read(values)
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from None
    values = of_text(values)
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in SOURCES:
        layers = isinstance(kind, str) and kind in LAYERS
        hint = "; load_layer reads layers of it" if layers else did_you_mean(str(kind), SOURCES)
        raise ValueError(f"{folder / 'config.json'}: model_type = {kind!r} is not one of {', '.join(SOURCES)}{hint}")
    source = SOURCES[kind]
    try:
        return source, source.read(Fields(values, source.ignored))
    except ValueError as error:
        raise ValueError(f"{folder}: {kind}: {error}") from None


def _read_own(folder: Path, files: Tensors, parts: ModelParts) -> dict[str, Any]:
    leaves = {own.name_of(path): (path, leaf.shape) for path, leaf in flat(parts.params)}
    _refuse(folder, _unlike(files, dict.fromkeys(files), {name: shape for name, (_, shape) in leaves.items()}))
    params = {}
    for name, (path, shape) in leaves.items():
        array = _zeros(shape)
        files.read_into(name, array)
        params[path] = jax.device_put(array)
    files.close()
    return nested(params)


def read_params(folder: Path, files: Tensors, names: dict[str, str], found: Correspondence) -> dict[str, Any]:
    """The parameters, nested dicts of float32 arrays. names: a tensor's usual name -> its name in the files."""
    _check(folder, files, names, found)
    params = {path: _zeros(leaf.shape) for path, leaf in flat(found.parts.params)}
    for place in found.places:
        arrays = [files[names[_held(options, names)]] for options in place.tensors]
        parts = to_ours(place.row, arrays, place.shapes)  # views; the next line makes them float32
        for path, part in zip(place.parameters, parts, strict=True):
            params[path][place.period] = part
    path, name = found.table
    vocabulary = files.shape(names[name])[0]
    files.read_into(names[name], params[path][:vocabulary])
    if found.head is None and _TIED in names and not files.equals(names[_TIED], params[path][:vocabulary]):
        raise ValueError(
            f"{folder}: tie_word_embeddings = true, but {names[_TIED]} is not {names[name]}; set it to false in "
            f"config.json, or leave {names[_TIED]} out"
        )
    path, name = found.norm
    files.read_into(names[name], params[path])
    if found.head is not None:
        path, name = found.head
        files.read_into(names[name], params[path][:, :vocabulary].T)
    files.close()
    # Unlike jnp.asarray, which copies.
    return nested({path: jax.device_put(params.pop(path)) for path in list(params)})


def _names(folder: Path, files: Tensors, source: Source) -> dict[str, str]:
    """Their usual name -> the name in the file, without what belongs to no text model or has no function. Raises
    ValueError, naming both, for two tensors of one usual name."""
    found: dict[str, str] = {}
    for name in files:
        if name.startswith(_SKIPPED) or name.endswith((*source.dropped, BUFFER)):
            continue
        other = found.setdefault(usual_name(name), name)
        if other != name:
            raise ValueError(f"{folder}: {other} and {name} are the same tensor of a text model; leave one of them out")
    return found


def _held(options: tuple[str, ...], names: dict[str, str]) -> str:
    return next((name for name in options if name in names), options[0])


def _zeros(shape: tuple[int, ...]) -> np.ndarray:
    """float32 zeros that begin where JAX on a CPU can take them as they are, without a copy."""
    size, alignment = 4 * math.prod(shape), 64
    memory = np.zeros(size + alignment, np.uint8)
    begin = -memory.ctypes.data % alignment
    return memory[begin : begin + size].view(np.float32).reshape(shape)


def _check(folder: Path, files: Tensors, names: dict[str, str], found: Correspondence) -> None:
    """Raise ValueError with every tensor that is unknown, missing or of another shape or dtype."""
    expected: dict[str, tuple[int, ...] | None] = {}
    missing = []
    vocabulary = merge(found.parts, found.parts.params).embedding.vocab_size
    width = dict(flat(found.parts.params))[found.table[0]].shape[1]
    for place in found.places:
        several = len(place.tensors) > 1
        for options, shape in zip(place.tensors, place.theirs, strict=True):
            name = _held(options, names)
            # The rows of several tensors are laid end to end, so only their sum is known.
            rest_fits = several and name in names and files.shape(names[name])[1:] == shape[1:]
            expected[name] = None if rest_fits and files.shape(names[name]) else shape
        if several and all(expected[_held(options, names)] is None for options in place.tensors):
            rows = sum(files.shape(names[_held(options, names)])[0] for options in place.tensors)
            if rows != sum(shape[0] for shape in place.theirs):
                first = _held(place.tensors[0], names)
                missing.append(f"{first} and its fellows: {rows} rows, not {sum(s[0] for s in place.theirs)}")
    expected[found.table[1]] = (vocabulary, width)
    expected[found.norm[1]] = (width,)
    if found.head is not None:
        expected[found.head[1]] = (vocabulary, width)
    elif _TIED in names:
        expected[_TIED] = (vocabulary, width)
    _refuse(folder, _unlike(files, names, expected) + missing)


def _unlike(files: Tensors, names: dict[str, str | None], expected: Mapping[str, tuple[int, ...] | None]) -> list[str]:
    """What differs between the tensors there are and those expected. A shape that is None may be any."""
    names = {name: given or name for name, given in names.items()}
    problems = [f"missing {name}" for name in expected if name not in names]
    problems += [f"unknown {name}" for name in names if name not in expected]
    for name, shape in expected.items():
        if name in names and shape is not None and files.shape(names[name]) != shape:
            problems.append(f"{name}: shape {list(files.shape(names[name]))}, not {list(shape)}")
        if name in names and files.dtype(names[name]) not in FLOATS:
            problems.append(f"{name}: dtype {files.dtype(names[name])}, not one of {', '.join(FLOATS)}")
    return problems


def _refuse(folder: Path, problems: list[str]) -> None:
    if problems:
        raise ValueError(f"{folder}: {'; '.join(problems)}")
