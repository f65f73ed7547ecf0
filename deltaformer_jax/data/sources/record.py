"""Reads one JSON record and the text in it."""

from __future__ import annotations

import json
from typing import Any

from deltaformer_jax.data.sources.units import Unreadable


def field_of(line: bytes, field: str, where: str) -> Any:
    """The value at `field` of the JSON object in `line`. Raises Unreadable, naming `where`."""
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
    if not isinstance(record, dict) or field not in record:
        names = ", ".join(record) if isinstance(record, dict) else "none, it is no object"
        names = names if len(names) < 500 else f"{names[:500]}..."
        raise Unreadable(f"{where}: no field {field!r} (fields: {names}); name it with --text_field")
    return record[field]


def text_of(value: Any, field: str, where: str) -> str:
    """`value` if it is text. Otherwise raises Unreadable, naming `where`."""
    if not isinstance(value, str):
        raise Unreadable(f"{where}: field {field!r} is {type(value).__name__}, not text; choose --text_field")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise Unreadable(f"{where}: field {field!r} holds half a surrogate pair, which is no character") from None
    return value
