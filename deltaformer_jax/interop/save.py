"""`save_pretrained`: a model of ours as a folder of the Hugging Face hub's format."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from flax import nnx

from deltaformer_jax.config import ModelConfig
from deltaformer_jax.config.mixer import entry
from deltaformer_jax.host.spelling import did_you_mean
from deltaformer_jax.interop.fields import Fields
from deltaformer_jax.interop.files import SHARD_BYTES, write
from deltaformer_jax.interop.mapping import flat, mapping
from deltaformer_jax.interop.sources import SOURCES, Source
from deltaformer_jax.interop.tables import to_theirs
from deltaformer_jax.layers.mixers.build import mixer_fields
from deltaformer_jax.model_parts import params_of

# Fields that say how to compute, not what.
_HOW = ("compute_dtype", "remat", "chunk_size", "implementation")
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16)}


def save_pretrained(
    model: nnx.Module,
    config: ModelConfig,
    folder: str | os.PathLike,
    *,
    model_type: str | None = None,
    dtype: str = "float32",
    tokenizer: str | os.PathLike | None = None,
    card: str = "",
    shard_bytes: int = SHARD_BYTES,
) -> str:
    """Write config.json and safetensors that fla or transformers open; return the model type.

        save_pretrained(model, config, "out")

    model_type: None: the first of `interop.sources` that can say the config. dtype: of the tensors. tokenizer: a
    tokenizer.json, copied byte for byte. card: the text of README.md; "": a short one.

    Raises ValueError if no model type can say the config, or not the named one, with the fields that it cannot say; and
    FileExistsError if the folder holds weights already.
    """
    folder = Path(folder).expanduser()
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} must be one of {', '.join(DTYPES)}")
    if folder.exists() and any(folder.glob("*.safetensors")):
        raise FileExistsError(f"{folder}: holds weights already; give another folder")
    source, said = choose(config, model_type)
    found = mapping(config, source)
    params = dict(flat(params_of(model)))
    writer = _Writer(found, params, DTYPES[dtype], config.vocab_size)
    folder.mkdir(parents=True, exist_ok=True)
    write(folder, writer, list(writer.names), writer.bytes_of, shard_bytes)
    text = {"architectures": [source.class_name], "model_type": source.model_type, "torch_dtype": dtype, **said}
    (folder / "config.json").write_text(json.dumps(text, indent=2) + "\n", encoding="utf-8")
    (folder / "generation_config.json").write_text('{"do_sample": true}\n', encoding="utf-8")
    (folder / "README.md").write_text(card or _card(source, config), encoding="utf-8")
    if tokenizer is not None:
        (folder / "tokenizer.json").write_bytes(Path(tokenizer).read_bytes())
    return source.model_type


def choose(config: ModelConfig, model_type: str | None) -> tuple[Source, dict[str, Any]]:
    """The source that can say `config`, and its config.json: what is read from that is `config` again."""
    if model_type is not None and model_type not in SOURCES:
        raise ValueError(
            f"model_type={model_type!r} is not one of {', '.join(SOURCES)}{did_you_mean(model_type, SOURCES)}"
        )
    mixers = {entry(mixer).name for mixer in config.mixers}
    candidates = [SOURCES[model_type]] if model_type else [s for s in SOURCES.values() if mixers <= set(s.rows)]
    reasons = []
    for source in candidates:
        try:
            said = source.write(config)
            read = source.read(Fields(said, source.ignored))
        except (ValueError, StopIteration) as error:
            reasons.append(f"{source.model_type}: {error or 'lacks its layers'}")
            continue
        different = _differences(config, read)
        if not different:
            return source, said
        reasons.append(f"{source.model_type} cannot say {', '.join(different)}")
    raise ValueError("; ".join(reasons) or f"no model type has layers of {', '.join(sorted(mixers))}")


def _differences(config: ModelConfig, read: ModelConfig) -> list[str]:
    """The fields in which two models differ, layer by layer, as "model.FIELD = VALUE"."""
    found = {}
    names = {field.name for field in dataclasses.fields(ModelConfig)} - {*_HOW, "mixers"}
    ones, others = _layers(config), _layers(read)
    if [one.name for one in ones] != [other.name for other in others]:
        found["mixers"] = config.mixers
    used = set().union(*(mixer_fields(one) for one in ones))
    everywhere = {"vocab_size", "d_model", "num_layers", "norm_gain", "norm_placement", "tie_embeddings"}
    for one, other in zip(ones, others):
        for name in sorted(names & (used | everywhere | {"norm_epsilon", "embedding_scale"})):
            if name not in everywhere | {"norm_epsilon", "embedding_scale"} and name not in mixer_fields(one):
                continue
            values = [_meant(model, mixer, name) for model, mixer in ((config, one), (read, other))]
            if values[0] != values[1]:
                found[name] = values[0]
    return [f"model.{name} = {value!r}" for name, value in found.items()]


def _layers(config: ModelConfig):
    return [entry(config.mixers[n % len(config.mixers)]) for n in range(config.num_layers)]


def _meant(config: ModelConfig, mixer, name: str) -> Any:
    """A field's value in a layer, with what its special value stands for."""
    value = dict(mixer.overrides).get(name, getattr(config, name))
    get = lambda other: dict(mixer.overrides).get(other, getattr(config, other))
    heads, width = get("num_heads"), get("head_dim")
    defaults = {
        "num_value_heads": (0, heads),
        "value_dim": (0, width),
        "conv_size": (-1, 4 if mixer.name in ("delta_net", "gated_delta_net", "kimi_delta_attention") else 0),
        "output_gate": (
            "auto",
            "off" if mixer.name in ("softmax_attention", "delta_former", "delta_net", "linear_attention") else "on",
        ),
        "output_gate_activation": ("auto", "sigmoid" if mixer.name == "kimi_delta_attention" else "swish"),
        "output_norm_epsilon": (0.0, config.norm_epsilon),
        "qk_norm_epsilon": (0.0, get("norm_epsilon")),
        "gate_rank": (0, None),
        "read_scale": (0.0, width**-0.5),
        "write_scale": (0.0, width**-0.5),
    }
    special, meant = defaults.get(name, (None, None))
    if name == "gate_rank" and not value:
        return (get("head_dim"), get("value_dim") or get("head_dim"))
    if name == "gate_rank":
        return (value, value)
    if name == "qk_norm_epsilon" and not get("qk_norm"):
        return None
    return meant if special is not None and value == special else value


class _Writer:
    """The tensors of a file by name, each made when it is asked for."""

    def __init__(self, found, params, dtype: np.dtype, vocabulary: int):
        self._params, self._dtype, self._vocabulary = params, dtype, vocabulary
        self._places = {}
        for place in found.places:
            for index, options in enumerate(place.tensors):
                self._places[options[0]] = (place, index)
        self._outside = {name: (key, path) for key in ("table", "norm") for path, name in [getattr(found, key)]}
        if found.head is not None:
            self._outside[found.head[1]] = ("head", found.head[0])
        self.names = [*self._outside, *self._places]

    def __getitem__(self, name: str) -> np.ndarray:
        if name in self._outside:
            key, path = self._outside[name]
            array = np.asarray(self._params[path])
            array = array.T if key == "head" else array
            return (array if key == "norm" else array[: self._vocabulary]).astype(self._dtype)
        place, index = self._places[name]
        arrays = [np.asarray(self._params[path][place.period]) for path in place.parameters]
        return to_theirs(place.row, arrays)[index].astype(self._dtype)

    def bytes_of(self, name: str) -> int:
        if name in self._outside:
            return int(np.prod(self._params[self._outside[name][1]].shape)) * self._dtype.itemsize
        place, index = self._places[name]
        return int(np.prod(place.theirs[index])) * self._dtype.itemsize


def _card(source: Source, config: ModelConfig) -> str:
    mixers = ", ".join(dict.fromkeys(entry(mixer).name for mixer in config.mixers))
    return (
        "---\ntags: [deltaformer_jax]\n---\n\n# A language model\n\n"
        f"{config.num_layers} layers of {mixers}, width {config.d_model}, {config.vocab_size} tokens.\n"
        f"Written by `deltaformer_jax.interop.save_pretrained` as a `{source.model_type}`.\n"
    )
