"""A conversation as it is found in a record: a list of messages, each with a role and a content."""

from __future__ import annotations

from typing import Any, NamedTuple

from deltaformer_jax.data.sources.units import Unreadable


class Conversation(NamedTuple):
    """messages: each with the texts "role" and "content", and what else it has. where: its file and line or row."""

    messages: list[dict[str, Any]]
    where: str

    def __len__(self) -> int:
        """The characters of all messages."""
        return sum(len(message["content"]) for message in self.messages)


def conversation_of(value: Any, field: str, where: str, fix: str = "choose --text_field") -> Conversation:
    """`value` if it is a list of messages. Otherwise raises Unreadable, naming `where`, the message and the fix.

    fix: that of a field which is no list of messages.

    Entries of a message that are null are dropped: Parquet has every entry in every message. "weight" is 0 or 1.
    """
    if not isinstance(value, list) or not value:
        what = "an empty list" if value == [] else type(value).__name__
        raise Unreadable(f"{where}: field {field!r} is {what}, not a list of messages; {fix}")
    messages = []
    for number, message in enumerate(value, 1):
        if not isinstance(message, dict):
            raise Unreadable(f"{where}: message {number} is {type(message).__name__}, not an object")
        for name in ("role", "content"):
            if name not in message:
                raise Unreadable(f"{where}: message {number} has no {name!r} (it has: {', '.join(message)}); rename it")
        message = {name: entry for name, entry in message.items() if entry is not None}
        if message.get("tool_calls"):
            message.setdefault("content", "")
        for name in ("role", "content"):
            if not isinstance(message.get(name), str):
                what = type(message.get(name)).__name__
                raise Unreadable(f"{where}: the {name} of message {number} is {what}, not text; leave it out")
        weight = message.get("weight", 1)
        if isinstance(weight, bool) or weight not in (0, 1):
            raise Unreadable(f"{where}: the weight of message {number} is {weight!r}; give 0 (no loss) or 1")
        messages.append(message)
    return Conversation(messages, where)
