"""How a conversation becomes text: a Jinja template, or the plain form."""

from __future__ import annotations

import dataclasses
from typing import Any

PLAIN = "plain"
ASSISTANT = "assistant"  # the role whose messages are answers
CHAT_FILE = "chat.json"  # the form of a run's conversations, in its folder


def bears_loss(message: dict[str, Any]) -> bool:
    """Whether training counts the loss on a message: on an answer, unless its "weight" is 0."""
    return message["role"] == ASSISTANT and message.get("weight", 1) != 0


@dataclasses.dataclass(frozen=True)
class ChatFormat:
    """template: Jinja, or None for the plain form. variables: what the template may name. where: where it was found.

    ends: the tokens that end an answer of a model that was trained elsewhere. Such a model has seen what its template
    renders, as a whole. (): the model is trained here, on conversations in pieces, each after end-of-text (`Encoder`).

    The plain form of a message is its role, ":" and a line feed, then its content, then two line feeds, or end-of-text
    after an answer of the assistant.
    """

    template: str | None
    variables: dict[str, str] = dataclasses.field(default_factory=dict)
    where: str = PLAIN
    ends: tuple[int, ...] = ()

    @classmethod
    def of(cls, settings: dict[str, Any], where: str) -> ChatFormat:
        """The inverse of `settings`."""
        return cls(settings.get("template"), settings.get("variables", {}), where, tuple(settings.get("ends", ())))

    def settings(self) -> dict[str, Any]:
        """What decides the tokens, for the manifest of a corpus and CHAT_FILE."""
        if self.template is None:
            return {"plain": 1}
        ends = {"ends": list(self.ends)} if self.ends else {}
        return {"template": self.template, "variables": self.variables, **ends}
