"""Finds the form of conversations: the chat template of a tokenizer's folder, that in a file, or the plain form."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from deltaformer_jax.data.chat.format import PLAIN, ChatFormat
from deltaformer_jax.data.chat.template import Template
from deltaformer_jax.host.paths import expand

TEMPLATE = "template"
_CONFIG, _TEMPLATE_FILE = "tokenizer_config.json", "chat_template.jinja"
_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def load_format(chat: str, tokenizer: str) -> ChatFormat:
    """The form that `chat` names: "plain", "template", or the path of a Jinja file.

    tokenizer: the path of a tokenizer.json, "bytes" or "bpe:SIZE". "template" reads chat_template.jinja beside that
    file or else `chat_template` of tokenizer_config.json; of several templates the one named "default". The names of
    the special tokens (bos_token, ...) come from tokenizer_config.json, if it is there. Raises ValueError or
    FileNotFoundError that names the file and the fix, and ModuleNotFoundError without the extra "chat".
    """
    if chat == PLAIN:
        return ChatFormat(None)
    folder = None if tokenizer == "bytes" or tokenizer.startswith("bpe:") else Path(expand(tokenizer)).parent
    config = _config(folder / _CONFIG) if folder else {}
    variables = {name: text for name in _TOKENS if isinstance(text := _text(config.get(name)), str)}
    if chat != TEMPLATE:
        path = Path(expand(chat))
        if not path.is_file():
            raise FileNotFoundError(f"{chat}: no such chat template; --chat is plain, template or a Jinja file")
        return _checked(ChatFormat(_read(path), variables, str(path)))
    fix = f"name another with --chat FILE, or take --chat {PLAIN}"
    if folder is None:
        raise ValueError(f"--chat {TEMPLATE}: tokenizer {tokenizer!r} has no chat template; {fix}")
    if (folder / _TEMPLATE_FILE).is_file():
        return _checked(ChatFormat(_read(folder / _TEMPLATE_FILE), variables, str(folder / _TEMPLATE_FILE)))
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {one.get("name"): one.get("template") for one in template if isinstance(one, dict)}
        template = named.get("default")
    if not isinstance(template, str):
        raise ValueError(f"{folder / _CONFIG}: missing or without a chat_template; {fix}")
    return _checked(ChatFormat(template, variables, f"{folder / _CONFIG}, chat_template"))


def _checked(found: ChatFormat) -> ChatFormat:
    Template(found)
    return found


def _config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        config = json.loads(_read(path))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    return config if isinstance(config, dict) else {}


def _read(path: str | os.PathLike) -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 (byte {error.start})") from None


def _text(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token
