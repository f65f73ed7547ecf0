"""What a folder of the Hugging Face hub says of its tokenizer beside tokenizer.json: what comes before a text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from deltaformer_jax.data.tokenizer.base import Tokenizer
from deltaformer_jax.data.tokenizer.prefix import Prefix

CONFIG = "tokenizer_config.json"
# What tokenizer_config.json says of a model that was trained here.
TRAINED_HERE = {"trained_by": "deltaformer_jax"}


def pretrained_prefix(folder: Path, tokenizer: Tokenizer, file: Path | None = None) -> Prefix:
    """The prefix by which the tokenizer of a folder of the Hugging Face hub's format begins a text.

    `ids` are those that the post-processor of tokenizer.json puts before a text, as in transformers 5. If the file has
    no post-processor, it is `bos_token` of tokenizer_config.json where `add_bos_token` is true there, and else nothing.
    `first` is bos_token, or else eos_token, or without a tokenizer_config.json config.json's bos_token_id, or else
    end-of-text. A folder that was written from a run trained here says so, or has a tokenizer or a model type that
    nobody else has; its texts begin with end-of-text. file: the tokenizer's, if it lies in another folder, where
    tokenizer_config.json is then looked for too. Raises ValueError, naming the file, for one that is not JSON.
    """
    return prefix_of(pretrained_config(folder, file), read_object(folder / "config.json"), tokenizer)


def pretrained_config(folder: Path, file: Path | None = None) -> dict[str, Any]:
    """The tokenizer_config.json in `folder`, or else beside the tokenizer's file; {} if there is none."""
    return read_object(folder / CONFIG) or (read_object(file.parent / CONFIG) if file else {})


def prefix_of(said: dict[str, Any], model: dict[str, Any], tokenizer: Tokenizer) -> Prefix:
    """`pretrained_prefix` from the contents of tokenizer_config.json and of config.json."""
    here = TRAINED_HERE.items() <= said.items() or model.get("model_type") == TRAINED_HERE["trained_by"]
    if here or tokenizer.kind not in ("bpe", "pieces"):
        return Prefix((tokenizer.eot,), tokenizer.eot)
    named = {key: _id(said.get(f"{key}_token"), tokenizer) for key in ("bos", "eos")}
    content = json.loads(tokenizer.file_text)
    ids = _before(content.get("post_processor"))
    if content.get("post_processor") is None and said.get("add_bos_token") is True and named["bos"] is not None:
        ids = [named["bos"]]
    ids = [i for i in ids if 0 <= i < tokenizer.vocab_size]
    choices = [named["bos"], named["eos"]] if said else [model.get("bos_token_id")]
    known = (i for i in choices if isinstance(i, int) and 0 <= i < tokenizer.vocab_size)
    return Prefix(tuple(ids), next(known, tokenizer.eot), tokenizer.space_before, elsewhere=True)


def pretrained_ends(folder: Path, tokenizer: Tokenizer, file: Path | None = None) -> list[int]:
    """The ids that end a text of a model of the hub's format, in order; [] if nothing is said.

    They are eos_token_id of generation_config.json, or else of config.json, and eos_token of tokenizer_config.json.
    """
    model = read_object(folder / "config.json")
    text = model.get("text_config") if isinstance(model.get("text_config"), dict) else {}
    said = [one.get("eos_token_id") for one in (read_object(folder / "generation_config.json"), text, model)]
    ids = next((one for one in said if one is not None), [])
    found = {*ids} if isinstance(ids, list) else {ids}
    found.add(_id(pretrained_config(folder, file).get("eos_token"), tokenizer))
    return sorted(i for i in found if isinstance(i, int) and 0 <= i < tokenizer.vocab_size)


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; {} if there is no file or no object. Raises ValueError, naming the file."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 (byte {error.start})") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    return found if isinstance(found, dict) else {}


def _id(token: Any, tokenizer: Tokenizer) -> int | None:
    name = token.get("content") if isinstance(token, dict) else token
    found = tokenizer.special_tokens.get(name) if isinstance(name, str) else None
    return None if found is None else found.id


def _before(processor: dict[str, Any] | None) -> list[int]:
    """The ids that a post-processor of a tokenizer.json puts before a text. The file has been read by its library."""
    processor = processor or {}
    if processor.get("type") == "Sequence":
        # Each takes what the one before it has made.
        return [i for part in reversed(processor["processors"]) for i in _before(part)]
    if processor.get("type") in ("BertProcessing", "RobertaProcessing"):
        return [processor["cls"][1]]
    ids: list[int] = []
    for part in processor.get("single", ()):
        if "SpecialToken" not in part:
            return ids
        ids += processor["special_tokens"][part["SpecialToken"]["id"]]["ids"]
    return ids
