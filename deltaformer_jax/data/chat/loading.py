"""Finds the form of conversations: the chat template of a tokenizer's folder, that in a file, or the plain form."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

from deltaformer_jax.data.chat.format import CHAT_FILE, PLAIN, ChatFormat
from deltaformer_jax.data.chat.template import Template
from deltaformer_jax.data.tokenizer import Tokenizer
from deltaformer_jax.data.tokenizer.pretrained import CONFIG, TRAINED_HERE, pretrained_ends, read_object
from deltaformer_jax.host.paths import expand

TEMPLATE = "template"
_TEMPLATE_FILE = "chat_template.jinja"
_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def load_format(chat: str, tokenizer: str) -> ChatFormat:
    """The form that `chat` names: "plain", "template", or the path of a Jinja file.

    tokenizer: the path of a tokenizer.json, "bytes" or "bpe:SIZE". "template" reads chat_template.jinja beside that
    file or else `chat_template` of tokenizer_config.json; of several templates the one named "default". Beside the
    tokenizer of a run it is the template in chat.json. The names of the special tokens (bos_token, ...) come from
    tokenizer_config.json, if it is there. Raises ValueError or
    FileNotFoundError that names the file and the fix, and ModuleNotFoundError without the extra "chat".
    """
    if chat == PLAIN:
        return ChatFormat(None)
    folder = None if tokenizer == "bytes" or tokenizer.startswith("bpe:") else Path(expand(tokenizer)).parent
    config = read_object(folder / CONFIG) if folder else {}
    if chat != TEMPLATE:
        path = Path(expand(chat))
        if not path.is_file():
            raise FileNotFoundError(f"{chat}: no such chat template; --chat is plain, template or a Jinja file")
        return _checked(ChatFormat(_read(path), _variables(config), str(path)))
    fix = f"name another with --chat FILE, or take --chat {PLAIN}"
    if folder is None:
        raise ValueError(f"--chat {TEMPLATE}: tokenizer {tokenizer!r} has no chat template; {fix}")
    found = _beside(folder, config)
    if found is None and (names := _named(config)):
        raise ValueError(
            f"{folder / CONFIG}: its chat_template has the names {', '.join(sorted(map(str, names)))}, and none is "
            f"'default'; write the one to use into {folder / _TEMPLATE_FILE}, or {fix}"
        )
    if found is None:
        raise ValueError(f"{folder / CONFIG}: missing or without a chat_template; {fix}")
    return _checked(found)


def pretrained_format(folder: Path, file: Path, tokenizer: Tokenizer) -> ChatFormat | None:
    """The form of a model of the hub's format: the chat template in its `folder`, or else beside its tokenizer, `file`.

    None if there is no template. It is taken as it stands, so that no extra is needed. Its answers end at eos_token_id
    of generation_config.json, or else of config.json, and at eos_token of tokenizer_config.json; if nothing is said,
    at end-of-text. Raises ValueError, naming the file, for one that is not JSON or not UTF-8.
    """
    for place in (folder, file.parent):
        config = read_object(place / CONFIG)
        if found := _beside(place, config):
            break
    if found is None or TRAINED_HERE.items() <= config.items():
        return found
    return dataclasses.replace(found, ends=tuple(pretrained_ends(folder, tokenizer, file) or [tokenizer.eot]))


def _beside(folder: Path, config: dict[str, Any]) -> ChatFormat | None:
    """The template in the folder of a tokenizer, whose tokenizer_config.json is `config`; None if there is none."""
    if (folder / _TEMPLATE_FILE).is_file():
        return ChatFormat(_read(folder / _TEMPLATE_FILE), _variables(config), str(folder / _TEMPLATE_FILE))
    template = config.get("chat_template")
    if isinstance(template, list):
        template = _named(config).get("default")
    if isinstance(template, str):
        return ChatFormat(template, _variables(config), f"{folder / CONFIG}, chat_template")
    run = ChatFormat.of(read_object(folder / CHAT_FILE), str(folder / CHAT_FILE))
    return None if run.template is None else dataclasses.replace(run, ends=())


def _named(config: dict[str, Any]) -> dict[Any, Any]:
    """Name -> template of a chat_template that is a list of several; else {}."""
    several = config.get("chat_template")
    several = several if isinstance(several, list) else []
    return {one.get("name"): one.get("template") for one in several if isinstance(one, dict)}


def _variables(config: dict[str, Any]) -> dict[str, str]:
    return {name: text for name in _TOKENS if isinstance(text := _text(config.get(name)), str)}


def _checked(found: ChatFormat) -> ChatFormat:
    Template(found)
    return found


def _read(path: str | os.PathLike) -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 (byte {error.start})") from None


def _text(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token
