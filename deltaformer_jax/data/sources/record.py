"""Reads one JSON record and the text, or the conversation, in it. "meta.text" is field text of field meta."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from deltaformer_jax.data.sources.conversation import Conversation, conversation_of
from deltaformer_jax.data.sources.units import Unreadable

_CHAT_HINT = ", or --chat for conversations"


def document_reader(chat: bool) -> Callable[[Any, str, str], str | Conversation]:
    """What makes a document of a value: (value, field, where) -> text or, with `chat`, a conversation."""
    return conversation_of if chat else text_of


def field_of(line: bytes, field: str, where: str, fix: str = "name it with --text_field") -> Any:
    """The value at `field` of the JSON object in `line`. Raises Unreadable, naming `where` and the `fix` of a field.

    A field of that very name comes first; else dots in it lead into objects.
    """
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise Unreadable(f"{where}: not UTF-8 (byte {error.start}); convert it to UTF-8 or leave it out") from None
    except RecursionError:
        raise Unreadable(f"{where}: JSON nested too deeply to be read") from None
    except json.JSONDecodeError as error:
        raise Unreadable(f"{where}: not JSON: {error}") from None
    except ValueError as error:  # an integer of more than 4,300 digits
        raise Unreadable(f"{where}: JSON that cannot be read: {error}") from None
    if isinstance(record, dict) and field in record:
        return record[field]
    value, at = record, ""
    for name in field.split("."):
        if not isinstance(value, dict) or name not in value:
            names = ", ".join(value) if isinstance(value, dict) else "none, it is no object"
            names = names if len(names) < 500 else f"{names[:500]}..."
            inside = f" of {at!r}" if at else ""
            hint = _CHAT_HINT if isinstance(record, dict) and isinstance(record.get("messages"), list) else ""
            raise Unreadable(f"{where}: no field {field!r} (fields{inside}: {names}); {fix}{hint}")
        value, at = value[name], f"{at}.{name}" if at else name
    return value


def text_of(value: Any, field: str, where: str) -> str:
    """`value` if it is text. Otherwise raises Unreadable, naming `where`."""
    if not isinstance(value, str):
        hint = _CHAT_HINT if isinstance(value, list) else ""
        raise Unreadable(f"{where}: field {field!r} is {type(value).__name__}, not text; choose --text_field{hint}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise Unreadable(f"{where}: field {field!r} holds half a surrogate pair, which is no character") from None
    return value
