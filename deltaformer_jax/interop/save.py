"""`save_pretrained`: a model of ours as a folder of the Hugging Face hub's format."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from deltaformer_jax.config import ModelConfig
from deltaformer_jax.config.mixer import entry
from deltaformer_jax.data.chat import ChatFormat
from deltaformer_jax.data.tokenizer.base import EOT_NAMES
from deltaformer_jax.data.tokenizer.pretrained import CONFIG, TRAINED_HERE
from deltaformer_jax.host.spelling import did_you_mean
from deltaformer_jax.interop import own
from deltaformer_jax.interop.compare import differences
from deltaformer_jax.interop.fields import Fields
from deltaformer_jax.interop.files import DTYPES, SHARD_BYTES, read_json, write
from deltaformer_jax.interop.kept import KEPT
from deltaformer_jax.interop.kinds import misfits
from deltaformer_jax.interop.mapping import mapping
from deltaformer_jax.interop.sources import SOURCES, Source
from deltaformer_jax.interop.tables import to_theirs
from deltaformer_jax.layers.adapters import merged
from deltaformer_jax.layers.linear import AdaptedKernel
from deltaformer_jax.model_parts import ModelParts, flat, model_parts, params_of

_PATH = (str, os.PathLike)
# What each argument of save_pretrained may be.
_KINDS: dict[str, tuple[Any, str]] = {
    "config": (ModelConfig, "the ModelConfig that the model was made from"),
    "folder": (_PATH, "the path of a new folder"),
    "model_type": ((str, type(None)), "a model type, or None"),
    "dtype": ((str, Mapping), "the dtype of all tensors, or of each by its name"),
    "tokenizer": ((*_PATH, type(None)), "the path of a tokenizer.json, or None"),
    "chat": ((ChatFormat, type(None)), "a ChatFormat, or None"),
    "card": (str, 'the text of README.md, or ""'),
    "kept": ((Mapping, type(None)), "what kept.read_kept returns, or None"),
    "tokenizer_config": ((Mapping, type(None)), "the fields of tokenizer_config.json, or None"),
    "shard_bytes": (int, "a number of bytes above 0"),
}

BYTES = 256  # end-of-text of the tokenizer whose other tokens are bytes


def save_pretrained(
    model: nnx.Module,
    config: ModelConfig,
    folder: str | os.PathLike,
    *,
    model_type: str | None = None,
    dtype: str | Mapping[str, str] = "float32",
    tokenizer: str | os.PathLike | None = None,
    chat: ChatFormat | None = None,
    card: str = "",
    kept: Mapping[str, Any] | None = None,
    tokenizer_config: Mapping[str, Any] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> str:
    """Write config.json and safetensors that fla or transformers open; return the model type.

        save_pretrained(model, config, "out")

    model_type: None: that of `kept`, or else the first of `interop.sources`, that can say the config; else our own,
    "deltaformer_jax", which `load_pretrained` reads and nothing else does; the card then says why. dtype: of the
    tensors; or of each by its name, where "" stands for all that are not named, as `kept.read_dtypes` gives those of a
    folder. tokenizer: a tokenizer.json, copied byte for byte; its end-of-text becomes the config's bos and eos token.
    chat: the form of the model's conversations, whose template becomes tokenizer_config.json, by which transformers'
    apply_chat_template renders them; the plain form has none. Its `ends`, if it has them, become the eos tokens. card:
    the text of README.md; "": a short one, which says that the training data and the scores are not stated.
    `convert --to-hf` writes those of a run.
    kept: the ids of special tokens and max_position_embeddings of config.json, its model_type, tied_head, whether a
    tied model's table is written as lm_head.weight too, and gla's and retnet's fuse_norm: as `kept.read_kept` gives
    those of a folder.
    tokenizer_config: the fields of tokenizer_config.json, beside those of `chat`.

    Adapters (`optimizer.lora_rank`) are added to their kernels.

    Raises ValueError if the named model type cannot say the config, with the fields that it cannot say; if the model is
    not one of the config, with the parameters that differ; for numbers that float16 cannot hold; and for an argument of
    another kind. Raises FileExistsError if the folder holds weights already, NotADirectoryError if it is a file, and
    FileNotFoundError if there is no such tokenizer. All of these are raised before anything is written.
    """
    _check_arguments(locals())
    folder = Path(folder).expanduser()
    dtypes = _Dtypes(dtype)
    if folder.exists() and any(folder.glob("*.safetensors")):
        raise FileExistsError(f"{folder}: holds weights already; give another folder")
    if tokenizer is not None and not Path(tokenizer).is_file():
        raise FileNotFoundError(f"tokenizer={str(tokenizer)!r}: no such file; give a tokenizer.json, or None")
    ids = _token_ids(tokenizer)
    kept = dict(kept or {})
    source, said, why = choose(config, model_type, kept.pop("model_type", None))
    twice = bool(kept.pop("tied_head", False)) and config.tie_embeddings
    fuse = kept.pop("fuse_norm", True)
    if source is not None and source.second_names is not None:
        said = said if fuse else said | {"fuse_norm": False}
        source = source.for_config(said)
    params = dict(flat(params_of(merged(model))))
    found = None if source is None else mapping(config, source)
    _check_model(folder, model, params, config, model_parts(config) if found is None else found.parts)
    _check_range(params, dtypes)
    if found is None:
        writer = _OwnWriter(params, dtypes)
    else:
        writer = _Writer(found, params, dtypes, config.vocab_size, source.outside["head"] if twice else None)
    folder.mkdir(parents=True, exist_ok=True)
    write(folder, writer, list(writer.names), writer.bytes_of, shard_bytes)
    kind, made = (own.MODEL_TYPE, "LanguageModel") if source is None else (source.model_type, source.class_name)
    ids |= {name: kept.pop(name) for name in list(ids) if name in kept}
    if source is not None and not source.has_positions:
        kept.pop("max_position_embeddings", None)
    if chat is not None and chat.ends:
        ids["eos_token_id"] = list(chat.ends)
    text = {"architectures": [made], "model_type": kind, "torch_dtype": dtypes.most, **ids, **kept, **said}
    generation = {"do_sample": True, **ids}
    for name, values in (("config.json", text), ("generation_config.json", generation)):
        (folder / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(card or _card(kind, config, model, why), encoding="utf-8")
    if tokenizer is not None:
        (folder / "tokenizer.json").write_bytes(Path(tokenizer).read_bytes())
    if said := _tokenizer_config(chat, tokenizer_config or {}):
        (folder / CONFIG).write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")
    return kind


def _check_arguments(given: Mapping[str, Any]) -> None:
    """Raise ValueError or NotADirectoryError, naming the argument, for one of another kind. given: all by
    their names."""
    if not isinstance(given["model"], nnx.Module) or not hasattr(given["model"], "embedding"):
        raise ValueError(f"model is a {type(given['model']).__name__}; give a LanguageModel")
    for name, (kind, wanted) in _KINDS.items():
        value = given[name]
        if not isinstance(value, kind):
            raise ValueError(f"{name} is a {type(value).__name__}; give {wanted}")
    shard_bytes = given["shard_bytes"]
    if isinstance(shard_bytes, bool) or shard_bytes < 1:
        raise ValueError(f"shard_bytes={shard_bytes!r}: give a number of bytes above 0")
    kept = given["kept"] or {}
    for name in kept:
        if name not in KEPT:
            raise ValueError(f"kept: {name!r} is not one of {', '.join(KEPT)}{did_you_mean(str(name), KEPT)}")
    if wrong := misfits(kept):
        raise ValueError(f"kept: {'; '.join(wrong)}")
    folder = Path(given["folder"]).expanduser()
    there = next((part for part in (folder, *folder.parents) if part.exists()), folder)
    if there.exists() and not there.is_dir():
        raise NotADirectoryError(f"{folder}: {there} is a file; give the path of a new folder")


def _tokenizer_config(chat: ChatFormat | None, given: Mapping[str, Any]) -> dict[str, Any]:
    if chat is None or chat.template is None:
        return dict(given)
    usual = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": chat.template}
    if chat.ends:
        return usual | dict(given) | chat.variables
    # A template that names another token would render another text than in training.
    rest = {name: value for name, value in given.items() if name not in ("bos_token", "eos_token")}
    return usual | rest | TRAINED_HERE | chat.variables


def choose(
    config: ModelConfig, model_type: str | None, first: str | None = None
) -> tuple[Source | None, dict[str, Any], str]:
    """(the source that can say `config`, its config.json, ""): what is read from that is `config` again.

    None: our own type; then the last is why no other fits, or "" if it was asked for. model_type: no other than this.
    first: the one that is tried before the others.
    """
    known = [*SOURCES, own.MODEL_TYPE]
    if model_type is not None and model_type not in known:
        raise ValueError(
            f"model_type={model_type!r} is not one of {', '.join(known)}{did_you_mean(str(model_type), known)}"
        )
    if (model_type or first) == own.MODEL_TYPE:
        return None, own.say(config), ""
    mixers = {entry(mixer).name for mixer in config.mixers}
    candidates = [SOURCES[model_type]] if model_type else [s for s in SOURCES.values() if mixers <= set(s.rows)]
    candidates.sort(key=lambda source: source.model_type != first)  # the others in their order
    reasons = []
    for source in candidates:
        try:
            said = source.write(config)
            read = source.read(Fields(said, source.ignored))
        except (ValueError, StopIteration) as error:
            reasons.append(f"{source.model_type}: {error or 'lacks its layers'}")
            continue
        different = differences(config, read)
        if not different:
            return source, said, ""
        reasons.append(f"{source.model_type} cannot say {', '.join(different)}")
    if model_type is None:
        none = f"no model type of another project has layers of {', '.join(sorted(mixers))}"
        return None, own.say(config), "; ".join(reasons) or none
    raise ValueError("; ".join(reasons))


def _token_ids(tokenizer: str | os.PathLike | None) -> dict[str, Any]:
    """The ids of special tokens. They are said even where there are none: a class's own may lie outside the vocabulary.

    End-of-text stands before a document and after it.
    """
    end = None
    if tokenizer is not None:
        said = read_json(Path(tokenizer))
        if "model" not in said and "deltaformer_jax" not in said:
            raise ValueError(f"tokenizer={str(tokenizer)!r}: holds no tokenizer; give a tokenizer.json, or None")
        named = {token.get("content"): token.get("id") for token in said.get("added_tokens") or []}
        end = BYTES if said.get("deltaformer_jax") else next((named[name] for name in EOT_NAMES if name in named), None)
    return {"bos_token_id": end, "eos_token_id": end, "pad_token_id": None}


def _check_model(
    folder: Path, model: nnx.Module, params: dict[tuple, Any], config: ModelConfig, parts: ModelParts
) -> None:
    """Raise ValueError if `config` does not make this model. JAX would read past its last layer without a word."""
    expected = {path: tuple(leaf.shape) for path, leaf in flat(parts.params)}
    given = {path: tuple(array.shape) for path, array in params.items()}
    problems = []
    # The table is padded, so that two vocabularies may have one shape.
    if (size := model.embedding.vocab_size) != config.vocab_size:
        problems.append(f"vocab_size is {size} in the model and {config.vocab_size} in config")
    for path in sorted({*expected, *given}, key=own.name_of):
        ours, theirs = (_shape(shapes.get(path)) for shapes in (given, expected))
        if ours != theirs:
            problems.append(f"{own.name_of(path)} is {ours} in the model and {theirs} by config")
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(
            f"{folder}: the model is not one of this config: {'; '.join(problems[:3])}{more}; give the config that the "
            "model was made from"
        )


def _shape(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else str(list(shape))


def _check_range(params: dict, dtypes: _Dtypes) -> None:
    if not dtypes.have("float16"):
        return
    most = float(np.finfo(np.float16).max)
    for path, array in params.items():
        if (largest := float(np.abs(np.asarray(array)).max())) > most:
            raise ValueError(f"dtype='float16' cannot hold {largest:.3g} of {own.name_of(path)}; use bfloat16")


class _Dtypes:
    """The dtype of each tensor by its name."""

    def __init__(self, said: str | Mapping[str, str]):
        self._named = dict(said) if isinstance(said, Mapping) else {"": said}
        for name, dtype in self._named.items():
            if not isinstance(dtype, str) or dtype not in DTYPES:
                raise ValueError(f"dtype={dtype!r}{name and f' of {name}'} must be one of {', '.join(DTYPES)}")
        self.most = self._named.setdefault("", "float32")

    def have(self, dtype: str) -> bool:
        return dtype in self._named.values()

    def of(self, *names: str) -> np.dtype:
        """That of the first of the names that is known."""
        return DTYPES[next((self._named[name] for name in names if name in self._named), self.most)]


class _OwnWriter:
    """The tensors of a file of our own by name."""

    def __init__(self, params, dtypes: _Dtypes):
        self._params, self._dtypes = {own.name_of(path): array for path, array in params.items()}, dtypes
        self.names = list(self._params)

    def __getitem__(self, name: str) -> np.ndarray:
        return np.asarray(self._params[name]).astype(self._dtypes.of(name))

    def bytes_of(self, name: str) -> int:
        return int(np.prod(self._params[name].shape)) * self._dtypes.of(name).itemsize


class _Writer:
    """The tensors of a file by name, each made when it is asked for."""

    def __init__(self, found, params, dtypes: _Dtypes, vocabulary: int, second: str | None):
        """second: the name by which the table is written once more."""
        self._params, self._vocabulary = params, vocabulary
        self._places, self._dtypes = {}, {}
        for place in found.places:
            for index, options in enumerate(place.tensors):
                self._places[options[0]] = (place, index)
                self._dtypes[options[0]] = dtypes.of(*options)
        self._outside = {name: (key, path) for key in ("table", "norm") for path, name in [getattr(found, key)]}
        if found.head is not None:
            self._outside[found.head[1]] = ("head", found.head[0])
        if second is not None:
            self._outside[second] = ("table", found.table[0])
        self._dtypes |= {name: dtypes.of(name) for name in self._outside}
        self.names = [*self._outside, *self._places]

    def __getitem__(self, name: str) -> np.ndarray:
        if name in self._outside:
            key, path = self._outside[name]
            array = np.asarray(self._params[path])
            array = array.T if key == "head" else array
            return (array if key == "norm" else array[: self._vocabulary]).astype(self._dtypes[name])
        place, index = self._places[name]
        arrays = [np.asarray(self._params[path][place.period]) for path in place.parameters]
        return to_theirs(place.row, arrays)[index].astype(self._dtypes[name])

    def bytes_of(self, name: str) -> int:
        if name in self._outside:
            return int(np.prod(self._params[self._outside[name][1]].shape)) * self._dtypes[name].itemsize
        place, index = self._places[name]
        return int(np.prod(place.theirs[index])) * self._dtypes[name].itemsize


def _card(kind: str, config: ModelConfig, model: nnx.Module, why: str) -> str:
    mixers = ", ".join(dict.fromkeys(entry(mixer).name for mixer in config.mixers))
    parts = jax.tree.leaves(model, is_leaf=lambda part: isinstance(part, AdaptedKernel))
    ranks = sorted({part.down.shape[-1] for part in parts if isinstance(part, AdaptedKernel)})
    adapted = f"- LoRA: adapters of rank {', '.join(map(str, ranks))}, added to their kernels.\n" if ranks else ""
    return (
        "---\ntags: [deltaformer_jax]\n---\n\n# A language model\n\n"
        f"- Model: {config.num_layers} layers of width {config.d_model}, {mixers}; {config.vocab_size} tokens.\n"
        f"{adapted}- Base model, training data, command and scores: not stated by the program that wrote the folder.\n"
        f"- Written by: `deltaformer_jax.interop.save_pretrained`, as a `{kind}`.\n"
        + (f"- No other model type: {why}.\n" if why else "")
    )
